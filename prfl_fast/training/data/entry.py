"""One line of the index: a clip's latents, what its network calls are given beside them, prompt, labels, source."""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict, dataclass
from typing import Any

from prfl_fast.training.data.findings import BadEntryError
from prfl_fast.training.data.tensors import DTYPES, TensorRef

_SHARD = re.compile(r"[\w.-]+\.safetensors")  # a plain name: what an index names stays inside its folder
_HASH = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Source:
    """Where a clip was cut: ``video`` below the folder of videos, seconds, frames a second, the video's bytes."""

    video: str
    start: float
    stop: float
    fps: float
    bytes: int


@dataclass(frozen=True)
class Entry:
    """An encoded clip.

    Attributes:
        id: unique in its index: the video and the second at which the clip starts.
        bucket: pixel height, pixel width and frames.
        latents: in the layout of the family's pipeline, with a batch of 1.
        conditioning: keyword arguments of a network call by name. A tensor has a batch of 1; what lies in a tuple, and
            plain numbers, belong to the shape and are the same for a whole batch.
    """

    id: str
    prompt: str
    labels: dict[str, float]
    bucket: tuple[int, int, int]
    source: Source
    latents: TensorRef
    conditioning: dict[str, Any]

    def to_line(self) -> str:
        """One line of JSON, without its end."""
        return json.dumps(asdict(self), ensure_ascii=False, allow_nan=False, separators=(",", ":"))

    def shapes(self) -> str:
        """What entries of one batch have in common: shapes and dtypes of their tensors, values of the rest."""
        return json.dumps([_shape(self.latents), {name: _shape(v) for name, v in sorted(self.conditioning.items())}])


def entry_from_line(line: str) -> Entry:
    """The entry of a line. Raises :class:`BadEntryError` that says what is wrong with it."""
    try:
        content = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise _bad(f"not JSON: {error}") from error
    if not isinstance(content, dict):
        raise _bad("expected an object")
    missing = sorted(Entry.__dataclass_fields__.keys() - content.keys())
    if missing:
        raise _bad(f"lacks {', '.join(missing)}")
    for name in ("id", "prompt"):
        if not isinstance(content[name], str):
            raise _bad(f"{name}: expected text, got {content[name]!r}")
    labels, conditioning = content["labels"], content["conditioning"]
    if not isinstance(labels, dict) or not all(_is_number(value) for value in labels.values()):
        raise _bad(f"labels: expected finite numbers by name, got {labels!r}")
    if not isinstance(conditioning, dict):
        raise _bad(f"conditioning: expected an object, got {type(conditioning).__name__}")
    return Entry(
        content["id"],
        content["prompt"],
        {name: float(value) for name, value in labels.items()},
        _bucket(content["bucket"]),
        _source(content["source"]),
        _reference(content["latents"], "latents"),
        {name: _value(value, name) for name, value in conditioning.items()},
    )


def references(value: Any) -> list[TensorRef]:
    """The tensors of a conditioning value."""
    if isinstance(value, TensorRef):
        return [value]
    return [ref for part in value for ref in references(part)] if isinstance(value, tuple) else []


def _shape(value: Any) -> Any:
    if isinstance(value, TensorRef):
        return [value.dtype, *value.shape]
    return [_shape(part) for part in value] if isinstance(value, tuple) else value


def _bad(detail: str) -> BadEntryError:
    return BadEntryError("broken", "index.jsonl", detail)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _bucket(value: Any) -> tuple[int, int, int]:
    if not isinstance(value, list) or len(value) != 3 or not all(map(_is_count, value)):
        raise _bad(f"bucket: expected height, width and frames, got {value!r}")
    height, width, frames = value
    return height, width, frames


def _source(value: Any) -> Source:
    if not isinstance(value, dict) or value.keys() != Source.__dataclass_fields__.keys():
        raise _bad(f"source: expected {', '.join(Source.__dataclass_fields__)}, got {value!r}")
    numbers = [value[name] for name in ("start", "stop", "fps", "bytes")]
    if not isinstance(value["video"], str) or not all(map(_is_number, numbers)):
        raise _bad(f"source: expected a path and finite numbers, got {value!r}")
    return Source(**value)


def _reference(value: Any, name: str) -> TensorRef:
    if not isinstance(value, dict) or value.keys() != TensorRef.__dataclass_fields__.keys():
        raise _bad(f"{name}: expected {', '.join(TensorRef.__dataclass_fields__)}, got {value!r}")
    shard, key, shape, dtype, sha256 = (value[field] for field in TensorRef.__dataclass_fields__)
    if not isinstance(shard, str) or not _SHARD.fullmatch(shard):
        raise _bad(f"{name}: expected the plain name of a .safetensors file in the folder, got {shard!r}")
    if not isinstance(shape, list) or not all(map(_is_count, shape)):
        raise _bad(f"{name}: expected a shape, got {shape!r}")
    if not isinstance(key, str) or dtype not in DTYPES or not isinstance(sha256, str) or not _HASH.fullmatch(sha256):
        raise _bad(f"{name}: damaged key, dtype or sha256")
    return TensorRef(shard, key, tuple(shape), dtype, sha256)


def _value(value: Any, name: str) -> Any:
    if isinstance(value, dict):
        return _reference(value, name)
    if isinstance(value, list):
        return tuple(_value(part, name) for part in value)
    if not _is_number(value):
        raise _bad(f"conditioning: {name}: expected tensors and finite numbers, got {value!r}")
    return value
