"""The work of one rank for the test of sequence-parallel pooling; on two processes, over gloo."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from prfl_fast.ops import query_pool

BATCH, TOKENS, DIM, HEADS, QUERIES = 2, 7, 12, 3, 2
# Per case: tokens of each rank's shard, and how many of them count per sample (None: all).
CASES: dict[str, tuple[tuple[int, int], tuple[list[int] | None, list[int] | None]]] = {
    "uneven": ((4, 3), (None, None)),
    "an empty shard": ((7, 0), (None, None)),
    "padded": ((4, 3), ([4, 4], [1, 0])),
    "one sample on each rank alone": ((4, 3), ([2, 0], [0, 3])),
}
NO_TOKENS = ((4, 3), ([1, 0], [2, 0]))


def problem() -> tuple[Tensor, list[Tensor], Tensor]:
    """Tokens, parameters and the weights of the loss, the same on every rank."""
    generator = torch.Generator().manual_seed(5)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    parameters = [randn(QUERIES, DIM), 0.3 * randn(3 * DIM, DIM), randn(3 * DIM), 0.3 * randn(DIM, DIM), randn(DIM)]
    return randn(BATCH, TOKENS, DIM), parameters, randn(BATCH, QUERIES, DIM)


def work(rank: int, folder: str) -> None:
    """Run every case and write results and gradients to ``folder/<rank>.pt``."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    group = dist.group.WORLD
    found = {}
    for name, (sizes, counts) in CASES.items():
        x, parameters, weights = problem()
        shard = x.split(list(sizes), dim=1)[rank].clone().requires_grad_()
        leaves = [parameter.requires_grad_() for parameter in parameters]
        result = query_pool(shard, *leaves, HEADS, lengths=counts[rank], group=group)
        gradients = torch.autograd.grad((result * weights).sum(), [shard, *leaves])
        found[name] = [result.detach(), *gradients]
    x, parameters, _ = problem()
    sizes, counts = NO_TOKENS
    try:
        query_pool(x.split(list(sizes), dim=1)[rank], *parameters, HEADS, lengths=counts[rank], group=group)
    except ValueError as error:
        found["error"] = [str(error)]
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()
