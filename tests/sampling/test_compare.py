"""compare_gradients: rows and their numbers, draws that repeat, gradients that stay, errors, the printed table."""

from __future__ import annotations

import copy
import math
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import plainloop
import pytest
import torch
from torch import Tensor, nn

import prfl_fast
from prfl_fast.sampling.compare import GradientComparison, GradientRow

pytest.importorskip("diffusers")
STEPS = 4


def make(dropout: float = 0.0) -> plainloop.Problem:
    return plainloop.Problem(seed=1, scheduler=plainloop.scheduler("unipc"), steps=STEPS, scale=1.0, dropout=dropout)


def compare(problem: plainloop.Problem, modes: Any, **arguments: Any) -> prfl_fast.GradientComparison:
    arguments = {"reward": lambda latents, t: problem.loss(latents).reshape(1), **arguments}
    latents = arguments.pop("latents", problem.latents)
    return prfl_fast.compare_gradients(
        problem.net, problem.scheduler, latents, STEPS, modes=modes,
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
    assert head.split() == ["mode", "cosine", "norm", "ratio", "calls", "variance/call", "seconds", "peak", "MiB"]
    assert [row.split()[0] for row in rows] == ["full", "last:1", "drtune:2"]
    assert re.fullmatch(r"full +1\.0000 +1\.0000 +7 +- +\d+\.\d{3} +\d+\.\d{2}", rows[0])
    assert len({len(line) for line in text.splitlines()}) == 1


def batches(problem: plainloop.Problem, count: int) -> list[Tensor]:
    return [torch.randn(problem.latents.shape, dtype=torch.float64) for _ in range(count)]


def test_the_variance_is_that_of_the_batches() -> None:
    problem = make()
    noises = batches(problem, 5)
    rows = compare(problem, ["last:1", "random:1"], latents=noises, generator_seed=3).rows
    for row, mode in zip(rows, ("full", "last:1", "random:1"), strict=True):
        own = []
        for number, noise in enumerate(noises):
            problem.clear()
            sample = prfl_fast.unrolled_sample(
                problem.net, problem.scheduler, noise, STEPS, conditioning={"c": problem.condition}, gradient=mode,
                generator=torch.Generator().manual_seed(3 + number),
            )  # fmt: skip
            problem.loss(sample.latents).backward()
            zero = torch.zeros(())
            grads = [p.grad if p.grad is not None else zero.expand_as(p) for p in problem.net.parameters()]
            own.append(torch.cat([g.flatten() for g in grads]).double())
        stacked = torch.stack(own)
        variance = stacked.var(0).sum()
        signal = stacked.mean(0).square().sum() - variance / 5
        # Sums of some hundred float64 numbers; the signal is a difference that loses two digits at most here.
        expected = float(variance / signal) if signal > 0 else math.inf
        assert row.variance == pytest.approx(expected, rel=1e-10)
        assert row.variance_per_call == pytest.approx(expected * row.network_calls, rel=1e-10)
        assert len(row.cosines) == 5 and row.cosine == pytest.approx(sum(row.cosines) / 5)
        assert row.norm_ratio == pytest.approx(sum(row.norm_ratios) / 5)
    assert rows[1].variance != rows[2].variance


def test_one_batch_many_times_has_the_variance_of_the_draws_alone() -> None:
    problem = make()
    noise = problem.latents.detach()
    rows = compare(problem, ["last:1", "random:1", "random"], latents=[noise] * 4).rows
    # A difference of equal numbers in float64, over the number itself.
    assert rows[0].variance < 1e-13 and rows[1].variance < 1e-13
    assert rows[2].variance > 1e-3
    assert rows[3].network_calls != int(rows[3].network_calls) or len(set(rows[3].cosines)) > 1
    assert all(row["variance_per_call"] >= 0 for row in GradientComparison(rows).to_dicts())


def test_a_single_batch_has_no_variance() -> None:
    (row, _) = compare(make(), ["last:1"]).rows
    assert math.isnan(row.variance) and math.isnan(row.variance_per_call)


@pytest.mark.parametrize("latents", [[], [1.0], "noise"])
def test_latents_that_are_none(latents: Any) -> None:
    with pytest.raises(TypeError, match="latents: expected a tensor or a sequence of tensors"):
        compare(make(), ["last:1"], latents=latents)


def test_the_picture(tmp_path: Path) -> None:
    problem = make()
    near = [problem.latents.detach() + 0.01 * noise for noise in batches(problem, 3)]  # the mean stands out
    svg = "{http://www.w3.org/2000/svg}"
    for latents, panels in ((problem.latents, 3), (near, 4)):
        path = tmp_path / "gradients.svg"
        compare(problem, ["last:1", "drtune:2"], latents=latents).plot(path)
        root = ElementTree.parse(path).getroot()
        assert root.tag == f"{svg}svg"
        texts = [element.text for element in root.iter(f"{svg}text")]
        assert texts.count("last:1") == texts.count("full") == panels
        assert ("relative variance times network calls" in texts) == (panels == 4)
        dots = [element for element in root.iter(f"{svg}circle") if "one" in element.get("class", "")]
        # A dot a batch for cosine and norm ratio, one for the calls and one for the variance.
        assert len(dots) == (3 if panels == 3 else 3 + 3 + 1 + 1)


def test_a_variance_that_is_not_finite_has_no_place_in_the_picture(tmp_path: Path) -> None:
    row = GradientRow("full", 1.0, 1.0, 7, 0.1, 8, 2.0, (1.0, 1.0), (1.0, 1.0))
    lost = GradientRow("random", 0.1, 0.3, 4.5, 0.1, 8, math.inf, (0.1, 0.2), (0.3, 0.3))
    comparison = GradientComparison((row, lost))
    comparison.plot(tmp_path / "gradients.svg")
    text = (tmp_path / "gradients.svg").read_text()
    assert text.count(">random</text>") == 3 and text.count(">full</text>") == 4
    assert re.search(r"^random +0\.1000 +0\.3000 +4\.5 +inf ", str(comparison), re.MULTILINE)
