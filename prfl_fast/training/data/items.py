"""What a dataset is made of, whichever way it was stored: items that tell their shape and can be loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from prfl_fast.training.data.entry import Entry
from prfl_fast.training.data.tensors import TensorRef, read_tensor


@dataclass(frozen=True)
class Content:
    """The tensors of one clip, each with a batch of 1.

    Attributes:
        latents: in the layout of the family's pipeline.
        conditioning: keyword arguments of a network call; tuples and numbers belong to the shape.
        condition: latents of the known frames of an image-to-video model, or None.
    """

    latents: Tensor
    conditioning: dict[str, Any]
    condition: Tensor | None = None


class Item(Protocol):
    """One clip of a dataset."""

    @property
    def id(self) -> str:
        """Unique in its dataset."""

    @property
    def prompt(self) -> str:
        """The text of the conditioning."""

    @property
    def labels(self) -> dict[str, float]:
        """Finite numbers by name."""

    def shapes(self) -> str:
        """Equal for items that can stand in one batch."""

    def load(self) -> Content:
        """Read and check the tensors. Raises BadEntryError."""


@dataclass(frozen=True)
class EncodedItem:
    """An entry of a folder that ``prfl-fast encode`` wrote."""

    folder: Path
    entry: Entry

    @property
    def id(self) -> str:
        return self.entry.id

    @property
    def prompt(self) -> str:
        return self.entry.prompt

    @property
    def labels(self) -> dict[str, float]:
        return self.entry.labels

    def shapes(self) -> str:
        return self.entry.shapes()

    def load(self) -> Content:
        conditioning = {name: self._read(value) for name, value in self.entry.conditioning.items()}
        return Content(read_tensor(self.folder, self.entry.latents), conditioning)

    def _read(self, value: Any) -> Any:
        if isinstance(value, TensorRef):
            return read_tensor(self.folder, value)
        return tuple(self._read(part) for part in value) if isinstance(value, tuple) else value
