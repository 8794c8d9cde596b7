"""One tensor of a safetensors shard: where it lies, what it must be, and reading it by plain reads.

Shards are not mapped into memory: a mapped file that is cut short while it is read kills the process, a plain read
fails with an error that names the file.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from prfl_fast.training.data.findings import BadEntryError

# Names of the format and of torch (safetensors' specification of its header).
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LONGEST_HEADER = 100_000_000  # bytes; the format's own limit


@dataclass(frozen=True)
class TensorRef:
    """A tensor of a shard. ``sha256`` is that of its bytes, in the order of a contiguous tensor."""

    shard: str
    key: str
    shape: tuple[int, ...]
    dtype: str
    sha256: str


def raw(tensor: Tensor) -> bytes:
    """The bytes of a CPU tensor."""
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def reference(tensor: Tensor, shard: str, key: str) -> TensorRef:
    """Describe a tensor that will lie in ``shard`` under ``key``."""
    if tensor.dtype not in _NAMES:
        raise ValueError(f"{key}: expected a dtype of {', '.join(map(str, _NAMES))}, got {tensor.dtype}")
    return TensorRef(shard, key, tuple(tensor.shape), _NAMES[tensor.dtype], hashlib.sha256(raw(tensor)).hexdigest())


def read_header(file: BinaryIO, name: str) -> tuple[dict[str, Any], int]:
    """The header of an open shard, and where its data begins."""
    length = int.from_bytes(file.read(8), "little")
    if not 2 <= length <= _LONGEST_HEADER:
        raise BadEntryError("broken", name, "not a safetensors file, or cut short in its header")
    text = file.read(length)
    try:
        header = json.loads(text)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise BadEntryError("broken", name, "not a safetensors file, or cut short in its header") from error
    if not isinstance(header, dict):
        raise BadEntryError("broken", name, "not a safetensors file")
    return header, 8 + length


def read_tensor(folder: Path, ref: TensorRef) -> Tensor:
    """The tensor, its shape, dtype, bytes and finiteness checked against ``ref``.

    Raises :class:`BadEntryError`.
    """
    try:
        with (folder / ref.shard).open("rb") as file:
            header, begin = read_header(file, ref.shard)
            place = header.get(ref.key)
            if not isinstance(place, dict):
                raise BadEntryError("missing", ref.shard, f"holds no {ref.key}")
            try:
                shape, dtype, (start, stop) = tuple(place["shape"]), place["dtype"], place["data_offsets"]
                length = int(stop) - int(start)
            except (KeyError, TypeError, ValueError) as error:
                raise BadEntryError("broken", ref.shard, f"{ref.key}: damaged header") from error
            if (shape, dtype) != (ref.shape, ref.dtype):
                told = f"{ref.key}: {dtype} {list(shape)}, expected {ref.dtype} {list(ref.shape)}"
                raise BadEntryError("mis-shaped", ref.shard, told)
            file.seek(begin + start)
            data = bytearray(max(length, 0))
            got = file.readinto(data)
    except FileNotFoundError as error:
        raise BadEntryError("missing", ref.shard, "no such file") from error
    except OSError as error:
        raise BadEntryError("broken", ref.shard, f"can't be read: {error.strerror or error}") from error
    expected = torch.Size(ref.shape).numel() * DTYPES[ref.dtype].itemsize
    if got != length or length != expected:
        raise BadEntryError("broken", ref.shard, f"{ref.key}: {got} bytes, expected {expected}")
    if hashlib.sha256(data).hexdigest() != ref.sha256:
        raise BadEntryError("broken", ref.shard, f"{ref.key}: its bytes are not those that were written")
    if not data:
        return torch.empty(ref.shape, dtype=DTYPES[ref.dtype])
    tensor = torch.frombuffer(data, dtype=DTYPES[ref.dtype]).view(ref.shape)
    check_finite(tensor, ref.shard, ref.key)
    return tensor


def check_finite(tensor: Tensor, file: str, key: str) -> None:
    """Raises :class:`BadEntryError` where an element is NaN or infinite."""
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        count = int((~torch.isfinite(tensor)).sum())
        raise BadEntryError("non-finite", file, f"{key}: {count} of {tensor.numel()} elements are not finite")
