"""Live bytes, counted: what autograd keeps and what operations make on the way, without asking an allocator."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

ROUNDING = 512  # bytes; the caching allocator of CUDA hands out multiples of this


def storage_bytes(tensor: Tensor) -> int:
    """Bytes of the tensor's storage, rounded up as :class:`LiveBytes` does."""
    return _round(tensor.untyped_storage().nbytes())


def _round(count: int) -> int:
    return -(-count // ROUNDING) * ROUNDING


def tensors_in(value: Any) -> list[Tensor]:
    """Tensors in an operation's arguments or result, lists and all; this runs for every operation."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (tuple, list)):
        return [tensor for part in value for tensor in tensors_in(part)]
    if isinstance(value, dict):
        return tensors_in(list(value.values()))
    return []


class LiveBytes(TorchDispatchMode):
    """Context manager that counts the storages made inside it for as long as they live.

    Storages, not tensors: views cost nothing, and a tensor saved for the backward counts until it is let go. Works for
    forward and backward, on every device, for fake tensors too. What a kernel allocates inside itself and what
    libraries hold is not seen; storages that were there before do not count.

    Attributes:
        current: bytes of the storages that live now.
        peak: the largest ``current`` so far.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.current = 0
        self.peak = 0
        self._live: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        made = tensors_in(result)
        if made:
            given = {t.untyped_storage()._cdata for t in tensors_in((args, kwargs)) if t.layout is torch.strided}
            for tensor in made:
                if tensor.layout is torch.strided:
                    self._see(tensor.untyped_storage(), given)
        return result

    def _see(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        key, size = storage._cdata, _round(storage.nbytes())
        known = self._live.get(key)
        if known is None:
            if key in given:
                return  # a view of something that was there before
            weakref.finalize(storage, self._release, key).atexit = False
        self._live[key] = size
        self.current += size - (known or 0)
        self.peak = max(self.peak, self.current)

    def _release(self, key: int) -> None:
        self.current -= self._live.pop(key)
