"""Samples put together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prfl_fast.training.data.dataset import Sample
from prfl_fast.training.data.findings import Finding


@dataclass(frozen=True)
class Batch:
    """B clips of one shape.

    Attributes:
        latents: in the layout of the family's pipeline, ``[B, ...]``.
        conditioning: keyword arguments of a network call: tensors ``[B, ...]``, and what belongs to the shape.
        labels: float32 ``[B]`` by name.
        prompts: B texts.
        condition: ``[B, ...]`` for image to video, or None.
        indices: the clips' numbers in the dataset.
        bad: clips that were replaced, and why.
    """

    latents: Tensor
    conditioning: dict[str, Any]
    labels: dict[str, Tensor]
    prompts: tuple[str, ...]
    condition: Tensor | None
    indices: tuple[int, ...]
    bad: tuple[Finding, ...]

    def __len__(self) -> int:
        return len(self.indices)

    def pin_memory(self) -> Batch:
        """In pinned memory; torch's loader calls it."""
        return self._map(Tensor.pin_memory)

    def to(self, device: torch.device | str, *, non_blocking: bool = True) -> Batch:
        """On a device; pinned tensors are copied while the host goes on."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def _map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        def each(value: Any) -> Any:
            if isinstance(value, Tensor):
                return function(value)
            return tuple(each(part) for part in value) if isinstance(value, tuple) else value

        return Batch(
            function(self.latents),
            {name: each(value) for name, value in self.conditioning.items()},
            {name: function(value) for name, value in self.labels.items()},
            self.prompts,
            None if self.condition is None else function(self.condition),
            self.indices,
            self.bad,
        )


def collate(samples: Sequence[Sample]) -> Batch:
    """One batch of samples of one shape."""
    first = samples[0].content
    conditions = [sample.content.condition for sample in samples if sample.content.condition is not None]
    return Batch(
        torch.cat([sample.content.latents for sample in samples]),
        {
            name: torch.cat([sample.content.conditioning[name] for sample in samples])
            if isinstance(value, Tensor)
            else value
            for name, value in first.conditioning.items()
        },
        {name: torch.tensor([sample.labels[name] for sample in samples]) for name in samples[0].labels},
        tuple(sample.prompt for sample in samples),
        torch.cat(conditions) if conditions else None,
        tuple(sample.index for sample in samples),
        tuple(finding for sample in samples for finding in sample.bad),
    )
