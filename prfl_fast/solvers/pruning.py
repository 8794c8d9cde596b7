"""What a table need not carry: history that no later step reads, and history that is kept twice."""

from __future__ import annotations

from collections.abc import Sequence

from prfl_fast.ops import StepCoefficients


def prune(steps: Sequence[StepCoefficients]) -> list[StepCoefficients]:
    """The same latents from fewer tensors. Entry 0, the latents, always stays, and is the only entry at the end."""
    return _drop_unread(_merge_twins(steps))


def _merge_twins(steps: Sequence[StepCoefficients]) -> list[StepCoefficients]:
    """Entries with equal rows hold equal tensors; entry 0 is no one's twin, because a mask changes it alone."""
    merged = []
    home = list(range(steps[0].num_inputs))  # entry before the step -> entry that stands for it
    for step in steps:
        width = max(home) + 1
        columns = [[k for k, place in enumerate(home) if place == j] for j in range(width)]
        rows = [tuple(sum(row[k] for k in column) for column in columns) for row in step.A]
        first: dict[object, int] = {}
        keep: list[int] = []
        home = []
        for k, row in enumerate(zip(rows, step.B, step.C, strict=True)):
            twin = first.get(row)
            if twin is None:
                twin = len(keep)
                keep.append(k)
                if k:
                    first[row] = twin
            home.append(twin)
        merged.append(_rows(StepCoefficients(tuple(rows), step.B, step.C), keep))
    return merged


def _drop_unread(steps: Sequence[StepCoefficients]) -> list[StepCoefficients]:
    pruned: list[StepCoefficients] = []
    keep = [0]
    for step in reversed(steps):
        left = _rows(step, keep)
        keep = [j for j in range(step.num_inputs) if j == 0 or any(row[j] != 0 for row in left.A)]
        pruned.append(StepCoefficients(tuple(tuple(row[j] for j in keep) for row in left.A), left.B, left.C))
    return pruned[::-1]


def _rows(step: StepCoefficients, keep: Sequence[int]) -> StepCoefficients:
    return StepCoefficients(
        tuple(step.A[k] for k in keep), tuple(step.B[k] for k in keep), tuple(step.C[k] for k in keep)
    )
