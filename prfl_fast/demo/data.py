"""Clips, codec and base model of a run: the embedded ones, or a user's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prfl_fast.demo.base import Curve, load_base, train_base
from prfl_fast.demo.clips import Clips, corrupt, make_clips
from prfl_fast.demo.codec import PatchCodec
from prfl_fast.demo.net import CHANNELS, make_net
from prfl_fast.demo.rewards import Labelled
from prfl_fast.demo.settings import DemoSettings
from prfl_fast.demo.stages import Stages

MakeClips = Callable[[int, torch.Generator], Clips]


@dataclass(frozen=True)
class Material:
    """What every stage starts from."""

    base: nn.Module
    codec: PatchCodec
    base_curve: Curve
    train: Labelled
    held_out: Labelled


def prepare(settings: DemoSettings, stages: Stages, *, progress: bool = True) -> Material:
    """Load or train the base model and draw training and held-out clips.

    A user's videos get a codec of their own, so the shipped base model is fitted to it first (or trained anew with
    ``from_scratch``).
    """
    sizes, make = settings.sizes, _maker(settings)
    train = make(sizes.clips, torch.Generator().manual_seed(10 * settings.seed + 1))
    held_out = make(sizes.held_out, torch.Generator().manual_seed(10 * settings.seed + 2))
    if settings.clips is None and not settings.from_scratch:
        base, codec, curve = load_base()
    else:
        base, codec, curve = _train(settings, stages, train.videos, progress)
    base.eval().requires_grad_(False)
    return Material(base, codec, curve, _labelled(codec, train), _labelled(codec, held_out))


def _maker(settings: DemoSettings) -> MakeClips:
    if settings.clips is None:
        return make_clips
    folder = settings.clips

    def from_videos(count: int, generator: torch.Generator) -> Clips:
        from prfl_fast.demo.videos import read_clips

        return corrupt(read_clips(folder, count, generator), generator)

    return from_videos


def _labelled(codec: PatchCodec, clips: Clips) -> Labelled:
    return Labelled(codec.encode(clips.videos), clips.good)


def _train(
    settings: DemoSettings, stages: Stages, videos: Tensor, progress: bool
) -> tuple[nn.Module, PatchCodec, Curve]:
    codec = PatchCodec.fit(videos, CHANNELS)
    start = make_net(settings.seed) if settings.from_scratch else load_base()[0]
    done = stages.load("base")
    if done is not None:
        start.load_state_dict(done[0])
        return start, codec, Curve(1, done[1]["updates"], done[1]["loss"])
    updates = settings.sizes.base_updates if settings.from_scratch else settings.sizes.own_clips_updates
    generator = torch.Generator().manual_seed(settings.seed)
    rate = 2e-3 if settings.from_scratch else 1e-3
    trained, curve = train_base(
        start.requires_grad_(True),
        codec.encode(videos),
        updates=updates,
        generator=generator,
        peak_rate=rate,
        progress=progress,
    )
    stages.save("base", trained.state_dict(), {"updates": curve.updates, "loss": curve.loss})
    return trained, codec, curve
