"""torch's own attention kernels by their operators, which give the log-sum-exp and take it back.

The operators are private; a test holds their schemas against what is called here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prfl_fast.ops.attention.provider import Problem, Provider

_HALF = (torch.float16, torch.bfloat16)


def _heads_first(*tensors: Tensor) -> list[Tensor]:
    return [tensor.transpose(1, 2) for tensor in tensors]


def _tokens_first(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.transpose(1, 2) for tensor in tensors)


class CpuFlash(Provider):
    """torch's blocked CPU kernel."""

    name = "aten_cpu"

    def why_not(self, problem: Problem, *, backward: bool) -> str | None:
        if problem.device.type != "cpu":
            return "for CPU tensors"
        if not problem.queries or not problem.keys or not problem.batch:
            return "no tokens"
        return None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*_heads_first(q, k, v), scale=scale)
        # It lies as [B, L, H].
        return out.transpose(1, 2).contiguous(), lse.contiguous()

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
        made = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *_heads_first(d_out, q, k, v, out), lse.transpose(1, 2).contiguous().transpose(1, 2), 0.0, False,
            scale=scale,
        )  # fmt: skip
        dq, dk, dv = _tokens_first(*made)
        return dq, dk, dv


class _Cuda(Provider):
    """What torch's three CUDA kernels have in common."""

    head_dims = 256
    multiple = 8
    dtypes: tuple[torch.dtype, ...] = _HALF

    def why_not(self, problem: Problem, *, backward: bool) -> str | None:
        if problem.device.type != "cuda":
            return "for CUDA tensors"
        if problem.dtype not in self.dtypes:
            return f"not for {problem.dtype}"
        if problem.head_dim > self.head_dims or problem.head_dim % self.multiple:
            return f"head dimension {problem.head_dim} is no multiple of {self.multiple} up to {self.head_dims}"
        if not problem.queries or not problem.keys or not problem.batch:
            return "no tokens"
        if backward and problem.deterministic and not self.deterministic():
            return "its backward adds with atomics"
        return None

    @staticmethod
    def deterministic() -> bool:
        """True where the backward gives the same bits in every run."""
        return False


class Cudnn(_Cuda):
    """cuDNN's fused attention."""

    name = "aten_cudnn"
    head_dims = 128

    def why_not(self, problem: Problem, *, backward: bool) -> str | None:
        reason = super().why_not(problem, backward=backward)
        if reason is None and not torch.backends.cudnn.is_available():
            return "torch has no cuDNN"
        if reason is None and torch.cuda.get_device_capability(problem.device) < (8, 0):
            return "needs compute capability 8.0"
        return reason

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        made = torch.ops.aten._scaled_dot_product_cudnn_attention(
            *_heads_first(q, k, v), None, True, 0.0, False, False, scale=scale
        )
        out, lse = made[:2]
        return out.transpose(1, 2).contiguous(), lse.reshape(lse.shape[:3]).contiguous()

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
        seed = torch.zeros((), dtype=torch.int64, device=q.device)
        none = torch.empty(0, device=q.device)
        made = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            *_heads_first(d_out, q, k, v, out), lse.unsqueeze(-1), seed, seed, none, none, none,
            q.shape[1], k.shape[1], 0.0, False, scale=scale,
        )  # fmt: skip
        dq, dk, dv = _tokens_first(*made)
        return dq, dk, dv


class Flash(_Cuda):
    """torch's copy of FlashAttention 2."""

    name = "aten_flash"

    def why_not(self, problem: Problem, *, backward: bool) -> str | None:
        reason = super().why_not(problem, backward=backward)
        if reason is None and torch.cuda.get_device_capability(problem.device) < (8, 0):
            return "needs compute capability 8.0"
        return reason

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        made = torch.ops.aten._scaled_dot_product_flash_attention(
            *_heads_first(q, k, v), 0.0, False, False, scale=scale
        )
        return made[0].transpose(1, 2).contiguous(), made[1].contiguous()

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
        none = torch.empty(0, dtype=torch.int64, device=q.device)
        made = torch.ops.aten._scaled_dot_product_flash_attention_backward(
            *_heads_first(d_out, q, k, v, out), lse, none, none, q.shape[1], k.shape[1], 0.0, False, none, none,
            scale=scale,
        )  # fmt: skip
        dq, dk, dv = _tokens_first(*made)
        return dq, dk, dv


class Efficient(_Cuda):
    """torch's memory-efficient (CUTLASS) kernel."""

    name = "aten_efficient"
    dtypes = (*_HALF, torch.float32)
    head_dims = 1024
    # Its log-sum-exp is padded to whole blocks of queries.
    padding = 32

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        made = torch.ops.aten._scaled_dot_product_efficient_attention(
            *_heads_first(q, k, v), None, True, 0.0, False, scale=scale
        )
        return made[0].transpose(1, 2).contiguous(), made[1][..., : q.shape[1]].contiguous()

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
        missing = -lse.shape[-1] % self.padding
        padded = torch.nn.functional.pad(lse, (0, missing), value=float("inf"))
        seed = torch.zeros((), dtype=torch.int64, device=q.device)
        made = torch.ops.aten._scaled_dot_product_efficient_attention_backward(
            *_heads_first(d_out, q, k, v), None, out.transpose(1, 2), padded, seed, seed, 0.0,
            [True, True, True, False], False, scale=scale,
        )  # fmt: skip
        dq, dk, dv = _tokens_first(*made[:3])
        return dq, dk, dv
