"""``LatentLoader``: batches in an order that goes on at the exact clip after a stop."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader

from prfl_fast.training.data.batch import Batch, collate
from prfl_fast.training.data.dataset import LatentDataset
from prfl_fast.training.data.sampler import BucketBatchSampler


class BadDataWarning(UserWarning):
    """A clip could not be read and was replaced by another one."""


class LatentLoader:
    """Iterating gives the batches that are left of the current epoch; the next iteration begins the next epoch.

    ``state_dict()`` counts the batches that were handed out, the one in hand included, and not those that workers
    fetched ahead: a loader that loads it hands out the batch after. Neither torch's global random state nor the number
    of workers has a part in the order, and iterating leaves that state as it is.

    A clip that can't be read is told once, by :class:`BadDataWarning`, and replaced as :class:`LatentDataset` says.

    Args:
        dataset: the clips.
        batch_size, seed, rank, world_size, drop_last: as for :class:`BucketBatchSampler`.
        num_workers: processes that read ahead; 0 reads in this one.
        prefetch_factor: batches that each of them is ahead.
        pin_memory: None: where there is a CUDA device.

    Example:
        >>> loader = LatentLoader(LatentDataset("data/"), batch_size=2, num_workers=2)
        >>> for batch in loader:
        ...     train(batch.to("cuda"))
    """

    def __init__(
        self,
        dataset: LatentDataset,
        batch_size: int,
        *,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = False,
        num_workers: int = 0,
        prefetch_factor: int = 2,
        pin_memory: bool | None = None,
    ) -> None:
        self.dataset = dataset
        self.sampler = BucketBatchSampler(
            [*dataset.buckets.values()], batch_size, seed=seed, rank=rank, world_size=world_size, drop_last=drop_last
        )
        self._told: set[str] = set()
        self._loader: DataLoader[Any] = DataLoader(
            dataset,
            batch_sampler=self.sampler,
            collate_fn=collate,
            num_workers=num_workers,
            prefetch_factor=prefetch_factor if num_workers else None,
            persistent_workers=num_workers > 0,
            pin_memory=torch.cuda.is_available() if pin_memory is None else pin_memory,
            # Its own generator: the seed that it draws for its workers would shift the global one, and with it every
            # random number of a training that was resumed.
            generator=torch.Generator().manual_seed(seed),
        )

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        return len(self.sampler)

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._loader:
            self.sampler.advance()
            self._tell(batch)
            yield batch

    def forever(self) -> Iterator[Batch]:
        """Epoch after epoch."""
        while True:
            yield from self

    def state_dict(self) -> dict[str, Any]:
        """The position, and what the order depends on. The same on every rank."""
        return {**self._order(), "epoch": self.sampler.epoch, "batch": self.sampler.batch, "told": sorted(self._told)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the state was taken; from the next iteration on.

        Raises ValueError where data, seed, batch size or number of ranks are not those of the state: the order would be
        another one.
        """
        for name, value in self._order().items():
            if state[name] != value:
                raise ValueError(f"state: was saved with {name}={state[name]!r}, here it is {value!r}")
        epoch, batch = state["epoch"], state["batch"]
        if epoch < 0 or not 0 <= batch < len(self.sampler):
            raise ValueError(f"state: expected a batch below {len(self.sampler)}, got epoch {epoch}, batch {batch}")
        self.sampler.epoch, self.sampler.batch = epoch, batch
        self._told = set(state["told"])

    def _order(self) -> dict[str, Any]:
        sampler = self.sampler
        return {
            "data": self.dataset.fingerprint,
            "seed": sampler.seed,
            "batch_size": sampler.batch_size,
            "world_size": sampler.world_size,
            "drop_last": sampler.drop_last,
        }

    def _tell(self, batch: Batch) -> None:
        for finding in batch.bad:
            if finding.entry not in self._told:
                self._told.add(finding.entry)
                warnings.warn(
                    f"{finding.entry} is left out from now on: {finding.file}: {finding.detail}",
                    BadDataWarning,
                    stacklevel=3,
                )
