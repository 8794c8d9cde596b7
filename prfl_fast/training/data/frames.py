"""Frames of a video file at a wanted rate and size. Needs PyAV."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prfl_fast.training.data.buckets import Bucket

ENDINGS = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v")


class UnreadableVideoError(ValueError):
    """A video that can't be used, and why."""


@dataclass(frozen=True)
class Probe:
    """What a file holds: upright height and width, seconds from its first frame to the end of its last, frame rate."""

    height: int
    width: int
    seconds: Fraction
    rate: Fraction

    def count(self, start: Fraction, stop: Fraction | None, fps: Fraction) -> int:
        """Clip frames at ``fps`` from ``start`` on. One on the very end counts if half a source frame is left of it."""
        end = self.seconds if stop is None else min(self.seconds, stop)
        room = (end - start - 1 / (2 * self.rate)) * fps
        return int(room // 1) + 1 if room >= 0 else 0


def probe(path: Path) -> Probe:
    """Look at a file: one frame is decoded, the packets' times are read. Raises :class:`UnreadableVideoError`."""
    av = _av()
    try:
        with av.open(str(path)) as container:
            stream = _stream(container)
            rate = Fraction(stream.average_rate or stream.guessed_rate or 0)
            first = next(container.decode(stream), None)
            if first is None or rate <= 0:
                raise UnreadableVideoError("no frame" if first is None else "no frame rate")
            height, width = first.height, first.width
            if _turns(first) % 2:
                height, width = width, height
            container.seek(0, stream=stream)
            ends = [p.pts + (p.duration or 0) for p in container.demux(stream) if p.pts is not None]
            begin = first.pts if first.pts is not None else min(ends, default=0)
            seconds = max((Fraction(end - begin) * stream.time_base for end in ends), default=Fraction(0))
            return Probe(height, width, seconds, rate)
    except (av.FFmpegError, OSError) as error:
        raise UnreadableVideoError(f"can't be read: {error}") from error


def read_frames(path: Path, start: Fraction, fps: Fraction, bucket: Bucket) -> Tensor:
    """uint8 ``[frames, height, width, 3]`` of a bucket's size: the pictures nearest in time to ``start + k / fps``.

    A picture is scaled to cover the bucket (bicubic) and cut in its middle. Raises :class:`UnreadableVideoError`.
    """
    av = _av()
    pictures: list[Tensor] = []
    try:
        with av.open(str(path)) as container:
            stream = _stream(container)
            stream.thread_type = "AUTO"
            half = 1 / (2 * Fraction(stream.average_rate or stream.guessed_rate))
            shown: tuple[Fraction, Any] | None = None
            for time, frame in _timed(container, stream):
                if shown is not None:
                    _take(pictures, shown[1], start, fps, (shown[0] + time) / 2, bucket)
                if len(pictures) == bucket.frames:
                    break
                shown = (time, frame)
            if shown is not None:  # the last picture is on display for a frame's time
                _take(pictures, shown[1], start, fps, shown[0] + half, bucket, inclusive=True)
    except (av.FFmpegError, OSError) as error:
        raise UnreadableVideoError(f"can't be read: {error}") from error
    if len(pictures) < bucket.frames:
        raise UnreadableVideoError(f"only {len(pictures)} of {bucket.frames} frames can be decoded")
    return torch.stack(pictures)


def _take(
    pictures: list[Tensor],
    frame: Any,
    start: Fraction,
    fps: Fraction,
    until: Fraction,
    bucket: Bucket,
    *,
    inclusive: bool = False,
) -> None:
    """Add ``frame`` for every wanted time before ``until``."""
    while len(pictures) < bucket.frames:
        time = start + len(pictures) / fps
        if time > until or (time == until and not inclusive):
            return
        pictures.append(_fitted(frame, bucket))


def _av() -> Any:
    try:
        import av
    except ImportError as error:
        raise ImportError("videos: reading them needs PyAV: pip install 'prfl-fast[video]'") from error
    return av


def _stream(container: Any) -> Any:
    if not container.streams.video:
        raise UnreadableVideoError("no video stream")
    return container.streams.video[0]


def _timed(container: Any, stream: Any) -> Iterator[tuple[Fraction, Any]]:
    """Frames with their seconds after the first."""
    begin = None
    for frame in container.decode(stream):
        if frame.pts is None:
            continue
        begin = frame.pts if begin is None else begin
        yield Fraction(frame.pts - begin) * stream.time_base, frame


def _turns(frame: Any) -> int:
    """Quarter turns, counter-clockwise, that bring a picture upright; telephones film sideways and say so."""
    return int(round(getattr(frame, "rotation", 0) / 90)) % 4


def _fitted(frame: Any, bucket: Bucket) -> Tensor:
    turns = _turns(frame)
    height, width = (bucket.width, bucket.height) if turns % 2 else (bucket.height, bucket.width)
    scale = max(height / frame.height, width / frame.width)
    tall, wide = max(height, round(frame.height * scale)), max(width, round(frame.width * scale))
    array = frame.reformat(width=wide, height=tall, format="rgb24", interpolation="BICUBIC").to_ndarray()
    top, left = (tall - height) // 2, (wide - width) // 2
    return torch.from_numpy(np.rot90(array[top : top + height, left : left + width], turns).copy())
