"""``labels.csv``: which clips there are, with prompt and labels."""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass
from pathlib import Path

_WORDS = {"good": 1.0, "poor": 0.0}
_OWN = ("video", "prompt", "start", "stop")


@dataclass(frozen=True)
class Row:
    """One line. ``stop`` is None where the clip may go on to the video's end; ``problem`` says why it can't be used."""

    video: str
    prompt: str
    start: float
    stop: float | None
    labels: dict[str, float]
    problem: str | None


def read_labels(path: Path) -> list[Row]:
    """Rows of a CSV file with the columns ``video`` and ``prompt``, and, if wanted, ``start`` and ``stop`` in seconds.

    Every other column is a label: a number, ``good`` (1) or ``poor`` (0).

    Raises:
        ValueError: no such columns, a line with more fields than the first one, or the same clip twice.
        OSError: the file can't be read.
    """
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, restkey="", skipinitialspace=True)
        columns = [name.strip() for name in reader.fieldnames or ()]
        missing = [name for name in _OWN[:2] if name not in columns]
        if missing:
            raise ValueError(f"labels: {path}: expected a column {' and '.join(missing)}, got {', '.join(columns)}")
        if len(set(columns)) < len(columns) or "" in columns:
            raise ValueError(f"labels: {path}: expected every column to have a name of its own, got {columns}")
        reader.fieldnames = columns
        rows: dict[tuple[str, float], Row] = {}
        for fields in reader:
            if "" in fields:
                raise ValueError(f"labels: {path}, line {reader.line_num}: more fields than columns (quote the commas)")
            row = _row({name: (value or "").strip() for name, value in fields.items()}, columns)
            if (row.video, row.start) in rows:
                raise ValueError(f"labels: {path}, line {reader.line_num}: {row.video} from {row.start:g} s is twice")
            rows[row.video, row.start] = row
    if not rows:
        raise ValueError(f"labels: {path} has no line below its first")
    return list(rows.values())


def _row(fields: dict[str, str], columns: list[str]) -> Row:
    problems: list[str] = []
    if not fields["video"]:
        problems.append("no video named")
    if not fields["prompt"]:
        problems.append("missing prompt")
    labels = {}
    for name in columns:
        if name in _OWN:
            continue
        value = _number(_WORDS.get(fields[name].lower(), fields[name]))
        if not fields[name]:
            problems.append(f"missing label {name}")
        elif value is None:
            problems.append(f"label {name}: expected a finite number, good or poor, got {fields[name]!r}")
        else:
            labels[name] = value
    start, stop = (_number(fields.get(name) or default) for name, default in (("start", "0"), ("stop", "0")))
    if start is None or start < 0:
        problems.append(f"start: expected seconds from 0, got {fields['start']!r}")
        start = 0.0
    if fields.get("stop") and (stop is None or stop <= start):
        problems.append(f"stop: expected seconds after start, got {fields['stop']!r}")
    end = stop if fields.get("stop") else None
    return Row(fields["video"], fields["prompt"], start, end, labels, "; ".join(problems) or None)


def _number(value: str | float) -> float | None:
    try:
        number = float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
