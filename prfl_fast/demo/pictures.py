"""Clips as one PNG a row, written with the standard library alone, so that a report needs no picture package."""

from __future__ import annotations

import base64
import struct
import zlib

import numpy as np
import numpy.typing as npt

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_GREY = 0  # PNG colour type


def sprite_sheet(clips: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Lays clips ``[N, T, H, W]`` out as one picture ``[N * H, T * W]``: a clip a row, its frames left to right.

    Raises ValueError for another rank or dtype.
    """
    if clips.ndim != 4 or clips.dtype != np.uint8:
        raise ValueError(f"clips: expected uint8 [N, T, H, W], got {clips.dtype} {list(clips.shape)}")
    count, frames, height, width = clips.shape
    return np.ascontiguousarray(clips.transpose(0, 2, 1, 3).reshape(count * height, frames * width))


def grey_png(picture: npt.NDArray[np.uint8]) -> bytes:
    """An 8-bit grey PNG file of ``picture`` ``[H, W]`` uint8."""
    if picture.ndim != 2 or picture.dtype != np.uint8:
        raise ValueError(f"picture: expected uint8 [H, W], got {picture.dtype} {list(picture.shape)}")
    height, width = picture.shape
    # Each line is led by its filter's number; 0 is "none", which is right for small pictures of few grey levels.
    lines = np.concatenate([np.zeros((height, 1), np.uint8), picture], axis=1)
    header = struct.pack(">IIBBBBB", width, height, 8, _GREY, 0, 0, 0)
    return (
        _SIGNATURE + _chunk(b"IHDR", header) + _chunk(b"IDAT", zlib.compress(lines.tobytes(), 9)) + _chunk(b"IEND", b"")
    )


def data_uri(png: bytes) -> str:
    """The PNG as a ``data:`` address that a page can carry inside."""
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
