"""Row ops on random inputs, written out in plain torch, and one run of either that gives outputs and gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from prfl_fast.ops import gated_residual, gated_residual_norm, modulated_norm

HALF, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
OPS = ("modulated_norm", "gated_residual", "gated_residual_norm")


@dataclass(frozen=True)
class Case:
    """``rows``: of the modulations, ``"flat"`` is ``[B, C]``, ``""`` none; ``shared``: of batch 1.

    ``sliced``: tokens are every other one of twice as many, modulations are chunks of one tensor as AdaLN hands them
    out; what lies between is NaN.
    """

    op: str = "gated_residual_norm"
    batch: int = 2
    length: int = 7
    channels: int = 20
    dtype: torch.dtype = F32
    modulation: torch.dtype = F32
    rows: str = "sample"
    segments: tuple[int, ...] = ()
    kind: str = "layer"
    affine: bool = False
    gated: bool = True
    shared: bool = False
    sliced: bool = False

    @property
    def normed(self) -> bool:
        return self.op != "gated_residual"

    @property
    def added(self) -> bool:
        return self.op != "modulated_norm"


def leaves_of(case: Case) -> dict[str, Tensor]:
    """The tensors that own memory, as leaves; ``mods`` holds gate, scale and shift."""
    batch, length, channels = case.batch, case.length, case.channels

    def tokens() -> Tensor:
        x = torch.randn(batch, length, 2 if case.sliced else 1, channels)
        if case.sliced:
            x[:, :, 1] = float("nan")
        return x.to(case.dtype).requires_grad_()

    leaves = {"x": tokens()}
    if case.added:
        leaves["y"] = tokens()
    if case.rows:
        rows = {"segment": len(case.segments), "token": length}.get(case.rows, 1)
        mods = torch.randn(1 if case.shared else batch, rows, 6, channels)
        mods[:, :, 3:] = float("nan")
        leaves["mods"] = mods.to(case.modulation).requires_grad_()
    if case.affine and case.normed:
        leaves["weight"] = (1 + 0.3 * torch.randn(channels)).to(case.dtype).requires_grad_()
        leaves["bias"] = torch.randn(channels).to(case.dtype).requires_grad_()
    return leaves


def views(case: Case, leaves: dict[str, Tensor]) -> dict[str, Tensor | None]:
    """The arguments of the op."""
    mods = leaves.get("mods")
    gate = scale = shift = None
    if mods is not None:
        gate, scale, shift = (mods[:, :, index] for index in range(3))
        if case.rows == "flat":
            gate, scale, shift = gate[:, 0], scale[:, 0], shift[:, 0]
    return {
        "x": leaves["x"][:, :, 0],
        "y": leaves["y"][:, :, 0] if case.added else None,
        "gate": gate if case.added and case.gated else None,
        "scale": scale if case.normed else None,
        "shift": shift if case.normed else None,
        "weight": leaves.get("weight"),
        "bias": leaves.get("bias"),
    }


def ours(case: Case, a: dict[str, Tensor | None]) -> list[Tensor]:
    segments = case.segments or None
    norm = {name: a[name] for name in ("scale", "shift", "weight", "bias")}
    if case.op == "gated_residual":
        return [gated_residual(a["x"], a["y"], a["gate"], segments=segments)]
    if case.op == "modulated_norm":
        return [modulated_norm(a["x"], **norm, segments=segments, kind=case.kind)]
    return list(gated_residual_norm(a["x"], a["y"], a["gate"], **norm, segments=segments, kind=case.kind))


def plain(case: Case, a: dict[str, Tensor | None]) -> list[Tensor]:
    """Torch's own functions, each in the dtype of its inputs, as a diffusers block in that dtype."""
    x = a["x"]
    assert x is not None
    dtype = x.dtype

    def wide(modulation: Tensor) -> Tensor:
        rows = modulation.unsqueeze(1) if modulation.ndim == 2 else modulation
        if case.rows == "segment":
            spread = [rows[:, i : i + 1].expand(-1, run, -1) for i, run in enumerate(case.segments)]
            return torch.cat(spread, dim=1)
        return rows

    outputs = []
    if case.added:
        branch = a["y"] if a["gate"] is None else a["y"] * wide(a["gate"])
        x = (x + branch).to(dtype)
        outputs.append(x)
    if case.normed:
        shape = (case.channels,)
        n = F.rms_norm(x, shape, eps=1e-6) if case.kind == "rms" else F.layer_norm(x, shape, eps=1e-6)
        if a["weight"] is not None:
            n = n * a["weight"] + a["bias"]
        if a["scale"] is not None:
            n = n * (1 + wide(a["scale"])) + wide(a["shift"])
        outputs.append(n.to(dtype))
    return outputs


def run(case: Case, leaves: dict[str, Tensor], op: Callable[..., list[Tensor]]) -> dict[str, Tensor]:
    """Outputs, and gradients of all leaves for random cotangents (the same in every run of a case)."""
    fresh = {name: leaf.detach().clone().requires_grad_() for name, leaf in leaves.items()}
    outputs = op(case, views(case, fresh))
    generator = torch.Generator().manual_seed(case.channels)
    # Rounded to half precision, so that every dtype is given the same.
    cotangents = [torch.randn(o.shape, generator=generator).to(BF16).to(o.dtype) for o in outputs]
    gradients = torch.autograd.grad(outputs, list(fresh.values()), cotangents, allow_unused=True)
    results = {f"output {index}": output.detach() for index, output in enumerate(outputs)}
    for name, gradient in zip(fresh, gradients, strict=True):
        if gradient is not None:
            results[f"gradient of {name}"] = gradient
    return results


def in_float64(case: Case, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """The plain composition on the same numbers in float64."""
    return run(replace(case, dtype=F64, modulation=F64), {k: v.detach().double() for k, v in leaves.items()}, plain)


MODULATIONS = {
    "none": Case(rows=""),
    "flat": Case(rows="flat"),
    "sample": Case(),
    "token": Case(rows="token"),
    "one run": Case(rows="segment", segments=(7,)),
    "runs": Case(rows="segment", segments=(3, 1, 3)),
    "runs of one": Case(rows="segment", segments=(1,) * 7),
    "many runs": Case(rows="segment", length=13, segments=(1, 2, 1, 1, 2, 1, 1, 1, 2, 1)),
    "shared": Case(rows="sample", shared=True),
    "shared runs": Case(rows="segment", segments=(2, 5), shared=True),
    "shared tokens": Case(rows="token", shared=True),
    "no gate": Case(gated=False),
    "rms": Case(kind="rms"),
    "affine": Case(affine=True),
    "affine alone": Case(rows="", affine=True),
    "rms affine": Case(kind="rms", affine=True, rows="segment", segments=(4, 3)),
    "sliced": Case(sliced=True, rows="segment", segments=(6, 1)),
    "one channel": Case(channels=1, affine=True),
}
