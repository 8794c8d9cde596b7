"""``LatentDataset``: encoded clips by their number, with good ones in place of those that turn bad."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch.utils.data import Dataset

from prfl_fast.training.data.findings import BadEntryError, Finding
from prfl_fast.training.data.index import read_index
from prfl_fast.training.data.items import Content, EncodedItem, Item
from prfl_fast.training.data.published import PublishedOptions, read_list


@dataclass(frozen=True)
class Sample:
    """A clip. ``index`` is the number of the one that was loaded, ``bad`` what was found wrong on the way to it."""

    index: int
    content: Content
    labels: dict[str, float]
    prompt: str
    bad: tuple[Finding, ...] = ()


class LatentDataset(Dataset[Sample]):
    """The clips of a folder that ``prfl-fast encode`` wrote, or of a published ``.list``.

    ``dataset[i]`` reads and checks clip i. One that can't be read any more is replaced by the next of the same shape
    that can, in the order of the dataset: the same files give the same clips in every process.

    Args:
        path: the folder, or the ``.list``.
        labels: those that a sample has. None: all that every clip has.
        published: how a ``.list`` is read.

    Attributes:
        items: the clips in their order. buckets: their numbers by shape, in the order of the first clip of each.
        label_names: what ``labels`` of a sample holds.
        fingerprint: a hash of the clips' ids and shapes in their order.

    Raises:
        ValueError: an index or list with something wrong in it (``prfl-fast validate`` tells all of it), or a label
            that a clip lacks.
        FileNotFoundError: no such folder or list.
    """

    def __init__(
        self, path: str | Path, *, labels: Sequence[str] | None = None, published: PublishedOptions | None = None
    ) -> None:
        items, findings = open_items(Path(path).expanduser(), published)
        if findings:
            first = findings[0]
            more = f" and {len(findings) - 1} more" if len(findings) > 1 else ""
            raise ValueError(
                f"path: {path}: {first.entry or first.file}: {first.detail}{more}; prfl-fast validate lists what is "
                "wrong"
            )
        self.items: list[Item] = items
        common = set.intersection(*(set(item.labels) for item in items))
        self.label_names: tuple[str, ...] = tuple(sorted(common) if labels is None else labels)
        for item in items:
            missing = [name for name in self.label_names if name not in item.labels]
            if missing:
                had = ", ".join(sorted(item.labels)) or "none"
                raise ValueError(f"labels: {item.id} has no label {missing[0]!r}; it has {had}")
        self.buckets: dict[str, list[int]] = {}
        digest = hashlib.sha256()
        self._place: list[tuple[str, int]] = []
        for number, item in enumerate(items):
            shapes = item.shapes()
            bucket = self.buckets.setdefault(shapes, [])
            self._place.append((shapes, len(bucket)))
            bucket.append(number)
            digest.update(f"{item.id}\n{shapes}\n".encode())
        self.fingerprint: str = digest.hexdigest()

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Sample:
        shapes, place = self._place[index]
        bucket = self.buckets[shapes]
        bad: list[Finding] = []
        for number in bucket[place:] + bucket[:place]:
            item = self.items[number]
            try:
                content = item.load()
            except BadEntryError as error:
                bad.append(error.about(item.id))
                continue
            labels = {name: item.labels[name] for name in self.label_names}
            return Sample(number, content, labels, item.prompt, tuple(bad))
        raise ValueError(f"data: none of the {len(bad)} clips of a shape can be read; {bad[0].entry}: {bad[0].detail}")


def open_items(path: Path, published: PublishedOptions | None) -> tuple[list[Item], list[Finding]]:
    """The items of a folder or list, and what is wrong with what names them. FileNotFoundError where nothing is."""
    if path.is_dir():
        if published is not None:
            raise ValueError(f"published: expected None for a folder, and a .list for its options; got {path}")
        entries, findings = read_index(path)
        return [EncodedItem(path, entry) for entry in entries], findings
    if not path.is_file():
        raise FileNotFoundError(f"path: expected a folder of prfl-fast encode or a .list file, got {path}")
    items, findings = read_list(path, published or PublishedOptions())
    return [*items], findings
