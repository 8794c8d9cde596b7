"""Triton kernels, one file per op, and their launches. Imported on first use, since they need triton."""
