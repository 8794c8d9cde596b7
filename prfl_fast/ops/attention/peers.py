"""Attention kernels of other packages by the functions that give the log-sum-exp and take it back.

Written from their sources and tested here against stand-ins with the same signatures; they wait for a GPU: the trial
(trial.py) holds their results against float64 before one of them is chosen.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import inspect
from typing import Any

import torch
from torch import Tensor

from prfl_fast.ops.attention.provider import Problem, Provider


class _Peer(Provider):
    """What they have in common.

    Attributes:
        module: to import from.
        needs: top-level modules that are there where the package is.
        distributions: names under which its version is known.
    """

    module: str
    needs: tuple[str, ...]
    distributions: tuple[str, ...]
    oldest: tuple[int, ...] = ()
    head_dims = 256
    capabilities: tuple[tuple[int, int], tuple[int, int]] = ((8, 0), (99, 0))
    # True where the backward can be asked for the same bits in every run.
    can_repeat = True

    @functools.cached_property
    def _functions(self) -> Any:
        return importlib.import_module(self.module)

    def missing(self) -> str | None:
        if any(importlib.util.find_spec(name) is None for name in self.needs):
            return f"{self.distributions[0]} is not installed"
        version = self.version()
        numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
        if self.oldest and numbers and numbers < self.oldest:
            return f"{self.distributions[0]} {version} is too old, {'.'.join(map(str, self.oldest))} is needed"
        return None

    def version(self) -> str:
        for name in self.distributions:
            try:
                return importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                continue
        return "unknown version"

    def why_not(self, problem: Problem, *, backward: bool) -> str | None:
        if problem.device.type != "cuda":
            return "for CUDA tensors"
        if problem.dtype not in (torch.float16, torch.bfloat16):
            return f"not for {problem.dtype}"
        if problem.head_dim > self.head_dims or problem.head_dim % 8:
            return f"head dimension {problem.head_dim} is no multiple of 8 up to {self.head_dims}"
        if problem.empty:
            return "no tokens"
        if backward and problem.deterministic and not self.can_repeat:
            return "its backward adds with atomics"
        least, below = self.capabilities
        if not least <= torch.cuda.get_device_capability(problem.device) < below:
            return f"not for compute capability {torch.cuda.get_device_capability(problem.device)}"
        return None


def _empty_like(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in tensors)


class FlashAttention2(_Peer):
    """Package flash-attn from 2.7 on: tokens first, log-sum-exp ``[B, H, Lq]``."""

    name = "flash_attn_2"
    module = "flash_attn.flash_attn_interface"
    needs = ("flash_attn", "flash_attn_2_cuda")
    distributions = ("flash-attn",)
    oldest = (2, 7)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        made = self._functions._flash_attn_forward(
            q, k, v, dropout_p=0.0, softmax_scale=scale, causal=False, window_size_left=-1, window_size_right=-1,
            softcap=0.0, alibi_slopes=None, return_softmax=False,
        )  # fmt: skip
        return made[0], made[1]

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
        dq, dk, dv = _empty_like(q, k, v)
        self._functions._flash_attn_backward(
            d_out, q, k, v, out, lse, dq, dk, dv, dropout_p=0.0, softmax_scale=scale, causal=False,
            window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, deterministic=deterministic,
        )  # fmt: skip
        return dq, dk, dv


class FlashAttention3(_Peer):
    """FlashAttention 3, for Hopper: tokens first, log-sum-exp ``[B, H, Lq]``."""

    name = "flash_attn_3"
    module = "flash_attn_interface"
    needs = ("flash_attn_interface",)
    distributions = ("flash-attn-3", "flash_attn_3")
    capabilities = ((9, 0), (10, 0))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        made = self._functions._flash_attn_forward(q, k, v, softmax_scale=scale)
        return made[0], made[1]

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
        dq, dk, dv = _empty_like(q, k, v)
        self._functions._flash_attn_backward(
            d_out, q, k, v, out, lse, dq=dq, dk=dk, dv=dv, softmax_scale=scale, deterministic=deterministic
        )
        return dq, dk, dv


class FlashAttention4(_Peer):
    """FlashAttention 4, in CuTe for Hopper and later: tokens first, log-sum-exp ``[B, H, Lq]``."""

    name = "flash_attn_4"
    module = "flash_attn.cute.interface"
    needs = ("flash_attn", "cutlass")
    distributions = ("flash-attn-4", "fa4")
    head_dims = 128
    capabilities = ((9, 0), (99, 0))

    def missing(self) -> str | None:
        # flash_attn alone may be the second version, and cutlass somebody else's.
        unknown = self.version() == "unknown version"
        return f"{self.distributions[0]} is not installed" if unknown else super().missing()

    @property
    def takes_d_lse(self) -> bool:
        return self.missing() is None and "dlse" in inspect.signature(self._functions._flash_attn_bwd).parameters

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        made = self._functions._flash_attn_fwd(q, k, v, softmax_scale=scale, return_lse=True)
        return made[0], made[1]

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
        more = {} if d_lse is None else {"dlse": d_lse.contiguous()}
        # Output before its gradient, unlike the others.
        made = self._functions._flash_attn_bwd(
            q, k, v, out, d_out, lse, softmax_scale=scale, deterministic=deterministic, **more
        )
        return made[0], made[1], made[2]


class Xformers(_Peer):
    """xformers' own choice among its kernels: tokens first, log-sum-exp ``[B, H, Lq]``, which may come padded."""

    name = "xformers"
    module = "xformers.ops"
    needs = ("xformers",)
    distributions = ("xformers",)
    can_repeat = False

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        out, lse = self._functions.memory_efficient_attention_forward_requires_grad(q, k, v, scale=scale)
        return out, lse[..., : q.shape[1]]

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
        made = self._functions.memory_efficient_attention_backward(d_out, out, lse, q, k, v, scale=scale)
        return made[0], made[1], made[2]
