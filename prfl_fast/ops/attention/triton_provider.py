"""Our own attention kernels in Triton: portable, deterministic, and with a gradient through the log-sum-exp."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from prfl_fast.ops import backends
from prfl_fast.ops.attention.provider import Gradients, Needed, Problem, Provider

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_INSTALLED = importlib.util.find_spec("triton") is not None


class Triton(Provider):
    """Products in the inputs' dtype, sums in float32; on CPU tensors where Triton interprets."""

    name = "triton"
    head_dims = 256
    multiple = 8

    def missing(self) -> str | None:
        return None if _INSTALLED else "triton is not installed (pip install triton)"

    def why_not(self, problem: Problem, *, backward: bool) -> str | None:
        reason = self.missing()
        if reason is not None:
            return reason
        if problem.device.type != "cuda" and not (problem.device.type == "cpu" and backends.triton_interprets()):
            return "for CUDA tensors (TRITON_INTERPRET=1 runs Triton on the CPU)"
        if problem.dtype not in _DTYPES:
            return f"not for {problem.dtype}"
        if problem.head_dim > self.head_dims or problem.head_dim % self.multiple:
            return f"head dimension {problem.head_dim} is no multiple of {self.multiple} up to {self.head_dims}"
        if problem.empty:
            return "no tokens"
        if problem.device.type == "cuda" and torch.cuda.get_device_capability(problem.device) < (8, 0):
            return "needs compute capability 8.0"
        return None

    @property
    def takes_d_lse(self) -> bool:
        return True

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        from prfl_fast.kernels import attention

        return attention.forward(q, k, v, scale)

    def backward(
        self,
        d_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        scale: float,
        d_lse: Tensor | None,
        deterministic: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        everything = (True, True, True)
        dq, dk, dv = self.some_gradients(everything, d_out, q, k, v, out, lse, scale, d_lse, deterministic)
        assert dq is not None and dk is not None and dv is not None
        return dq, dk, dv

    def some_gradients(
        self,
        needed: Needed,
        d_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        scale: float,
        d_lse: Tensor | None,
        deterministic: bool,
    ) -> Gradients:
        from prfl_fast.kernels import attention

        # Always deterministic: no atomics.
        return attention.backward(d_out, q, k, v, out, lse, scale, d_lse, needed=needed)

    def version(self) -> str:
        import triton

        return f"triton {triton.__version__}"
