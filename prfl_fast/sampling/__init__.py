"""The sampling chain: one duty a file; the public door is :mod:`prfl_fast.sampling.door`."""
