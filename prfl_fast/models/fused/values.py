"""Activations that autograd need not keep: the value, and the formula that gives it again from what is kept anyway."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prfl_fast.ops import modulated_norm


@dataclass(frozen=True)
class Value:
    """An activation and where it comes from.

    Attributes:
        value: the tensor, part of the graph.
        formula: gives it again, bit for bit, from ``sources``; None: it is kept itself.
        sources: tensors that the graph keeps for other reasons.
    """

    value: Tensor
    formula: Callable[..., Tensor] | None = None
    sources: tuple[Tensor | None, ...] = ()


class Norm(NamedTuple):
    """Parameters of a norm module, read without calling it."""

    weight: Tensor | None
    bias: Tensor | None
    eps: float
    kind: Literal["layer", "rms"]


# Class names of norms that the ops know, torch's and diffusers'; FSDP2's classes derive from them.
_KINDS: dict[str, Literal["layer", "rms"]] = {
    "torch.nn.modules.normalization.LayerNorm": "layer",
    "torch.nn.modules.normalization.RMSNorm": "rms",
    "diffusers.models.normalization.FP32LayerNorm": "layer",
    "diffusers.models.normalization.RMSNorm": "rms",
}


def class_path(cls: type) -> str:
    """Module and name of a class: tells diffusers' classes apart without importing diffusers."""
    return f"{cls.__module__}.{cls.__qualname__}"


def is_norm(module: Any) -> bool:
    """True for a norm that the ops compute."""
    return class_path(type(module)) in _KINDS


def norm_of(module: nn.Module) -> Norm:
    """The norm's parameters.

    Raises:
        TypeError: a module of another class: something wrapped or replaced it after :func:`prfl_fast.fuse`.
    """
    kind = _KINDS.get(class_path(type(module)))
    if kind is None:
        raise TypeError(
            f"a fused block expected a LayerNorm or RMSNorm and found {type(module).__name__}: it was replaced after "
            "fuse; call prfl_fast.unfuse, or fuse again afterwards"
        )
    eps: Any = module.eps
    weight: Any = module.weight
    if eps is None:  # torch's RMSNorm
        eps = torch.finfo(torch.float32 if weight is None else weight.dtype).eps
    return Norm(weight, getattr(module, "bias", None), float(eps), kind)


def _normed(segments: Sequence[int] | None, eps: float, kind: Literal["layer", "rms"], *tensors: Any) -> Tensor:
    return modulated_norm(*tensors, segments=segments, eps=eps, kind=kind)


def normed_value(
    value: Tensor | None,
    stream: Tensor,
    norm: Norm,
    scale: Tensor | None,
    shift: Tensor | None,
    segments: Sequence[int] | None,
) -> Value:
    """``value`` (None: it is made here) as what it is: the modulated norm of ``stream``."""
    sources = (stream, scale, shift, norm.weight, norm.bias)
    formula = partial(_normed, segments, norm.eps, norm.kind)
    return Value(formula(*sources) if value is None else value, formula, sources)


def modulated(
    x: Tensor,
    norm: Norm,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    segments: Sequence[int] | None = None,
) -> Value:
    """:func:`prfl_fast.ops.modulated_norm` of the stream ``[B, L, C]``; the stream is kept, the result is not."""
    return normed_value(None, x, norm, scale, shift, segments)


def gelu(pre: Tensor, approximate: str) -> Value:
    """GELU of a pre-activation, which its own backward keeps."""
    formula = partial(F.gelu, approximate=approximate)
    return Value(formula(pre), formula, (pre,))


def added(a: Tensor, b: Tensor) -> Value:
    """``a + b`` of two attentions' outputs, which they keep themselves."""
    return Value(a + b, torch.add, (a, b))


def _beside(approximate: str, a: Tensor, pre: Tensor) -> Tensor:
    return torch.cat([a, F.gelu(pre, approximate=approximate)], dim=-1)


def beside_gelu(a: Tensor, pre: Tensor, approximate: str) -> Value:
    """``a`` and the GELU of ``pre`` side by side: what a single-stream block's last projection reads."""
    formula = partial(_beside, approximate)
    return Value(formula(a, pre), formula, (a, pre))
