"""Counting a traced run: live bytes between marks, and the work that was done between them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn

from prfl_fast.memory.keeps import Labels, written_by
from prfl_fast.memory.roofline import NO_WORK, Work, work_of
from prfl_fast.memory.trace import LiveBytes, storage_bytes, tensors_in


class Mark(NamedTuple):
    """A moment of a traced run: bytes that live then, their peak and the work since the mark before."""

    live: int
    peak: int
    work: Work


class Output:
    """What one labelled operation made.

    Attributes:
        label: of a keep-set.
        size: bytes of its storages.
        work: what it cost.
        born: number of operations of the recording before it.
        died: the same when its last storage was let go; None: alive at the end of the recording.
    """

    __slots__ = ("born", "died", "keys", "label", "size", "spoiled", "work")

    def __init__(self, label: str, made: list[Tensor], work: Work, born: int) -> None:
        sizes = {t.untyped_storage()._cdata: storage_bytes(t) for t in made}
        self.label, self.size, self.work, self.born = label, sum(sizes.values()), work, born
        self.keys = set(sizes)
        self.died: int | None = None
        self.spoiled = False


class Recording:
    """One run of a block, operation by operation: ``live`` bytes after each, and the outputs that have a label."""

    def __init__(self, labels: Labels) -> None:
        self.labels = labels
        self.live: list[int] = []
        self.outputs: list[Output] = []


class Tracer(LiveBytes):
    """Live bytes whose peak is told from mark to mark, with the work of the operations in between."""

    def __init__(self) -> None:
        super().__init__()
        self._work = Work()
        self._recording: Recording | None = None

    def mark(self) -> Mark:
        """Now; the next mark's peak and work begin here."""
        mark = Mark(self.current, self.peak, self._work)
        self.peak, self._work = self.current, Work()
        return mark

    @contextmanager
    def recording(self, block: nn.Module, into: list[Recording]) -> Iterator[None]:
        """Records a run of the block, and appends the recording when it ends."""
        recording = Recording(Labels(block))
        self._recording = recording
        try:
            yield
        finally:
            self._recording = None
            into.append(recording)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = super().__torch_dispatch__(func, types, args, kwargs)
        work = work_of(func, args, kwargs, result)
        if work is not NO_WORK:
            self._work = self._work + work
        if self._recording is not None:
            self._record(self._recording, func, args, kwargs, result, work)
        return result

    def _record(self, recording: Recording, func: Any, args: Any, kwargs: Any, result: Any, work: Work) -> None:
        if func._schema.is_mutable:
            keys = {t.untyped_storage()._cdata for t in written_by(func, args, kwargs)}
            for output in recording.outputs:
                output.spoiled = output.spoiled or bool(keys & output.keys and output.died is None)
        label = recording.labels.of(func, args, kwargs)
        if label is None:
            recording.labels.see(func, args, kwargs, result)
        else:
            recording.outputs.append(Output(label, tensors_in(result), work, len(recording.live)))
        recording.live.append(self.current)

    def _release(self, key: int) -> None:
        super()._release(key)
        if self._recording is not None:
            for output in self._recording.outputs:
                if output.died is None and key in output.keys:
                    output.keys.discard(key)
                    if not output.keys:
                        output.died = len(self._recording.live)
