"""``BucketBatchSampler``: which clips stand in which batch of which rank, a function of seed and epoch alone."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler


class BucketBatchSampler(Sampler[list[int]]):
    """Batches of clips of one shape, shuffled anew every epoch.

    In each epoch a bucket's clips are permuted and dealt out: ``batch_size`` to every rank in turn, so that all ranks
    have batches of the same shape and as many at any time, and no clip is on two. What does not fill a round is dealt
    out in smaller batches; a last ``len(bucket) % world_size`` clips have no equal share and wait for another epoch,
    whose permutation leaves out others.

    Iterating gives the rest of the epoch, from ``batch`` on, and does not advance; :class:`LatentLoader` does.

    Args:
        buckets: numbers of the clips of each shape.
        batch_size: clips a rank and batch, at least 1.
        seed: of the permutations.
        rank, world_size: this process, and how many there are.
        drop_last: leave out the smaller batches.

    Attributes:
        epoch, batch: the position: batches of this epoch that are done.

    Raises:
        ValueError: an argument out of range, or no batch at all.
    """

    def __init__(
        self,
        buckets: Sequence[Sequence[int]],
        batch_size: int,
        *,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = False,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size: expected a whole number from 1, got {batch_size}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank: expected 0 to world_size - 1 = {world_size - 1}, got {rank}")
        self.buckets = [list(bucket) for bucket in buckets]
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.drop_last = drop_last
        self.epoch = 0
        self.batch = 0
        self._planned: tuple[int, list[list[int]]] | None = None
        if not len(self):
            sizes = ", ".join(str(len(bucket)) for bucket in self.buckets) or "none"
            raise ValueError(
                f"batch_size: no batch for {world_size} ranks of {batch_size} from buckets of these sizes: {sizes}"
            )

    def plan(self, epoch: int) -> list[list[int]]:
        """All batches of this rank in an epoch."""
        if self._planned is not None and self._planned[0] == epoch:
            return self._planned[1]
        generator = torch.Generator().manual_seed(_mixed(self.seed, epoch))
        batches: list[list[int]] = []
        size, ranks = self.batch_size, self.world_size
        for bucket in self.buckets:
            order = [bucket[i] for i in torch.randperm(len(bucket), generator=generator).tolist()]
            rounds = len(order) // (size * ranks) * (size * ranks)
            for begin in range(0, rounds, size * ranks):
                batches.append(order[begin + self.rank * size : begin + (self.rank + 1) * size])
            share = (len(order) - rounds) // ranks
            if share and not self.drop_last:
                begin = rounds + self.rank * share
                batches.append(order[begin : begin + share])
        planned = [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]
        self._planned = (epoch, planned)
        return planned

    def advance(self) -> None:
        """One batch is done; after an epoch's last one the next epoch begins."""
        self.batch += 1
        if self.batch == len(self):
            self.epoch, self.batch = self.epoch + 1, 0

    def __len__(self) -> int:
        """Batches of a whole epoch: the same for every epoch and rank."""
        return len(self.plan(self.epoch))

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.plan(self.epoch)[self.batch :])


def _mixed(seed: int, epoch: int) -> int:
    """One seed of both: (1, 0) and (0, 1) draw unlike numbers."""
    return int.from_bytes(hashlib.sha256(f"{seed},{epoch}".encode()).digest()[:8], "little") >> 1
