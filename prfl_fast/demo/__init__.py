"""The demo: a small Wan-architecture video model aligned with a latent process reward, start to finish on a CPU.

Import :func:`prfl_fast.demo.run.run_demo` to run it; this package itself imports nothing.
"""
