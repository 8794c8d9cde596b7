"""Triton's interpreter under watch: every address is checked, every byte is counted.

Inside :func:`watched` a kernel may touch elements of the tensors that it was given and nothing else: not what lies
between the rows of a slice, not the element behind the last. What it reads and writes is counted per argument.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor


class OutOfBounds(AssertionError):
    """A kernel touched what it was not given."""


@dataclass
class Argument:
    """One tensor of one launch and how often each of its elements was read and written."""

    kernel: str
    name: str
    start: int  # address of the storage
    itemsize: int
    given: np.ndarray  # per element of the storage: does it belong to the tensor
    reads: np.ndarray
    writes: np.ndarray

    @property
    def requested(self) -> int:
        """Bytes of all reads and writes."""
        return int(self.reads.sum() + self.writes.sum()) * self.itemsize

    @property
    def distinct(self) -> int:
        """Bytes of elements that were read, and of elements that were written: what memory sees through a cache."""
        return int(np.count_nonzero(self.reads) + np.count_nonzero(self.writes)) * self.itemsize


@dataclass
class Watch:
    """All launches inside :func:`watched`."""

    arguments: list[Argument] = field(default_factory=list)
    launches: list[str] = field(default_factory=list)

    def select(self, *names: str, kernel: str | None = None) -> list[Argument]:
        return [a for a in self.arguments if a.name in names and kernel in (None, a.kernel)]


def _tensors(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, tuple):
        for index, entry in enumerate(value):
            yield from _tensors(f"{name}[{index}]", entry)


def _argument(kernel: str, name: str, tensor: Tensor) -> Argument:
    itemsize = tensor.element_size()
    storage = tensor.untyped_storage()
    flags = torch.zeros(storage.nbytes() // itemsize, dtype=torch.bool)
    flags.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).fill_(True)
    counts = np.zeros((2, flags.numel()), dtype=np.int64)
    return Argument(kernel, name, storage.data_ptr(), itemsize, flags.numpy(), counts[0], counts[1])


@contextmanager
def watched() -> Iterator[Watch]:
    """Watch every launch of an interpreted kernel. Not nested."""
    from triton.runtime import interpreter

    watch = Watch()
    live: list[Argument] = []

    def touch(pointers: Any, mask: Any, written: bool) -> None:
        addresses = np.asarray(pointers.data).astype(np.int64)
        chosen = np.broadcast_to(np.asarray(mask.data, dtype=bool), addresses.shape)
        addresses = addresses[chosen]
        if not addresses.size:
            return
        first, last = int(addresses.min()), int(addresses.max())
        size = pointers.get_element_ty().primitive_bitwidth // 8
        for argument in live:
            if argument.start <= first and last < argument.start + argument.given.size * argument.itemsize:
                index, beside = np.divmod(addresses - argument.start, argument.itemsize)
                if size != argument.itemsize or beside.any() or not argument.given[index].all():
                    continue
                np.add.at(argument.writes if written else argument.reads, index, 1)
                return
        names = ", ".join(argument.name for argument in live)
        raise OutOfBounds(
            f"{watch.launches[-1]} {'writes' if written else 'reads'} {size} bytes at {first:#x} to {last:#x}, "
            f"which is not inside one of {names}"
        )

    load = interpreter.InterpreterBuilder.create_masked_load
    store = interpreter.InterpreterBuilder.create_masked_store
    run = interpreter.GridExecutor.__call__

    def checked_load(self: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
        touch(ptrs, mask, False)
        return load(self, ptrs, mask, *rest)

    def checked_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        touch(ptrs, mask, True)
        return store(self, ptrs, value, mask, *rest)

    def refused(self: Any, *_: Any) -> Any:
        raise AssertionError("atomics: sums would depend on the order of programs")

    def checked_run(self: Any, *args: Any, **kwargs: Any) -> Any:
        name = self.fn.__name__
        named = [*zip(self.arg_names, args, strict=False), *kwargs.items()]
        live[:] = [_argument(name, label, t) for key, value in named for label, t in _tensors(key, value) if t.numel()]
        watch.arguments += live
        watch.launches.append(name)
        try:
            return run(self, *args, **kwargs)
        except interpreter.InterpreterError as error:
            # Wrapped once for each function of a kernel that was being run.
            cause: BaseException | None = error
            while isinstance(cause, interpreter.InterpreterError):
                cause = cause.__cause__
            if isinstance(cause, AssertionError):
                raise cause from None
            raise
        finally:
            live.clear()

    with (
        mock.patch.object(interpreter.InterpreterBuilder, "create_masked_load", checked_load),
        mock.patch.object(interpreter.InterpreterBuilder, "create_masked_store", checked_store),
        mock.patch.object(interpreter.InterpreterBuilder, "create_atomic_rmw", refused),
        mock.patch.object(interpreter.InterpreterBuilder, "create_atomic_cas", refused),
        mock.patch.object(interpreter.GridExecutor, "__call__", checked_run),
    ):
        yield watch


@contextmanager
def poisoned() -> Iterator[None]:
    """``torch.empty`` and its kin give NaN, so that an element that is not written cannot pass for a result."""

    def poison(make: Any) -> Any:
        def made(*args: Any, **kwargs: Any) -> Tensor:
            tensor: Tensor = make(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return made

    with (
        mock.patch.object(torch, "empty", poison(torch.empty)),
        mock.patch.object(torch, "empty_like", poison(torch.empty_like)),
        mock.patch.object(Tensor, "new_empty", poison(Tensor.new_empty)),
    ):
        yield
