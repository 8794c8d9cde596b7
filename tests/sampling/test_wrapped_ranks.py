"""FSDP2 and DDP on two processes against one process on the whole batch; both forms of the graph.

The bound: a rank's sample is computed apart from the other, the gradients are summed in another order. Such a
computation is off by the plain loop's own distance to float64, of which two are twice that apart at most; the mean over
the ranks is one rounding more, far below it.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import plainloop
import pytest
import torch
import wrappedranks
from wrappedranks import GRAPHS, RANDOM, RANKS, WRAPPERS, case_of

pytest.importorskip("diffusers")
pytest.importorskip("peft")

Found = dict[str, Any]
STEPS = 3


@functools.cache
def one_process(lora: bool) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    truth, plain = case_of(lora).float64().plain(), case_of(lora).plain()
    return plain, {group: float((plain[group] - truth[group]).norm()) for group in plain}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[Found]:
    folder: Path = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(wrappedranks.work, (str(folder),), nprocs=RANKS)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]


def check(found: list[Found], name: str, lora: bool, times: int = 1) -> None:
    plain, noise = one_process(lora)
    for rank in range(RANKS):
        actual = found[rank][name]
        assert actual.keys() == {"latents", "lora" if lora else "weights"}
        for group, value in actual.items():
            expected = times * (plain[group].chunk(RANKS)[rank] if group == "latents" else plain[group])
            assert 2.0**-30 * float(plain[group].norm()) < noise[group] < 2.0**-19 * float(plain[group].norm())
            assert float((value - expected).norm()) <= 2 * times * noise[group], (rank, group)


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("kind", WRAPPERS)
def test_ranks_are_one_process(kind: str, lora: bool, graph: str, found: list[Found]) -> None:
    check(found, f"{kind} {lora} {graph}", lora)


@pytest.mark.parametrize("kind", WRAPPERS)
def test_gradients_accumulate(kind: str, found: list[Found]) -> None:
    """A backward of either form into the same ``.grad``: what was reduced before is not reduced into something else."""
    check(found, f"{kind} twice", False, times=2)


@pytest.mark.parametrize("kind", WRAPPERS)
@pytest.mark.parametrize("graph", GRAPHS)
def test_a_fault_on_every_rank(graph: str, kind: str, found: list[Found]) -> None:
    """`.grad` as before, and the next backward is right: without a reset FSDP2 would never reduce again."""
    assert [rank[f"{kind} {graph} fault"] for rank in found] == ["as before"] * RANKS
    check(found, f"{kind} {graph} after", True)


@pytest.mark.parametrize("kind", WRAPPERS)
@pytest.mark.parametrize("mode", RANDOM)
def test_random_modes_draw_on_rank_zero(mode: str, kind: str, found: list[Found]) -> None:
    """Each rank has a generator of its own; the draw is that of rank 0's, and so are the calls."""
    results = [rank[f"{kind} {mode}"] for rank in found]
    assert results[0]["steps"] == results[1]["steps"] and results[0]["step"] == results[1]["step"]
    assert torch.equal(results[0]["lora"], results[1]["lora"]) and bool(results[0]["lora"].any())
    mask = plainloop.resolved(mode, STEPS, seed=wrappedranks.SEED)
    assert results[0]["steps"] == [i for i in range(STEPS) if not mask.weights(i).zero]
    # One process with rank 0's generator: the same mask over the whole batch.
    case = case_of(True)
    sample = case.sample(gradient=mode, generator=torch.Generator().manual_seed(wrappedranks.SEED))
    case.loss(sample.latents).backward()
    expected = case.gradients()["lora"]
    noise = one_process(True)[1]["lora"] / float(one_process(True)[0]["lora"].norm())
    assert float((results[0]["lora"] - expected).norm()) <= 2 * noise * float(expected.norm()) * STEPS


def test_ranks_would_draw_apart() -> None:
    """The seeds of the test above do differ in what they draw."""
    for mode in RANDOM:
        masks = [plainloop.resolved(mode, STEPS, seed=wrappedranks.SEED + rank) for rank in range(RANKS)]
        assert masks[0] != masks[1]
