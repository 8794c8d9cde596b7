"""Measured choices on disk: one JSON file, replaced as a whole, so that a reader never sees half of it."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prfl_fast._env import cache_directory

# Another format gets another name, so that versions of this library do not overwrite each other's.
NAME = "attention-1.json"


def path() -> Path | None:
    """Of the file; None where the user has no home."""
    folder = cache_directory()
    return None if folder is None else folder / NAME


def read(file: Path | None) -> dict[str, dict[str, Any]]:
    """Entries by bucket. A file that can't be read, or is another's, is announced and counts as empty."""
    content, fault = _load(file)
    if fault is not None:
        warnings.warn(f"attention: measured choices in {file} are ignored: {fault}", stacklevel=2)
    return content


def add(file: Path | None, entries: Mapping[str, dict[str, Any]]) -> None:
    """Put the entries beside what is there now; a folder that can't be written is announced.

    Of two processes that write at once one may lose its entries, never the file.
    """
    if file is None:
        return
    beside = file.with_name(f"{file.name}.{os.getpid()}.part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(json.dumps({**_load(file)[0], **entries}, indent=1) + "\n", encoding="utf-8")
        beside.replace(file)
    except OSError as error:
        warnings.warn(
            f"attention: measured choices are not kept for the next process, {file} can't be written: {error}",
            stacklevel=2,
        )


def _load(file: Path | None) -> tuple[dict[str, dict[str, Any]], str | None]:
    if file is None:
        return {}, None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}, None
    except (OSError, ValueError) as error:
        return {}, str(error)
    if not isinstance(content, dict) or not all(map(_is_entry, content.values())):
        return {}, "it holds something else"
    return content, None


def _is_entry(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("order"), list)
        and isinstance(entry.get("wrong"), dict)
        and all(isinstance(name, str) for name in (*entry["order"], *entry["wrong"]))
        and isinstance(entry.get("microseconds"), dict)
        and all(isinstance(value, (int, float)) for value in entry["microseconds"].values())
    )
