"""Triton kernels, one file per op. Installed as ``prfl_fast.kernels``; imported on first use, since it needs triton."""

if __name__ != "prfl_fast.kernels":
    raise ImportError(f"{__name__}: these kernels are the package prfl_fast.kernels; import that, not the folder itself")
