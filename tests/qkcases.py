"""qk_norm_rope on random inputs, written out in plain torch with complex numbers, and one run of either."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from prfl_fast.ops import qk_norm_rope

HALF, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


@dataclass(frozen=True)
class Case:
    """``tables``: heads of cos and sin, 0 for no rotation. ``rotated``: channels of a head, 0 for all.

    ``layout``: ``"packed"`` takes q out of q, k, v in one tensor, ``"heads"`` out of ``[B, H, L, D]``; what is not q is
    NaN. ``least``: the smallest size of a weight; the input is kept where it is below 1e-3.
    """

    batch: int = 2
    length: int = 5
    heads: int = 3
    dim: int = 8
    dtype: torch.dtype = F32
    across: bool = True
    kind: str = "rms"
    weighted: bool = True
    biased: bool = False
    tables: int = 1
    rotated: int = 0
    interleaved: bool = True
    rope: tuple[int, int] | None = None
    angles_batch: int = 1
    layout: str = "plain"
    least: float = 0.5

    @property
    def width(self) -> int:
        return self.heads * self.dim if self.across else self.dim


def leaves_of(case: Case) -> dict[str, Tensor]:
    batch, length, heads, dim = case.batch, case.length, case.heads, case.dim
    if case.layout == "packed":
        x = torch.randn(batch, length, 3, heads, dim)
        x[:, :, 1:] = float("nan")
    elif case.layout == "heads":
        x = torch.randn(batch, heads, length, dim)
    else:
        x = torch.randn(batch, length, heads, dim)
    leaves = {"x": x.to(case.dtype).requires_grad_()}
    if case.weighted:
        sign = torch.where(torch.rand(case.width) < 0.3, -1.0, 1.0)
        leaves["weight"] = (sign * (case.least + torch.rand(case.width))).to(case.dtype).requires_grad_()
    if case.biased:
        leaves["bias"] = torch.randn(case.width).to(case.dtype).requires_grad_()
    return leaves


def angles_of(case: Case) -> tuple[Tensor | None, Tensor | None]:
    """Float32, as the families keep them; the same for every run of a case."""
    if not case.tables:
        return None, None
    start, stop = case.rope or (0, case.length)
    shape = (case.angles_batch, stop - start, case.tables, (case.rotated or case.dim) // 2)
    angle = 6.3 * torch.rand(shape, generator=torch.Generator().manual_seed(3))
    return angle.cos(), angle.sin()


def view(case: Case, leaves: dict[str, Tensor]) -> Tensor:
    x = leaves["x"]
    return {"packed": lambda: x[:, :, 0], "heads": lambda: x.transpose(1, 2)}.get(case.layout, lambda: x)()


def ours(case: Case, leaves: dict[str, Tensor]) -> Tensor:
    cos, sin = angles_of(case)
    return qk_norm_rope(
        view(case, leaves), None, leaves.get("weight"), None, leaves.get("bias"), None, cos, sin,
        kind=case.kind, across_heads=case.across, interleaved=case.interleaved, rope_tokens=case.rope,
    )  # fmt: skip


def turn(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Pairs as complex numbers times cos + i sin; in float32 for the half precisions, as diffusers rotates."""
    wide = x.double() if x.dtype == F64 else x.float()
    a, b = (wide[..., 0::2], wide[..., 1::2]) if interleaved else wide.chunk(2, dim=-1)
    turned = torch.complex(a, b) * torch.complex(cos.to(wide.dtype), sin.to(wide.dtype))
    pairs = torch.view_as_real(turned)
    return (pairs.flatten(-2) if interleaved else pairs.transpose(-1, -2).flatten(-2)).to(x.dtype)


def plain(case: Case, leaves: dict[str, Tensor]) -> Tensor:
    x = view(case, leaves)
    row = x.flatten(2) if case.across else x
    norm = F.rms_norm if case.kind == "rms" else F.layer_norm
    n = norm(row, (case.width,), eps=1e-6)
    if case.weighted:
        n = n * leaves["weight"]
    if case.biased:
        n = n + leaves["bias"]
    n = n.reshape(x.shape)
    cos, sin = angles_of(case)
    if cos is None or sin is None:
        return n
    start, stop = case.rope or (0, case.length)
    rotated = case.rotated or case.dim
    middle = n[:, start:stop]
    middle = torch.cat([turn(middle[..., :rotated], cos, sin, case.interleaved), middle[..., rotated:]], dim=-1)
    return torch.cat([n[:, :start], middle, n[:, stop:]], dim=1)


def run(case: Case, leaves: dict[str, Tensor], op: Callable[[Case, dict[str, Tensor]], Tensor]) -> dict[str, Tensor]:
    """Output, and gradients of all leaves for a random cotangent (the same in every run of a case)."""
    fresh = {name: leaf.detach().clone().requires_grad_() for name, leaf in leaves.items()}
    output = op(case, fresh)
    generator = torch.Generator().manual_seed(case.dim)
    cotangent = torch.randn(output.shape, generator=generator).to(BF16).to(output.dtype)
    gradients = torch.autograd.grad(output, list(fresh.values()), cotangent)
    named = {f"gradient of {name}": gradient for name, gradient in zip(fresh, gradients, strict=True)}
    return {"output": output.detach(), **named}


def in_float64(case: Case, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """The plain composition on the same numbers in float64."""
    return run(replace(case, dtype=F64), {k: v.detach().double() for k, v in leaves.items()}, plain)


VARIANTS = {
    "Wan": Case(),
    "Wan cross": Case(tables=0),
    "Hunyuan": Case(across=False, length=7, rope=(0, 5)),
    "Hunyuan text alone": Case(across=False, tables=0),
    "LTX": Case(tables=3, layout="packed"),
    "CogVideoX": Case(across=False, kind="layer", biased=True, length=8, rope=(3, 8), layout="heads"),
    "half-split": Case(interleaved=False),
    "part of a head": Case(rotated=4),
    "part of a head, half-split": Case(rotated=4, interleaved=False, across=False),
    "three pairs": Case(dim=6, rotated=2, interleaved=False, heads=5),
    "tables of each sample": Case(angles_batch=2, tables=3),
    "middle": Case(length=9, rope=(2, 6), kind="layer", biased=True, weighted=True),
    "nothing rotated": Case(rope=(3, 3)),
    "heads of no power of two": Case(heads=13, across=False, kind="layer", biased=True),
    "no weight": Case(weighted=False),
    "no weight, layer": Case(weighted=False, kind="layer", across=False),
    "bias alone": Case(weighted=False, biased=True),
    "small weights": Case(least=0.0005, kind="layer", biased=True),
    "small weights, rms": Case(least=0.0005),
    "one token of one head": Case(batch=1, length=1, heads=1, dim=2),
}
