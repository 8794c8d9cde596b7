"""``ShardWriter``: shards and index that survive a kill at any moment.

A shard is written aside and renamed, then its lines are appended to the index. What a crash can leave is a file aside
(removed at the next start), a shard without lines (written again under its number), or some of a shard's lines (cut
off: the shard tells how many there must be).
"""

from __future__ import annotations

import fcntl
import os
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from prfl_fast.training.data.atomic import PARTIAL, publish, sync, write_shard
from prfl_fast.training.data.entry import Entry, Source, references
from prfl_fast.training.data.findings import BadEntryError
from prfl_fast.training.data.index import INDEX, read_index
from prfl_fast.training.data.tensors import TensorRef, read_header, reference


class ShardWriter:
    """Adds clips to a folder; a context manager that holds the folder's lock.

    Args:
        folder: there already; what is in it is kept and goes on.
        clips_per_shard: a shard is written when it has as many clips.

    Attributes:
        entries: what the index holds, by id.

    Raises:
        ValueError: another writer holds the folder, or the index is damaged otherwise than by a crash.
    """

    def __init__(self, folder: Path, clips_per_shard: int) -> None:
        self.folder = folder
        self._limit = clips_per_shard
        # Unbuffered: bytes that wait in this process would be written twice after an interruption.
        self._index = (folder / INDEX).open("a+b", buffering=0)
        try:
            fcntl.flock(self._index, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._index.close()
            raise ValueError(f"output: another process is writing into {folder}") from error
        try:
            for aside in folder.glob(f"*{PARTIAL}"):
                aside.unlink()
            self.entries: dict[str, Entry] = {entry.id: entry for entry in self._mend()}
        except BaseException:
            self._index.close()
            raise
        self._end = os.fstat(self._index.fileno()).st_size
        self._shared = {
            (name, ref.sha256, ref.shape): ref
            for entry in self.entries.values()
            for name, value in entry.conditioning.items()
            for ref in references(value)
        }
        numbers = [int(entry.latents.shard.split("-")[1].split(".")[0]) for entry in self.entries.values()]
        self._number = max(numbers, default=-1) + 1
        self._tensors: dict[str, Tensor] = {}
        self._pending: list[Entry] = []

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            # What is complete is kept when the user interrupts; after another error the disk may be the cause.
            if kind is None or issubclass(kind, KeyboardInterrupt):
                self.flush()
        finally:
            self._index.close()

    def add(
        self,
        id: str,
        *,
        prompt: str,
        labels: dict[str, float],
        bucket: tuple[int, int, int],
        source: Source,
        latents: Tensor,
        conditioning: dict[str, Any],
    ) -> None:
        """Take a clip's CPU tensors; on the disk after the next :meth:`flush`, or when the shard is full.

        Conditioning that an earlier clip had too (one prompt for many clips, one shape's tables) is stored once.
        """
        key = f"latents/{id}"
        entry = Entry(
            id,
            prompt,
            labels,
            bucket,
            source,
            reference(latents, self._shard, key),
            {name: self._share(name, value) for name, value in conditioning.items()},
        )
        self._tensors[key] = latents.contiguous().clone()  # tensors of a file must not share memory
        self._pending.append(entry)
        if len(self._pending) >= self._limit:
            self.flush()

    def flush(self) -> None:
        """Write what is pending as a shard and its lines. Done again after an interruption, it has the same effect."""
        if not self._pending:
            return
        write_shard(self.folder / self._shard, self._tensors, len(self._pending))
        os.ftruncate(self._index.fileno(), self._end)  # lines of a flush that was interrupted
        lines = "".join(entry.to_line() + "\n" for entry in self._pending).encode()
        written = 0
        while written < len(lines):
            written += self._index.write(lines[written:])
        os.fsync(self._index.fileno())
        self.entries.update((entry.id, entry) for entry in self._pending)
        self._end += len(lines)
        self._number += 1
        self._tensors, self._pending = {}, []

    def find(self, id: str) -> Entry | None:
        """The entry of a clip, written or pending."""
        return self.entries.get(id) or next((entry for entry in self._pending if entry.id == id), None)

    def relabel(self, labels: dict[str, dict[str, float]]) -> None:
        """Give entries other labels, by id: the index is written anew, aside and renamed; latents stay."""
        self.flush()
        changed = {id: replace(self.entries[id], labels=new) for id, new in labels.items()}
        if not changed:
            return
        merged = self.entries | changed
        aside = self.folder / f"{INDEX}{PARTIAL}"
        aside.write_bytes("".join(entry.to_line() + "\n" for entry in merged.values()).encode())
        fresh = aside.open("a+b", buffering=0)
        fcntl.flock(fresh, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the lock lies on the file, and this is another file
        publish(aside, self.folder / INDEX)
        self._index.close()
        self._index, self.entries = fresh, merged
        self._end = os.fstat(fresh.fileno()).st_size

    @property
    def _shard(self) -> str:
        return f"shard-{self._number:05d}.safetensors"

    def _share(self, name: str, value: Any) -> Any:
        if isinstance(value, (tuple, list)):
            return tuple(self._share(name, part) for part in value)
        if not isinstance(value, Tensor):
            return value
        ref = reference(value, self._shard, "")
        known = self._shared.get((name, ref.sha256, ref.shape))
        if known is None:
            known = replace(ref, key=f"{name}/{ref.sha256[:24]}/{'x'.join(map(str, ref.shape))}")
            self._shared[name, ref.sha256, ref.shape] = known
            self._tensors[known.key] = value.contiguous().clone()
        return known

    def _mend(self) -> list[Entry]:
        """Cut off what a crash left of the last lines; the entries that stay."""
        self._index.seek(0)
        content = self._index.read()
        whole = content.rfind(b"\n") + 1
        os.ftruncate(self._index.fileno(), whole)
        if not whole:
            return []
        entries, findings = read_index(self.folder)
        if findings:
            first = findings[0]
            raise ValueError(
                f"output: {self.folder / INDEX}: {first.entry}: {first.detail}; prfl-fast validate tells more"
            )
        last = entries[-1].latents
        group = [entry for entry in entries if entry.latents.shard == last.shard]
        if len(group) != self._count(last):
            lines = content[:whole].splitlines(keepends=True)
            os.ftruncate(self._index.fileno(), sum(map(len, lines[: len(lines) - len(group)])))
            entries = entries[: len(entries) - len(group)]
        sync(self.folder / INDEX)
        return entries

    def _count(self, ref: TensorRef) -> int:
        """How many clips the shard was written with."""
        try:
            with (self.folder / ref.shard).open("rb") as file:
                header, _ = read_header(file, ref.shard)
            return int(header["__metadata__"]["entries"])
        except (FileNotFoundError, BadEntryError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"output: {self.folder / ref.shard}: missing or damaged; prfl-fast validate tells more"
            ) from error
