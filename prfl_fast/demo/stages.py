"""Finished stages of a run on disk, so that an interrupted run goes on where it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor


class Stages:
    """Tensors and notes of finished stages in ``folder``; those of other settings are not taken for ours.

    Args:
        folder: made when missing.
        settings: whatever decides the outcome, JSON-able; a stage that was saved under other settings is redone.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self._folder = folder
        self._print = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()
        folder.mkdir(parents=True, exist_ok=True)

    def save(self, name: str, tensors: Mapping[str, Tensor], notes: Mapping[str, Any]) -> None:
        """Write one stage aside and rename it: a stage is there whole or not at all."""
        aside = self._folder / f"{name}.part"
        # A copy of each: safetensors refuses tensors that share memory.
        content = {key: value.detach().clone().contiguous() for key, value in tensors.items()}
        save_file(content, aside, {"settings": self._print, "notes": json.dumps(notes)})
        aside.replace(self._folder / f"{name}.safetensors")

    def load(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Tensors and notes of a finished stage, or None when it has to be done."""
        path = self._folder / f"{name}.safetensors"
        if not path.is_file():
            return None
        with safe_open(path, framework="pt") as archive:
            notes = archive.metadata()
            if notes.get("settings") != self._print:
                return None
            return {key: archive.get_tensor(key) for key in archive.keys()}, json.loads(notes["notes"])  # noqa: SIM118
