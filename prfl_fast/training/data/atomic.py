"""Files that are complete or not there: written aside, brought to the disk, renamed."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

PARTIAL = ".partial"


def write_json(path: Path, content: Any) -> None:
    """``content`` as indented JSON."""
    aside = path.with_name(path.name + PARTIAL)
    aside.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    publish(aside, path)


def write_shard(path: Path, tensors: Mapping[str, Tensor], entries: int) -> None:
    """A safetensors file that says in its metadata how many entries' latents it holds."""
    from safetensors.torch import save_file

    aside = path.with_name(path.name + PARTIAL)
    # One entry of metadata: two would be written in an order that changes from run to run.
    save_file(dict(tensors), aside, metadata={"entries": str(entries)})
    publish(aside, path)


def publish(aside: Path, path: Path) -> None:
    """Rename ``aside`` to ``path`` once its bytes are on the disk; a crash leaves the old file or the new one."""
    sync(aside)
    os.replace(aside, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Bring a file or a folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
