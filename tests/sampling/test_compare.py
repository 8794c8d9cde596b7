"""compare_gradients: rows and their numbers, draws that repeat, gradients that stay, errors, the printed table."""

from __future__ import annotations

import copy
import re
from typing import Any

import plainloop
import pytest
import torch
from torch import Tensor, nn

import prfl_fast

pytest.importorskip("diffusers")
STEPS = 4


def make(dropout: float = 0.0) -> plainloop.Problem:
    return plainloop.Problem(seed=1, scheduler=plainloop.scheduler("unipc"), steps=STEPS, scale=1.0, dropout=dropout)


def compare(problem: plainloop.Problem, modes: Any, **arguments: Any) -> prfl_fast.GradientComparison:
    arguments = {"reward": lambda latents, t: problem.loss(latents).reshape(1), **arguments}
    return prfl_fast.compare_gradients(
        problem.net, problem.scheduler, problem.latents, STEPS, modes=modes,
        conditioning={"c": problem.condition}, **arguments,
    )  # fmt: skip


def test_rows_are_the_modes_own_gradients() -> None:
    problem = make()
    exact = torch.cat([v.flatten() for k, v in problem.chain_gradients().items() if "." in k])
    last = torch.cat([v.flatten() for k, v in problem.chain_gradients(gradient="last:2").items() if "." in k])
    custom = prfl_fast.GradientMode((1.0,) * STEPS, (1.0,) * STEPS)
    rows = compare(problem, ["last:2", "full", custom]).rows
    assert [row.mode for row in rows] == ["full", "last:2", "custom"]
    # float64 sums of some hundred terms in another order.
    assert rows[0].cosine == pytest.approx(1, abs=1e-12) and rows[0].norm_ratio == pytest.approx(1, abs=1e-12)
    assert rows[2].cosine == pytest.approx(1, abs=1e-12) and rows[2].norm_ratio == pytest.approx(1, abs=1e-12)
    cosine = float(last @ exact / last.norm() / exact.norm())
    assert 0 < cosine < 0.9999 and rows[1].cosine == pytest.approx(cosine, abs=1e-12)
    assert rows[1].norm_ratio == pytest.approx(float(last.norm() / exact.norm()), rel=1e-12)
    assert [row.network_calls for row in rows] == [2 * STEPS - 1, STEPS + 1, 2 * STEPS - 1]
    assert all(row.seconds > 0 and row.peak_bytes > 0 for row in rows)


def test_random_modes_noise_and_dropout_repeat_with_the_seed() -> None:
    problem = make(dropout=0.3)
    modes = ["random:2", "drtune:2", "random", "prfl"]
    state = torch.get_rng_state()
    first = compare(problem, modes, generator_seed=5)
    assert torch.equal(torch.get_rng_state(), state), "the caller's random numbers are his own"
    torch.rand(3)
    second = compare(problem, modes, generator_seed=5)
    assert [(r.cosine, r.norm_ratio) for r in first.rows] == [(r.cosine, r.norm_ratio) for r in second.rows]
    assert first.rows[0].cosine == pytest.approx(1, abs=1e-12)
    others = [compare(problem, ["random:2"], generator_seed=s).rows[1].cosine for s in range(6, 12)]
    assert len(set(others)) > 1


def test_no_gradient_of_the_users_is_touched() -> None:
    problem = make()
    judge = nn.Linear(6, 1).double()
    leaves = [problem.latents, problem.condition, *problem.net.parameters(), *judge.parameters()]
    for leaf in leaves[::2]:
        leaf.grad = torch.ones_like(leaf)
    before = [leaf.grad for leaf in leaves]

    def reward(latents: Tensor, timestep: Tensor) -> Tensor:
        return judge(latents.flatten(1)).squeeze(1).square()

    compare(problem, ["last:1"], reward=reward)

    def failing(latents: Tensor, timestep: Tensor) -> Tensor:
        latents.register_hook(lambda g: torch.linalg.inv(torch.zeros(2, 2)))
        return reward(latents, timestep)

    with pytest.raises(RuntimeError):
        compare(problem, ["last:1"], reward=failing)
    assert all(leaf.grad is b for leaf, b in zip(leaves, before, strict=True))
    assert all(b is None or bool((b == 1).all()) for b in before)


def test_taps_and_the_other_arguments_go_through() -> None:
    problem = make()
    seen: list[float] = []

    def reward(latents: Tensor, timestep: Tensor) -> Tensor:
        seen.append(float(timestep))
        return latents.flatten(1).square().sum(1)

    rows = compare(problem, ["last:1"], reward=reward, supervise=(2, 4), solver="scheduler").rows
    assert rows[1].network_calls == STEPS + 1 and 0.0 in seen and len(set(seen)) == 2


@pytest.mark.parametrize(
    ("modes", "arguments", "error", "text"),
    [
        (["lasst:1"], {}, ValueError, "unknown mode 'lasst:1'"),
        (["last:9"], {}, ValueError, "1..4"),
        (["none"], {}, ValueError, "'none' has no gradient"),
        ("last:1", {}, TypeError, "modes: expected a sequence"),
        (["prfl"], {"supervise": (2, 4)}, ValueError, "supervise"),
        (["last:1"], {"gradient": "full"}, ValueError, "gradient is set by the comparison"),
        (["last:1"], {"graph": "steps"}, ValueError, "graph is set by the comparison"),
        (["last:1"], {"solver": "magic"}, ValueError, "solver|kind"),
    ],
)
def test_errors_come_before_any_call(modes: Any, arguments: dict[str, Any], error: Any, text: str) -> None:
    problem = make()
    with pytest.raises(error, match=text):
        compare(problem, modes, **arguments)
    assert problem.net.calls == 0


def test_a_reward_or_a_network_without_gradient() -> None:
    problem = make()
    with pytest.raises(ValueError, match="exact gradient is zero"):
        compare(problem, ["last:1"], reward=lambda latents, t: 0 * latents.sum().reshape(1))
    frozen = copy.deepcopy(problem)
    frozen.net.requires_grad_(False)
    with pytest.raises(ValueError, match="at least one trainable parameter"):
        compare(frozen, ["last:1"])


def test_the_table_that_is_printed() -> None:
    text = str(compare(make(), ["last:1", "drtune:2"]))
    head, *rows = text.splitlines()
    assert head.split() == ["mode", "cosine", "norm", "ratio", "calls", "seconds", "peak", "MiB"]
    assert [row.split()[0] for row in rows] == ["full", "last:1", "drtune:2"]
    assert re.fullmatch(r"full +1\.0000 +1\.0000 +7 +\d+\.\d{3} +\d+\.\d{2}", rows[0])
    assert len({len(line) for line in text.splitlines()}) == 1
