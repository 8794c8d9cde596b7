"""Clips, codec and judges: what each defect does to which judge, and that none can be fooled by doing nothing."""

from __future__ import annotations

import pytest
import torch

from prfl_fast.demo.clips import FRAMES, KINDS, SIZE, corrupt, make_clips, render
from prfl_fast.demo.codec import PatchCodec
from prfl_fast.demo.judges import bootstrap_interval, diversity, judge


@pytest.fixture(scope="module")
def clips():
    return make_clips(600, torch.Generator().manual_seed(0))


def test_the_same_seed_gives_the_same_clips(clips) -> None:
    again = make_clips(600, torch.Generator().manual_seed(0))
    assert torch.equal(clips.videos, again.videos) and torch.equal(clips.kinds, again.kinds)
    assert clips.videos.shape == (600, FRAMES, SIZE, SIZE)
    assert 0 <= float(clips.videos.min()) and float(clips.videos.max()) <= 1
    assert set(clips.kinds.tolist()) == set(range(len(KINDS)))
    assert torch.equal(clips.good, (clips.kinds == 0).float())
    # 600 draws of probability 1/2: four standard deviations are 49.
    assert abs(int(clips.good.sum()) - 300) < 49


def test_each_defect_is_seen_by_the_judge_that_it_concerns(clips) -> None:
    seen = judge(clips.videos)

    def mean(values: torch.Tensor, kind: str) -> float:
        return float(values[clips.kinds == KINDS.index(kind)].mean())

    good = mean(seen.motion_error, "good")
    for kind in ("jitter", "jump", "vanish"):
        assert mean(seen.motion_error, kind) > 20 * good
    for kind in ("vanish", "shape"):
        assert mean(seen.structure_error, kind) > 5 * mean(seen.structure_error, "good")
    # A slow clip is as smooth as a good one: what gives it away is its movement.
    assert mean(seen.net_move, "slow") < 0.4 * mean(seen.net_move, "good")


def test_a_known_path_is_tracked_and_its_error_is_zero() -> None:
    time = torch.arange(FRAMES, dtype=torch.float32)
    path = torch.stack([6 + 2.5 * time, 8 + 0.5 * time + 0.1 * time**2], -1)[None]
    video = render(path, torch.full((1, FRAMES, 2), 3.0), torch.ones(1, FRAMES))
    seen = judge(video)
    # The veil threshold cuts the disc's soft edge evenly: a hundredth of a pixel is what the pixel grid leaves.
    assert float((seen.centres - path).abs().max()) < 0.05
    assert float(seen.motion_error) < 0.01
    expected = (path[0, -1] - path[0, 0]).norm()
    assert abs(float(seen.net_move[0] - expected)) < 0.1


def test_nothing_to_see_is_the_worst_clip() -> None:
    frozen = judge(render(torch.full((1, FRAMES, 2), 16.0), torch.full((1, FRAMES, 2), 3.0), torch.ones(1, FRAMES)))
    blank = judge(torch.zeros(1, FRAMES, SIZE, SIZE))
    assert float(blank.motion_error) > 5 and float(blank.structure_error) == 2
    assert float(blank.mass) == 0 and float(frozen.net_move) < 0.01


def test_the_codec_is_linear_and_keeps_what_the_judges_look_at(clips) -> None:
    codec = PatchCodec.fit(clips.videos, channels=8)
    latents = codec.encode(clips.videos)
    assert latents.shape == (600, 8, FRAMES, SIZE // 8, SIZE // 8)
    assert abs(float(latents.var(correction=0)) - 1) < 1e-3
    # Orthonormal rows: encoding what was decoded gives the latents back, to float32 rounding of 64-term sums.
    again = codec.encode(codec.decode(latents))
    assert float((again - latents).abs().max()) < 64 * 2**-24 * float(latents.abs().max()) * 10
    a, b = latents[:2], latents[2:4]
    mixed = codec.decode(0.25 * a + 0.75 * b)
    assert torch.allclose(mixed, 0.25 * codec.decode(a) + 0.75 * codec.decode(b), atol=1e-5)
    before, after = judge(clips.videos), judge(codec.decode(latents))
    assert abs(float(before.motion_error.mean() - after.motion_error.mean())) < 0.05
    same = PatchCodec.from_state(codec.state())
    assert torch.equal(same.encode(clips.videos), latents)


def test_all_components_lose_nothing(clips) -> None:
    codec = PatchCodec.fit(clips.videos, channels=64)
    assert torch.allclose(codec.decode(codec.encode(clips.videos)), clips.videos, atol=1e-4)


def test_corrupting_real_clips_leaves_the_good_ones_alone() -> None:
    videos = torch.rand(60, FRAMES, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    broken = corrupt(videos, torch.Generator().manual_seed(2))
    changed = (broken.videos != videos).flatten(1).any(1)
    assert torch.equal(changed, broken.kinds != 0)


def test_diversity_and_intervals() -> None:
    centres = torch.zeros(2, FRAMES, 2)
    centres[1, :, 0] = 3.0
    videos = render(centres + 12, torch.full((2, FRAMES, 2), 3.0), torch.ones(2, FRAMES))
    assert abs(diversity(judge(videos)) - 3.0) < 0.05
    assert diversity(judge(videos[:1])) == 0
    values = torch.randn(400, generator=torch.Generator().manual_seed(0)) + 5
    low, high = bootstrap_interval(values)
    # The mean's standard error is 1 / 20; a 95 % interval is 1.96 of these to either side.
    assert low < float(values.mean()) < high and abs((high - low) / 2 - 1.96 / 20) < 0.02
