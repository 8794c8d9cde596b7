"""A user's videos as clips of the demo's size: grey windows of eight frames, cut from wherever the video goes on."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prfl_fast.demo.clips import FRAMES, SIZE

ENDINGS = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v")
_FRAMES_A_SECOND = 8.0  # a clip spans one second
_ENLARGED = 48  # windows of SIZE are cut from pictures whose shorter side has this many pixels


def read_clips(folder: str | Path, count: int, generator: torch.Generator) -> Tensor:
    """``count`` clips ``[count, FRAMES, SIZE, SIZE]`` float32 in 0..1, drawn from all videos below ``folder``.

    Videos that can't be read, or are shorter than a clip, are named in one warning and left out.

    Raises:
        ValueError: no folder, no video in it, or none that can be used.
        ImportError: PyAV is missing.
    """
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise ValueError(f"clips: expected a folder of videos, got {root}")
    paths = sorted(path for path in root.rglob("*") if path.suffix.lower() in ENDINGS)
    if not paths:
        raise ValueError(f"clips: {root} holds no video ({', '.join(ENDINGS)})")
    try:
        import av
    except ImportError as error:
        raise ImportError("clips: reading videos needs PyAV: pip install 'prfl-fast[video]'") from error

    videos, left_out = [], []
    for path in paths:
        try:
            frames = _grey_frames(av, path)
        except (av.FFmpegError, OSError) as error:
            left_out.append(f"{path.name} ({error})")
            continue
        if len(frames) < FRAMES:
            left_out.append(f"{path.name} (too short: {len(frames)} frames at {_FRAMES_A_SECOND:g} a second)")
        else:
            videos.append(frames)
    if left_out:
        warnings.warn(f"clips: left out {'; '.join(left_out)}", stacklevel=2)
    if not videos:
        raise ValueError(f"clips: none of the {len(paths)} videos in {root} can be used: {'; '.join(left_out)}")
    return torch.stack([_window(videos[index % len(videos)], generator) for index in range(count)])


def _grey_frames(av: Any, path: Path) -> Tensor:
    """The first video stream as ``[T, H, W]`` float32 at ``_FRAMES_A_SECOND``, shorter side ``_ENLARGED``."""
    pictures: list[Tensor] = []
    with av.open(str(path)) as container:
        if not container.streams.video:
            raise OSError("no video stream")
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        for frame in container.decode(stream):
            wanted = len(pictures) / _FRAMES_A_SECOND
            if frame.time is None or frame.time - float((stream.start_time or 0) * stream.time_base) < wanted:
                continue
            scale = _ENLARGED / min(frame.width, frame.height)
            width, height = max(SIZE, round(frame.width * scale)), max(SIZE, round(frame.height * scale))
            grey = frame.reformat(width=width, height=height, format="gray").to_ndarray()
            pictures.append(torch.from_numpy(grey[:height, :width].copy()).float() / 255)
    return torch.stack(pictures) if pictures else torch.empty(0, SIZE, SIZE)


def _window(frames: Tensor, generator: torch.Generator) -> Tensor:
    """A random cut of a video in time and place, mirrored half of the time."""
    time, top, left = (
        int(torch.randint(size - wanted + 1, (1,), generator=generator))
        for size, wanted in zip(frames.shape, (FRAMES, SIZE, SIZE), strict=True)
    )
    cut = frames[time : time + FRAMES, top : top + SIZE, left : left + SIZE]
    return cut.flip(-1) if torch.rand(1, generator=generator) < 0.5 else cut
