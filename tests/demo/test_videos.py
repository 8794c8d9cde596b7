"""A user's own videos: read, cut to clips, and every unusable one named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from prfl_fast.demo.clips import FRAMES, SIZE
from prfl_fast.demo.videos import read_clips

av = pytest.importorskip("av")
REAL = Path(__file__).parents[3] / "shared" / "data"


def write_video(path: Path, frames: int, rate: int = 16) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for index in range(frames):
            picture = np.zeros((64, 96, 3), np.uint8)
            picture[20:44, 4 + index : 28 + index] = 255
            for packet in stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)


def test_clips_are_cut_from_all_videos(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", 40)
    (tmp_path / "deeper").mkdir()
    write_video(tmp_path / "deeper" / "b.mp4", 30)
    clips = read_clips(tmp_path, 5, torch.Generator().manual_seed(0))
    assert clips.shape == (5, FRAMES, SIZE, SIZE)
    assert 0 <= float(clips.min()) and 0.8 < float(clips.max()) <= 1
    # The square moves by two pixels of 96 x 64 a frame, that is 1.5 of 72 x 48: neighbouring frames differ.
    assert all(float(clip.diff(dim=0).abs().amax()) > 0.1 for clip in clips)
    again = read_clips(tmp_path, 5, torch.Generator().manual_seed(0))
    assert torch.equal(clips, again)


def test_what_cannot_be_used_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected a folder of videos"):
        read_clips(tmp_path / "nowhere", 1, torch.Generator())
    with pytest.raises(ValueError, match="holds no video"):
        read_clips(tmp_path, 1, torch.Generator())
    (tmp_path / "broken.mp4").write_bytes(b"not a video")
    write_video(tmp_path / "short.mp4", 3)
    with pytest.warns(UserWarning, match="left out broken"), pytest.raises(ValueError, match="short.mp4 .too short"):
        read_clips(tmp_path, 1, torch.Generator())
    write_video(tmp_path / "fine.mp4", 40)
    with pytest.warns(UserWarning, match="short.mp4"):
        assert len(read_clips(tmp_path, 2, torch.Generator())) == 2


@pytest.mark.skipif(not REAL.is_dir(), reason="no real clip beside the project")
def test_a_real_clip() -> None:
    clips = read_clips(REAL, 4, torch.Generator().manual_seed(0))
    assert clips.shape == (4, FRAMES, SIZE, SIZE) and float(clips.std()) > 0.01
