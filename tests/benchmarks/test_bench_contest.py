"""Contests: a wrong contestant gets no time, an absent one its reason, and what is right is right."""

from __future__ import annotations

import dataclasses
import math
import shutil
from typing import Any

import pytest
import torch
from torch import Tensor

from prfl_fast import SolverTable
from prfl_fast.benchmarks import bench_query_pool, bench_solver_step
from prfl_fast.benchmarks.contest import AbsentError, Contest, Contestant, Forward
from prfl_fast.benchmarks.registry import Row, Setting

CPU = torch.device("cpu")
TINY = Setting("cpu", seconds=1e-4, tiny=True)


def solver_contest() -> Contest:
    return bench_solver_step.contest("odd", (3, 2, 5, 7), CPU, tiny=True)


def pool_contest(dtype: torch.dtype = torch.float32) -> Contest:
    return bench_query_pool.contest("odd", (3, 67, 40), dtype, CPU)


CONTESTS = {"solver_step": solver_contest, "query_pool": pool_contest}


def alone(contest: Contest, **changes: Any) -> list[Row]:
    """Rows of our reference with something changed."""
    first = dataclasses.replace(contest.contestants[0], **changes)
    return list(dataclasses.replace(contest, contestants=(first,)).rows(TINY))


@pytest.mark.parametrize("name", list(CONTESTS))
def test_all_that_are_here_are_right(name: str) -> None:
    rows = list(CONTESTS[name]().rows(TINY))
    assert not [row for row in rows if "wrong" in row]
    for row in rows:
        assert row["op"] == name and row["shape"] == "odd" and "dtype" in row and ("backend" in row) != ("peer" in row)
        if "absent" in row:
            assert "median_us" not in row
            continue
        assert row["direction"] in ("forward", "backward") and row["runs"] >= 5
        assert 0 < row["min_us"] <= row["p20_us"] <= row["median_us"] <= row["p80_us"]
        assert row["error_over_tolerance"] <= 1
        speed = row["bytes"] / row["median_us"] * 1e6 / row["copy_bytes_per_second"]
        assert math.isclose(row["share_of_copy_speed"], speed, rel_tol=1e-2, abs_tol=1e-4)
    timed = [row.get("backend") or row["peer"] for row in rows if row.get("direction") == "forward"]
    assert {"solver_step": {"reference", "torch"}, "query_pool": {"reference", "nn.MultiheadAttention"}}[name] <= {
        *timed
    }


def test_bfloat16_tokens_as_on_a_gpu() -> None:
    rows = list(pool_contest(torch.bfloat16).rows(TINY))
    assert not [row for row in rows if "wrong" in row]


@pytest.mark.parametrize("name", list(CONTESTS))
def test_one_element_off_is_wrong_in_any_result_or_gradient(name: str) -> None:
    contest = CONTESTS[name]()
    ours = contest.contestants[0]
    results = ours.prepare()()
    tensors = [t.detach().clone() for t in (*results, *contest.gradients(results))]
    assert contest.error(ours, tensors) <= 1
    for index, tensor in enumerate(tensors):
        scale = contest.scales[index]
        if scale == 0:
            continue
        eps = max(torch.finfo(tensor.dtype).eps, torch.finfo(ours.computes_in).eps)
        broken = [t.clone() for t in tensors]
        # Thrice the tolerance, in one element.
        broken[index].view(-1)[-1] += 3 * ours.roundings * eps * scale
        assert contest.error(ours, broken) > 1, index
        broken[index].view(-1)[-1] = torch.nan
        assert contest.error(ours, broken) == math.inf


def twice(forward: Forward) -> Forward:
    return lambda: tuple(2 * result for result in forward())


def test_no_time_of_a_wrong_contestant() -> None:
    contest = solver_contest()
    right = contest.contestants[0].prepare()
    (row,) = alone(contest, prepare=lambda: twice(right))
    assert "times the tolerance" in row["wrong"] and not {"median_us", "direction"} & row.keys()


def test_a_wrong_gradient_behind_a_right_result_is_wrong() -> None:
    contest = solver_contest()
    right = contest.contestants[0].prepare()

    def forward() -> tuple[Tensor, ...]:
        return tuple(2 * r - r.detach() for r in right())  # the same values, twice the gradient

    (row,) = alone(contest, prepare=lambda: forward)
    assert "wrong" in row


def test_absent_contestants_tell_why() -> None:
    def refuse() -> Forward:
        raise AbsentError("it is elsewhere")

    def too_large() -> Forward:
        raise torch.OutOfMemoryError("Tried to allocate 9 GiB\nmore")

    contest = solver_contest()
    assert alone(contest, prepare=refuse)[0]["absent"] == "it is elsewhere"
    assert alone(contest, prepare=too_large)[0]["absent"] == "out of memory: Tried to allocate 9 GiB"
    backends = {row["backend"]: row.get("absent") for row in contest.rows(TINY) if "backend" in row}
    assert backends["cuda"] == "the tensors are on cpu" and backends["reference"] is None


def test_a_compiler_that_does_not_work_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    def compiled(function: Any) -> Any:
        def run(*arguments: Any) -> Any:
            raise torch._dynamo.exc.TorchDynamoException("no compiler\nhere")

        return run

    monkeypatch.setattr(torch, "compile", compiled)
    contest = solver_contest()
    with pytest.raises(AbsentError, match="torch.compile does not work here: no compiler$"):
        bench_solver_step.compiled(contest.inputs[:4], contest.inputs[4:], tiny=False)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_the_compiled_peer_is_right() -> None:
    contest = bench_solver_step.contest("odd", (3, 2, 5, 7), CPU, tiny=False)
    (peer,) = (c for c in contest.contestants if c.name == "torch.compile")
    rows = list(dataclasses.replace(contest, contestants=(peer,)).rows(TINY))
    assert [row.get("direction") for row in rows] == ["forward", "backward"], rows


def test_the_step_is_the_schedulers() -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.UniPCMultistepScheduler(**bench_solver_step.SCHEDULER)
    table = SolverTable.from_scheduler(scheduler, bench_solver_step.STEPS)
    probed, written = table.coefficients[bench_solver_step.STEP], bench_solver_step.COEFFICIENTS
    # Both are float64 of the same probe; another torch may sum in another order.
    assert torch.allclose(torch.tensor(probed.A).double(), torch.tensor(written.A).double(), rtol=1e-6, atol=1e-9)
    assert torch.allclose(torch.tensor(probed.B).double(), torch.tensor(written.B).double(), rtol=1e-6, atol=1e-9)
    computed = [i for i, row in enumerate(written.A) if written.B[i] or sorted(row) != [0.0, 0.0, 0.0, 1.0]]
    assert tuple(computed) == bench_solver_step.COMPUTED


def test_bytes_are_those_of_the_tensors() -> None:
    contest = solver_contest()
    results = contest.contestants[0].prepare()()
    touched = sum(t.nbytes for t in (*contest.inputs, *results))
    assert contest.moved == {"forward": touched, "backward": touched}
    pool = pool_contest()
    x, _, in_weight, _, out_weight, _ = pool.inputs
    once = x.nbytes + in_weight.nbytes + out_weight.nbytes
    assert pool.moved == {"forward": once, "backward": 2 * once}


def test_contestant_defaults_to_a_peer() -> None:
    assert Contestant("x", lambda: lambda: (), 1).backend is None
