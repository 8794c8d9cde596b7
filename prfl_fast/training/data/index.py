"""``index.jsonl``, one entry a line, and ``dataset.json``, what all of them have in common."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from prfl_fast.training.data.entry import Entry, entry_from_line
from prfl_fast.training.data.findings import BadEntryError, Finding

INDEX = "index.jsonl"
SETTINGS = "dataset.json"
LEFT_OUT = "left_out.json"


def read_index(folder: Path) -> tuple[list[Entry], list[Finding]]:
    """All entries in their order, and what is wrong with the index itself."""
    path = folder / INDEX
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return [], [Finding("missing", "", INDEX, "no such file; expected a folder that prfl-fast encode wrote")]
    entries: dict[str, Entry] = {}
    findings: list[Finding] = []
    lines = content.split(b"\n")
    torn = lines.pop()
    for number, line in enumerate(lines, 1):
        try:
            entry = entry_from_line(line.decode())
        except UnicodeDecodeError:
            findings.append(Finding("broken", f"line {number}", INDEX, "not UTF-8"))
        except BadEntryError as error:
            findings.append(error.about(f"line {number}"))
        else:
            if entry.id in entries:
                findings.append(Finding("broken", entry.id, INDEX, f"line {number}: the same id again"))
            else:
                entries[entry.id] = entry
    if torn:
        findings.append(Finding("broken", f"line {len(lines) + 1}", INDEX, "cut short; the same encode mends it"))
    if not entries and not findings:
        findings.append(Finding("missing", "", INDEX, "holds no entry"))
    return list(entries.values()), findings


def read_settings(folder: Path) -> dict[str, Any] | None:
    """What the folder was encoded with; None where nothing says so. ValueError where the file is damaged."""
    path = folder / SETTINGS
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected an object, got {type(content).__name__}")
    return content
