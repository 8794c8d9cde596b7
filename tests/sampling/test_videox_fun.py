"""The table of VideoX-Fun's flags in the text of ``modes``: every row parses, and has the weights that are stated."""

from __future__ import annotations

import random
import re
from typing import Any

import plainloop
import pytest
import torch

import prfl_fast
from prfl_fast.sampling import modes
from prfl_fast.sampling.modes import GradientMode, resolve_mode

N, K = 12, 4
ROWS = re.findall(r"^``(--backprop_\S[^`]*)``\s+``(.+)``$", modes.__doc__ or "", re.MULTILINE)


def resolve(gradient: Any, seed: int) -> list[tuple[float, float]]:
    mask = resolve_mode(
        gradient, num_steps=N, start_step=0, stop_step=None, supervise=None,
        generator=torch.Generator().manual_seed(seed),
    ).masks[0]  # fmt: skip
    return [(mask.weights(i).parameters, mask.weights(i).input) for i in range(N)]


def theirs(flags: str, draws: random.Random) -> list[tuple[float, float]]:
    """What its training loop does: a list of steps that keep their prediction's graph, all others detached."""
    words = flags.split()
    if words[0] == "--backprop_step_list":
        kept = [int(word) for word in words[1:4]]
    else:
        gap = N // K
        start = draws.randint(0, gap)
        kept = {
            "last": [N - 1],
            "tail": list(range(N))[-K:],
            "uniform": [start + i * gap for i in range(K)],
            "random": draws.sample(range(N), K),
        }[words[1]]
    cut = "--stop_latent_model_input_gradient" in words
    return [(1.0, 0.0 if cut else 1.0) if i in kept else (0.0, 0.0) for i in range(N)]


def test_the_table_has_every_strategy() -> None:
    assert len(ROWS) == 7
    flags = " ".join(row for row, _ in ROWS)
    for name in ("last", "tail", "uniform", "random"):
        assert f"--backprop_strategy {name}" in flags
    assert flags.count("--backprop_step_list") == 2


@pytest.mark.parametrize(("flags", "ours"), ROWS)
def test_a_row_of_the_table(flags: str, ours: str) -> None:
    gradient = eval(ours.replace(":K", f":{K}"), {"GradientMode": GradientMode})
    draws = random.Random(0)
    drawn = "uniform" in flags or "random" in flags
    wanted = {tuple(theirs(flags, draws)) for _ in range(4000 if drawn else 1)}
    got = {tuple(resolve(gradient, seed)) for seed in range(4000 if drawn else 3)}
    if "uniform" in flags:
        # Its last offset has no step for the last of its list: ours has the offsets before.
        fallen = {weights for weights in wanted if sum(w[0] for w in weights) < K}
        assert len(fallen) == 1 and got == wanted - fallen and len(got) == N // K
    else:
        # All C(12, 4) = 495 choices come up: one is missed by 4,000 draws with probability 495 (494/495)^4000 < 0.2.
        assert got == wanted if not drawn else len(got & wanted) > 0.98 * len(got | wanted)
        assert drawn or len(got) == 1


def test_a_list_with_a_bounded_draw() -> None:
    steps = random.Random(1).sample(range(2, 9), K)
    weights = resolve(GradientMode.at_steps(steps, parameters=0.5, input=0), 0)
    assert [i for i, w in enumerate(weights) if w == (0.5, 0.0)] == sorted(steps)
    assert all(w == (0.0, 0.0) for i, w in enumerate(weights) if i not in steps)


@pytest.mark.parametrize("steps", [(), (-1,), (1.5,), (True,), ("2",)])
def test_steps_that_are_none(steps: Any) -> None:
    with pytest.raises(ValueError, match="steps: expected at least one, whole numbers from 0"):
        GradientMode.at_steps(steps)


def test_uniform_steps_pass_their_gradient_on() -> None:
    pytest.importorskip("diffusers")
    problem = plainloop.Problem(seed=2, scheduler=plainloop.scheduler("unipc"), steps=5, scale=1.0)
    mode = plainloop.resolved("uniform:2", 5, seed=4)
    kept = [i for i in range(5) if mode.weights(i).parameters]
    assert len(kept) == 2 and kept[1] - kept[0] == 2
    drawn = problem.chain_gradients(gradient="uniform:2", generator=torch.Generator().manual_seed(4))
    listed = problem.chain_gradients(gradient=prfl_fast.GradientMode.at_steps(kept))
    cut = problem.chain_gradients(gradient=prfl_fast.GradientMode.at_steps(kept, input=0))
    assert all(torch.equal(drawn[name], listed[name]) for name in listed)
    assert any(not torch.equal(listed[name], cut[name]) for name in listed)
