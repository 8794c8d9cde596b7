from __future__ import annotations

import json
import pickle

import pytest
import torch

from prfl_fast.memory.budget import parse_budget
from prfl_fast.memory.plan import Alternative, InfeasibleBudget, MemoryPlan, choose_plan

WAYS = (Alternative("call", True, 3000), Alternative("call", False, 2500), Alternative("blocks", True, 1200))
CPU = torch.device("cpu")


def test_without_a_budget_whole_calls_are_recomputed_and_the_last_graph_is_kept() -> None:
    assert choose_plan(None) == MemoryPlan("call", True, None, None, ())
    assert choose_plan(None, WAYS) == choose_plan(None)


@pytest.mark.parametrize(("budget", "index"), [(10**9, 0), (3000, 0), (2999, 1), (2500, 1), (2499, 2), (1200, 2)])
def test_the_fastest_that_fits_is_chosen_and_no_further_one_is_looked_at(budget: int, index: int) -> None:
    drawn = []
    plan = choose_plan(budget, (drawn.append(way) or way for way in WAYS))
    assert (plan.recompute, plan.keep_last_call) == (WAYS[index].recompute, WAYS[index].keep_last_call)
    assert plan.predicted_peak_bytes == WAYS[index].peak_bytes <= budget == plan.budget_bytes
    assert plan.alternatives == WAYS[: index + 1] == tuple(drawn)


@pytest.mark.parametrize("budget", [1, 1199])
def test_the_least_bytes_of_an_infeasible_budget_are_feasible(budget: int) -> None:
    with pytest.raises(InfeasibleBudget, match=rf"memory_budget: .*\b{budget} bytes.*1200 bytes") as caught:
        choose_plan(budget, WAYS)
    assert caught.value.least_bytes == 1200
    assert choose_plan(caught.value.least_bytes, WAYS).predicted_peak_bytes == 1200
    again = pickle.loads(pickle.dumps(caught.value))
    assert (again.least_bytes, str(again)) == (1200, str(caught.value))


def test_json_and_text() -> None:
    for plan in (MemoryPlan(), choose_plan(2600, WAYS), choose_plan(3 * 2**30, WAYS)):
        assert MemoryPlan.from_json(plan.to_json()) == plan
        assert json.loads(plan.to_json())["recompute"] == plan.recompute
    assert "3.00 GiB" in str(choose_plan(3 * 2**30, WAYS))
    assert "blocks, last call kept" in str(choose_plan(1500, WAYS))
    assert "1.17 KiB" in str(choose_plan(1500, WAYS))
    with pytest.raises(ValueError, match="text"):
        MemoryPlan.from_json('{"something": 1}')
    with pytest.raises(ValueError, match="text"):
        MemoryPlan.from_json("[1]")


def test_a_plan_refuses_what_it_does_not_know() -> None:
    with pytest.raises(ValueError, match="recompute: expected one of 'call', 'blocks', 'planned', got 'block'"):
        MemoryPlan("block")
    with pytest.raises(TypeError, match="keep_last_call"):
        MemoryPlan("call", 1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="alternatives"):
        choose_plan(5, ())


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (1, 1),
        (12345678901, 12345678901),
        ("17B", 17),
        ("60GiB", 60 * 2**30),
        ("64GB", 64 * 10**9),
        (" 1.5 kib ", 1536),
        ("2MB", 2 * 10**6),
        ("3mib", 3 * 2**20),
        ("0.5TiB", 2**39),
        ("1TB", 10**12),
    ],
)
def test_budgets(given: str | int, expected: int) -> None:
    assert parse_budget(given, CPU) == expected


def test_a_fraction_is_one_of_the_machines_memory() -> None:
    total = parse_budget(1.0, CPU)
    with open("/proc/meminfo") as file:
        kib = int(next(line for line in file if line.startswith("MemTotal")).split()[1])
    # The kernel counts its own reserved pages in neither; both are whole pages.
    assert abs(total - kib * 1024) <= 0.01 * total
    assert parse_budget(0.25, CPU) == total // 4


@pytest.mark.parametrize(
    "given",
    [0, -5, 0.0, 1.5, -0.1, float("nan"), float("inf"), "60", "GiB", "6 GiBs", "-1GB", "0GB", "60iB", "", "50%", "٣GB"],
)
def test_bad_budgets_are_named(given: str | int | float) -> None:
    with pytest.raises(ValueError, match=r"^memory_budget: expected"):
        parse_budget(given, CPU)


@pytest.mark.parametrize("given", [True, None, [1], torch.tensor(5)])
def test_bad_types_of_budgets_are_named(given: object) -> None:
    with pytest.raises(TypeError, match=r"^memory_budget: expected"):
        parse_budget(given, CPU)  # type: ignore[arg-type]


def test_a_fraction_of_an_unknown_device_asks_for_bytes() -> None:
    with pytest.raises(ValueError, match=r"memory_budget: the size of meta"):
        parse_budget(0.5, torch.device("meta"))
    assert parse_budget("1KiB", torch.device("meta")) == 1024
