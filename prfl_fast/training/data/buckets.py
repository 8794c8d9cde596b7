"""Shapes that clips are brought to: height x width x frames, such as fit the VAE's and the patches' multiples."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_FORM = re.compile(r"(\d+)x(\d+)x(\d+)")


@dataclass(frozen=True)
class Bucket:
    """Pixels and frames of a clip."""

    height: int
    width: int
    frames: int

    def __str__(self) -> str:
        return f"{self.height}x{self.width}x{self.frames}"


def parse_bucket(text: str) -> Bucket:
    """``"480x832x81"`` is 480 high, 832 wide, 81 frames."""
    match = _FORM.fullmatch(text)
    if match is None or not all(map(int, match.groups())):
        raise ValueError(f"buckets: expected HEIGHTxWIDTHxFRAMES such as 480x832x81, got {text!r}")
    return Bucket(*map(int, match.groups()))


def check_buckets(pipe: Any, buckets: Sequence[Bucket]) -> None:
    """Raises ValueError where a bucket does not fit the pipeline; the message names the nearest that does."""
    if not buckets:
        raise ValueError("buckets: expected at least one, got none")
    if len(set(buckets)) < len(buckets):
        raise ValueError(f"buckets: expected each once, got {', '.join(map(str, buckets))}")
    pixels, frames = multiples(pipe)
    for bucket in buckets:
        fitting = Bucket(
            _nearest(bucket.height, pixels), _nearest(bucket.width, pixels), _nearest(bucket.frames - 1, frames, 0) + 1
        )
        if bucket != fitting:
            raise ValueError(
                f"buckets: {bucket}: expected a height and a width that are multiples of {pixels}, and a multiple of "
                f"{frames} plus 1 frames; the nearest is {fitting}"
            )


def multiples(pipe: Any) -> tuple[int, int]:
    """Of height and width; of the number of frames less 1."""
    patch = pipe.transformer.config.patch_size
    spatial, temporal = compression(pipe)
    return spatial * (patch if isinstance(patch, int) else patch[-1]), temporal


def compression(pipe: Any) -> tuple[int, int]:
    """Pixels a latent's side, frames a latent frame."""
    if hasattr(pipe, "vae_scale_factor_spatial"):
        return pipe.vae_scale_factor_spatial, pipe.vae_scale_factor_temporal
    return pipe.vae_spatial_compression_ratio, pipe.vae_temporal_compression_ratio


def best_shape(buckets: Sequence[Bucket], height: int, width: int) -> list[Bucket]:
    """The buckets whose picture is nearest in proportion (then in size) to a video's, the longest first."""

    def distance(bucket: Bucket) -> tuple[float, float]:
        proportion = abs(math.log(bucket.width / bucket.height * height / width))
        return round(proportion, 9), abs(math.log(bucket.height * bucket.width / (height * width)))

    nearest = min(buckets, key=distance)
    same = [b for b in buckets if (b.height, b.width) == (nearest.height, nearest.width)]
    return sorted(same, key=lambda bucket: -bucket.frames)


def _nearest(value: int, multiple: int, least: int = 1) -> int:
    return max(least, round(value / multiple)) * multiple
