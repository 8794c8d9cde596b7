"""What can be wrong with an entry: one exception below, one row of a table above."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["broken", "missing", "non-finite", "mis-shaped"]


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong. ``entry`` is its id, or ``line N`` where it has none; empty for the folder itself."""

    kind: Kind
    entry: str
    file: str
    detail: str


class BadEntryError(ValueError):
    """An entry that can't be used: ``kind``, ``file`` and ``detail`` as in :class:`Finding`."""

    def __init__(self, kind: Kind, file: str, detail: str) -> None:
        super().__init__(f"{file}: {detail}")
        self.kind: Kind = kind
        self.file = file
        self.detail = detail

    def __reduce__(self) -> tuple[type[BadEntryError], tuple[Kind, str, str]]:
        # A worker hands its exception over by pickle, which would call the class with the message alone.
        return type(self), (self.kind, self.file, self.detail)

    def about(self, entry: str) -> Finding:
        """The row of a table."""
        return Finding(self.kind, entry, self.file, self.detail)


def table(findings: list[Finding]) -> str:
    """Findings as aligned columns."""
    rows = [("kind", "entry", "file", "what"), *((f.kind, f.entry, f.file, f.detail) for f in findings)]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]) for row in rows
    )
