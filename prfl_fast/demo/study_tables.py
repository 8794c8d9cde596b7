"""The study's plan, and its results as the tables that the report shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from statistics import mean, stdev
from typing import Any

from prfl_fast.demo.align import Arm
from prfl_fast.demo.sample import STEPS


@dataclass(frozen=True)
class Plan:
    """How long everything takes: processor seconds of an arm and of its tuning, updates of the other comparison.

    The pixel baseline has a grid of its own, larger and gentler: it is the first to be hacked.
    """

    arm_seconds: float = 60.0
    tuning_seconds: float = 40.0
    updates: int = 100
    seeds: tuple[int, ...] = (1, 2, 3)
    rates: tuple[float, ...] = (5e-5, 1e-4, 2e-4)
    flow_weights: tuple[float, ...] = (1.0, 3.0)
    pixel_rates: tuple[float, ...] = (5e-6, 1e-5, 2e-5, 5e-5, 1e-4)
    pixel_flow_weights: tuple[float, ...] = (3.0, 10.0)
    judged: int = 128

    def grid(self, arm: Arm) -> list[tuple[float, float]]:
        """Rates and flow-matching weights that are tried for ``arm``."""
        pixel = arm.reward == "pixel"
        rates = self.pixel_rates if pixel else self.rates
        return list(product(rates, self.pixel_flow_weights if pixel else self.flow_weights))


TINY_PLAN = Plan(
    arm_seconds=0.5, tuning_seconds=0.5, updates=1, seeds=(1,), rates=(1e-4,), pixel_rates=(1e-5,), judged=8
)


_HEAD = ["Updates", "Motion error", "Structure error", "Net movement", "Diversity", "Reward"]
_KEYS = ("updates", "motion_error", "structure_error", "net_move", "diversity", "reward")


def make_tables(
    tuning: list[dict[str, Any]],
    done: dict[str, list[dict[str, Any]]],
    references: dict[str, dict[str, float]],
    accuracies: list[dict[str, Any]],
    plan: Plan,
) -> list[dict[str, Any]]:
    """Tables of a study: ``{"title", "note", "head", "rows"}`` each.

    ``tuning`` and the lists of ``done`` hold one row a job, ``references`` the judges' means of mixture and base.
    """
    over = f"Mean and standard deviation over {len(plan.seeds)} training seeds, {plan.judged} judged clips each."

    def rows_of(table: str) -> dict[str, list[dict[str, Any]]]:
        groups: dict[str, list[dict[str, Any]]] = {}
        for row in done[table]:
            job = row["job"]
            name = job["arm"]["label"] if table != "backbone" else f"{job['backbone'].capitalize()} backbone"
            groups.setdefault(name, []).append(row)
        return groups

    before = [[name, "–", *(f"{means[key]:.3g}" for key in _KEYS[1:])] for name, means in references.items()]
    tables = []
    for table, note in (
        ("equal time", f"{plan.arm_seconds:.0f} s of one thread for each arm. {over}"),
        ("equal updates", f"{plan.updates} updates for each arm. {over}"),
        (
            "supervised",
            f"Where the reward looks along the full chain: at the end (late: the full chain as above),"
            f" after step 6 of {STEPS} (early), or 8 (middle). {plan.arm_seconds:.0f} s each. {over}",
        ),
        ("backbone", f"PRFL with a reward on pretrained and on random blocks; {plan.arm_seconds:.0f} s each. {over}"),
    ):
        groups = rows_of(table)
        wins = {name: _wins(rows, groups.get("RGB ReFL, last step", [])) for name, rows in groups.items()}
        with_wins = any(wins.values())
        head = ["Arm", *_HEAD, *(["Won against RGB ReFL"] if with_wins else [])]
        body = [
            [name, *(_spread([row[key] for row in rows]) for key in _KEYS), *([wins[name]] if with_wins else [])]
            for name, rows in groups.items()
        ]
        top = [[*row, *([""] if with_wins else [])] for row in before]
        tables.append({"title": table.capitalize(), "note": note, "head": head, "rows": [*top, *body]})
    tables.append(_accuracy_table(accuracies))
    tables.append(_tuning_table(tuning, plan))
    return tables


def _tuning_table(tuning: list[dict[str, Any]], plan: Plan) -> dict[str, Any]:
    rows = []
    for row in tuning:
        arm = row["job"]["arm"]
        best = min(other["total_error"] for other in tuning if other["job"]["arm"]["key"] == arm["key"])
        mark = "used above" if row["total_error"] == best else ""
        error = f"{row['total_error']:.3f}"
        rows.append([arm["label"], f"{arm['rate']:g}", f"{arm['flow_weight']:g}", row["updates"], error, mark])
    return {
        "title": "Tuning",
        "note": f"Every setting that was tried, {plan.tuning_seconds:.0f} s each, on a training seed and judged"
        " clips of its own. Error is motion error plus structure error.",
        "head": ["Arm", "Rate", "Flow-matching weight", "Updates", "Error", ""],
        "rows": rows,
    }


def _accuracy_table(accuracies: list[dict[str, Any]]) -> dict[str, Any]:
    sigmas = next(row["accuracy"]["sigma"] for row in accuracies if row["kind"] == "latent")
    rows = []
    for kind, name in (("latent", "Pretrained backbone"), ("random", "Random backbone")):
        each = [row["accuracy"]["accuracy"] for row in accuracies if row["kind"] == kind]
        rows.append([name, *(f"{mean(values):.3f}" for values in zip(*each, strict=True))])
    pixel = [row["accuracy"] for row in accuracies if row["kind"] == "pixel"]
    rows.append(["Pixel reward", f"{mean(pixel):.3f}", *[""] * (len(sigmas) - 1)])
    return {
        "title": "Accuracy of the rewards",
        "note": f"On held-out clips against noise level, mean of {len(pixel)} training seeds.",
        "head": ["Reward", *(f"{sigma:g}" for sigma in sigmas)],
        "rows": rows,
    }


def _wins(rows: list[dict[str, Any]], pixel: list[dict[str, Any]]) -> str:
    """Share of judged clips with the smaller total error, seed by seed, against the pixel baseline."""
    theirs = {row["job"]["seed"]: row["errors"] for row in pixel}
    if not theirs or rows is pixel:
        return ""
    shares = [
        mean((a < b) + 0.5 * (a == b) for a, b in zip(row["errors"], theirs[row["job"]["seed"]], strict=True))
        for row in rows
    ]
    return _spread(shares)


def _spread(values: Sequence[float]) -> str:
    middle = f"{mean(values):.3g}" if abs(mean(values)) < 1000 else f"{mean(values):.0f}"
    return f"{middle} ± {stdev(values):.2g}" if len(values) > 1 else middle


def as_text(table: dict[str, Any]) -> str:
    """A table for a terminal."""
    rows = [table["head"], *table["rows"]]
    widths = [max(len(str(row[column])) for row in rows) for column in range(len(table["head"]))]
    lines = ["  ".join(str(cell).ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(["", table["title"], table["note"], *lines])
