"""Pixel judges that no reward ever sees: they track the body and measure how it moves and whether it keeps its shape.

Every judge works on decoded clips ``[N, T, S, S]`` in 0..1 and gives one value per clip.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_NOMINAL_MASS = 20.0  # brightness of the smallest good body is about pi * 2.6^2 = 21
_LOST_RESIDUAL = 8.0  # pixels charged for a frame in which there is no body: a quarter of the picture
_LEAST_SPEED = 0.5  # pixels a frame; below it a clip counts as frozen and its error is not divided by less


@dataclass(frozen=True)
class Judgement:
    """Per clip [N] float32: ``motion_error`` (residual over speed), ``structure_error``, ``net_move`` and ``speed``
    (pixels, pixels a frame), ``mass`` (summed brightness a frame); and [N, T, 2] the tracked ``centres`` and the smooth
    ``path`` through them."""

    motion_error: Tensor
    structure_error: Tensor
    net_move: Tensor
    speed: Tensor
    mass: Tensor
    centres: Tensor
    path: Tensor


def judge(videos: Tensor) -> Judgement:
    """Judges clips ``[N, T, S, S]``.

    motion error: root mean square distance of the tracked path from the best path of constant acceleration, divided
    by the mean speed (so that slowing down does not help); a frame without a body costs a quarter of the picture.
    structure error: mean over frames of the relative deviation of area and of elongation from the clip's own median
    body, plus one for every frame without a body.
    """
    videos = videos.detach().float().clamp(0, 1)
    n, t, h, w = videos.shape
    bright = (videos - 0.15).clamp_min(0)  # decoding leaves a faint veil, which must not pull the centre
    mass = bright.sum(dim=(2, 3))
    total = mass.clamp_min(1e-6)
    ys = torch.arange(h, dtype=torch.float32)
    xs = torch.arange(w, dtype=torch.float32)
    cx = (bright.sum(2) * xs).sum(-1) / total
    cy = (bright.sum(3) * ys).sum(-1) / total
    centres = torch.stack([cx, cy], -1)
    seen = mass > 0.4 * _NOMINAL_MASS

    time = torch.linspace(-1, 1, t)
    basis = torch.stack([torch.ones(t), time, time**2], -1)
    weight = seen.float() + 1e-6
    gram = torch.einsum("nt,ti,tj->nij", weight, basis, basis) + 1e-5 * torch.eye(3)
    moment = torch.einsum("nt,ti,ntk->nik", weight, basis, centres)
    fitted = torch.einsum("ti,nik->ntk", basis, torch.linalg.solve(gram, moment))
    residual = (centres - fitted).square().sum(-1)
    residual = torch.where(seen, residual, torch.tensor(_LOST_RESIDUAL**2))
    steps = fitted.diff(dim=1).norm(dim=-1)
    speed = steps.mean(1)
    motion_error = residual.mean(1).sqrt() / speed.clamp_min(_LEAST_SPEED)

    area = mass
    offset_x = xs[None, None, None, :] - cx[..., None, None]
    offset_y = ys[None, None, :, None] - cy[..., None, None]
    var_x = (bright * offset_x**2).sum(dim=(2, 3)) / total
    var_y = (bright * offset_y**2).sum(dim=(2, 3)) / total
    cov = (bright * offset_x * offset_y).sum(dim=(2, 3)) / total
    size = (var_x + var_y).clamp_min(1e-3)
    elongation = ((var_x - var_y) ** 2 + 4 * cov**2).sqrt() / size
    middle = area.median(1, keepdim=True).values.clamp_min(_NOMINAL_MASS)
    deviation = ((area - middle).abs() / middle).clamp_max(1.0)
    per_frame = torch.where(seen, deviation + elongation, torch.tensor(2.0))
    structure_error = per_frame.mean(1)

    return Judgement(
        motion_error=motion_error,
        structure_error=structure_error,
        net_move=(fitted[:, -1] - fitted[:, 0]).norm(dim=-1),
        speed=speed,
        mass=mass.mean(1),
        centres=centres,
        path=fitted,
    )


def diversity(judgement: Judgement) -> float:
    """Mean distance (pixels) between the smooth paths of two different clips.

    Of the smooth ones: jitter and frames without a body would count as diversity otherwise.
    """
    paths = judgement.path.flatten(1)
    n, width = paths.shape
    if n < 2:
        return 0.0
    return float(torch.pdist(paths).mean() / (width / 2) ** 0.5)


def bootstrap_interval(values: Tensor, *, level: float = 0.95, draws: int = 2000, seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of ``values`` [N]."""
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(len(values), (draws, len(values)), generator=generator)
    means = values.double()[picks].mean(1)
    tail = (1 - level) / 2
    return float(means.quantile(tail)), float(means.quantile(1 - tail))
