"""Short clips of one moving body, made on the fly: good ones, and ones that are broken in a known way.

A good clip shows a soft disc that flies along a path of constant acceleration. Broken clips are the same with one
defect. The base model of the demo learns the mixture, so there is something to align.

Clips are float32 tensors ``[N, FRAMES, SIZE, SIZE]`` with values in 0..1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

FRAMES = 8
SIZE = 32
DEFECTS = ("jitter", "jump", "vanish", "shape", "slow")
KINDS = ("good", *DEFECTS)

_RADIUS = (2.6, 3.8)
_SPEED = (1.2, 3.0)
_MARGIN = 5.0  # the body stays inside the picture, so that a tracked path is the whole path


@dataclass(frozen=True)
class Clips:
    """Clips with their labels. ``videos`` [N, FRAMES, SIZE, SIZE] float32 in 0..1, ``kinds`` [N] int64 in KINDS."""

    videos: Tensor
    kinds: Tensor

    @property
    def good(self) -> Tensor:
        """[N] float32, 1 where the clip has no defect."""
        return (self.kinds == 0).float()

    def __len__(self) -> int:
        return int(self.videos.shape[0])


def _uniform(shape: Sequence[int], low: float, high: float, generator: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(*shape, generator=generator)


def _paths(count: int, generator: torch.Generator) -> Tensor:
    """Centres [count, FRAMES, 2] of constant acceleration that stay inside the margin; redrawn until they all do."""
    time = torch.arange(FRAMES, dtype=torch.float32)[None, :, None]
    paths = torch.empty(count, FRAMES, 2)
    missing = torch.arange(count)
    while len(missing):
        n = len(missing)
        angle = _uniform((n, 1), 0, 2 * torch.pi, generator)
        speed = _uniform((n, 1), *_SPEED, generator)
        velocity = torch.cat([angle.cos(), angle.sin()], 1) * speed
        acceleration = torch.cat([torch.zeros(n, 1), _uniform((n, 1), 0.0, 0.25, generator)], 1)
        start = _uniform((n, 2), _MARGIN, SIZE - 1 - _MARGIN, generator)
        drawn = start[:, None] + velocity[:, None] * time + 0.5 * acceleration[:, None] * time**2
        inside = ((drawn >= _MARGIN) & (drawn <= SIZE - 1 - _MARGIN)).all(dim=(1, 2))
        paths[missing[inside]] = drawn[inside]
        missing = missing[~inside]
    return paths


def render(centres: Tensor, axes: Tensor, visible: Tensor) -> Tensor:
    """Soft ellipses: centres and half-axes ``[N, FRAMES, 2]`` in pixels (x, y), brightness ``[N, FRAMES]`` -> clips."""
    grid = torch.arange(SIZE, dtype=torch.float32)
    dx = (grid[None, None, None, :] - centres[..., 0, None, None]) / axes[..., 0, None, None]
    dy = (grid[None, None, :, None] - centres[..., 1, None, None]) / axes[..., 1, None, None]
    distance = (dx**2 + dy**2).clamp_min(1e-12).sqrt()
    radius = axes.mean(-1)[..., None, None]
    return torch.sigmoid((1 - distance) * radius / 0.6) * visible[..., None, None]


def make_clips(count: int, generator: torch.Generator, *, good_share: float = 0.5) -> Clips:
    """``count`` clips, a share of them good and the rest spread evenly over the defects.

    Args:
        count: number of clips, at least 1.
        generator: CPU generator; the same seed gives the same clips.
        good_share: probability in 0..1 that a clip has no defect.
    """
    broken = torch.rand(count, generator=generator) >= good_share
    kinds = torch.where(broken, torch.randint(1, len(KINDS), (count,), generator=generator), torch.tensor(0))
    centres = _paths(count, generator)
    radius = _uniform((count, 1, 1), *_RADIUS, generator)
    axes = radius.expand(count, FRAMES, 2).clone()
    visible = torch.ones(count, FRAMES)

    def of(kind: str) -> Tensor:
        return (kinds == KINDS.index(kind)).nonzero().flatten()

    rows = of("jitter")
    amplitude = _uniform((len(rows), 1, 1), 1.0, 2.5, generator)
    centres[rows] += amplitude * torch.randn(len(rows), FRAMES, 2, generator=generator)

    rows = of("jump")
    frame = torch.randint(2, FRAMES - 1, (len(rows), 1, 1), generator=generator)
    angle = _uniform((len(rows), 1), 0, 2 * torch.pi, generator)
    leap = torch.cat([angle.cos(), angle.sin()], 1) * _uniform((len(rows), 1), 7.0, 12.0, generator)
    after = torch.arange(FRAMES)[None, :, None] >= frame
    centres[rows] += after * leap[:, None]

    rows = of("vanish")
    first = torch.randint(1, FRAMES - 2, (len(rows), 1), generator=generator)
    length = torch.randint(1, 3, (len(rows), 1), generator=generator)
    frames = torch.arange(FRAMES)[None]
    visible[rows] = 1.0 - ((frames >= first) & (frames < first + length)).float()

    rows = of("shape")
    stretch = torch.exp(_uniform((len(rows), FRAMES, 1), -0.6, 0.6, generator))
    axes[rows] = axes[rows] * torch.cat([stretch, 1 / stretch], -1)

    rows = of("slow")
    brake = _uniform((len(rows), 1, 1), 0.0, 0.3, generator)
    centres[rows] = centres[rows, :1] + brake * (centres[rows] - centres[rows, :1])

    return Clips(render(centres.clamp(0, SIZE - 1), axes, visible).clamp(0, 1), kinds)


def corrupt(videos: Tensor, generator: torch.Generator) -> Clips:
    """Clips from real videos ``[N, FRAMES, SIZE, SIZE]``: half as they are, half with a defect put into their frames.

    Jitter and jumps shift whole frames, vanishing blanks them, shape squeezes them, slow repeats the first ones.
    """
    count = len(videos)
    kinds = torch.where(
        torch.rand(count, generator=generator) < 0.5,
        torch.tensor(0),
        torch.randint(1, len(KINDS), (count,), generator=generator),
    )
    out = videos.clone()
    for row, kind in enumerate(KINDS[k] for k in kinds.tolist()):
        if kind == "jitter":
            for frame in range(FRAMES):
                dx, dy = torch.randint(-3, 4, (2,), generator=generator).tolist()
                out[row, frame] = torch.roll(out[row, frame], (dy, dx), (0, 1))
        elif kind == "jump":
            cut = int(torch.randint(2, FRAMES - 1, (1,), generator=generator))
            dx, dy = (torch.randint(6, 13, (2,), generator=generator)).tolist()
            out[row, cut:] = torch.roll(out[row, cut:], (dy, dx), (1, 2))
        elif kind == "vanish":
            cut = int(torch.randint(1, FRAMES - 2, (1,), generator=generator))
            out[row, cut : cut + 2] = 0
        elif kind == "shape":
            for frame in range(FRAMES):
                width = int(torch.randint(SIZE // 2, SIZE + 1, (1,), generator=generator))
                squeezed = torch.nn.functional.interpolate(
                    out[row, frame][None, None], (SIZE, width), mode="bilinear", align_corners=False
                )[0, 0]
                out[row, frame] = 0
                left = (SIZE - width) // 2
                out[row, frame, :, left : left + width] = squeezed
        elif kind == "slow":
            out[row] = out[row, [0, 0, 0, 0, 1, 1, 1, 1]]
    return Clips(out, kinds)
