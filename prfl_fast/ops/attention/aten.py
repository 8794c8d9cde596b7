"""torch's own attention kernels by their operators, which give the log-sum-exp and take it back.

The operators are private; a test holds their schemas against what is called here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from prfl_fast.ops.attention.provider import Problem, Provider

_HALF = (torch.float16, torch.bfloat16)


@contextmanager
def reproducible(wanted: bool) -> Iterator[None]:
    """Kernels that torch gives no argument for it take the same road in every run inside, where that is wanted."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    if not wanted or before == (True, False):
        yield
        return
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


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
        if problem.empty:
            return "no tokens"
        return None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*_heads_first(q, k, v), scale=scale)
        return out.transpose(1, 2), lse

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
    # True where the backward can be asked for the same bits in every run.
    can_repeat = True

    def missing(self) -> str | None:
        return "this torch is built without CUDA" if torch.version.cuda is None else None

    def why_not(self, problem: Problem, *, backward: bool) -> str | None:
        if problem.device.type != "cuda":
            return "for CUDA tensors"
        if problem.dtype not in self.dtypes:
            return f"not for {problem.dtype}"
        if problem.head_dim > self.head_dims or problem.head_dim % self.multiple:
            return f"head dimension {problem.head_dim} is no multiple of {self.multiple} up to {self.head_dims}"
        if problem.empty:
            return "no tokens"
        if backward and problem.deterministic and not self.can_repeat:
            return "its backward adds with atomics"
        return None


class Cudnn(_Cuda):
    """cuDNN's fused attention."""

    name = "aten_cudnn"
    head_dims = 128
    can_repeat = False
    # Before 9.15.1 its results were wrong for lengths that are no multiple of 128.
    right_since = 91501

    def missing(self) -> str | None:
        reason = super().missing()
        return "torch has no cuDNN" if reason is None and not torch.backends.cudnn.is_available() else reason

    def why_not(self, problem: Problem, *, backward: bool) -> str | None:
        reason = super().why_not(problem, backward=backward)
        if reason is not None:
            return reason
        version = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
        if version is None:
            return "torch has no cuDNN"
        if torch.cuda.get_device_capability(problem.device) < (8, 0):
            return "needs compute capability 8.0"
        if version < self.right_since and (problem.queries % 128 or problem.keys % 128):
            return f"cuDNN {version} is wrong for lengths that are no multiple of 128"
        return None

    def version(self) -> str:
        return f"{super().version()}, cuDNN {torch.backends.cudnn.version()}"

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        made = torch.ops.aten._scaled_dot_product_cudnn_attention(
            *_heads_first(q, k, v), None, True, 0.0, False, False, scale=scale
        )
        out, lse = made[:2]
        return out.transpose(1, 2), lse.reshape(lse.shape[:3])

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
        # None is an undefined tensor: a defined one would mean a bias, or packed sequences. Seeds are for dropout.
        seed = torch.empty((), dtype=torch.int64, device=q.device)
        made = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            *_heads_first(d_out, q, k, v, out), lse.unsqueeze(-1), seed, seed, None, None, None,
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
        return made[0].transpose(1, 2), made[1]

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
        # None is an undefined tensor: a defined one would mean packed sequences. The state is for dropout.
        state = torch.empty(2, dtype=torch.uint64, device=q.device)
        with reproducible(deterministic):
            made = torch.ops.aten._scaled_dot_product_flash_attention_backward(
                *_heads_first(d_out, q, k, v, out), lse, None, None, q.shape[1], k.shape[1], 0.0, False,
                state, state[0], scale=scale,
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
        return made[0].transpose(1, 2), made[1][..., : q.shape[1]]

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
        seed = torch.empty((), dtype=torch.int64, device=q.device)
        with reproducible(deterministic):
            made = torch.ops.aten._scaled_dot_product_efficient_attention_backward(
                *_heads_first(d_out, q, k, v), None, out.transpose(1, 2), padded, seed, seed, 0.0,
                [True, True, True, False], False, scale=scale,
            )  # fmt: skip
        dq, dk, dv = _tokens_first(*made[:3])
        return dq, dk, dv
