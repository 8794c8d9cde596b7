"""Run as a program: the solver step's cases on a library that has the CUDA source in the place of the CPU code.

Arguments: the library, and ``results`` or ``traffic``, and names of cases (none: all). Prints a line for each case.
"""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from solverstepcases import BF16, BFLOAT16_CASES, CASES, F64, HALF, Case, Problem, check, unaligned
from torch import Tensor

ALL = {**CASES, **BFLOAT16_CASES}

# Two blocks and a bit; 2,051 elements leave three for the last thread.
TRAFFIC = {
    "plain": Case(shape=(2, 4096), sizes=(3, 2, 1)),
    "guided": Case(shape=(2, 4096), guided=True),
    "masked": Case(shape=(2, 4096), mask=(2, 4096)),
    "guided and masked": Case(shape=(2, 4096), guided=True, mask=(2, 4096)),
    "with a copy": Case(shape=(2, 4096), output_dtype=BF16, guided=True, mask=(2, 4096), copy=BF16),
    "half, odd": Case(shape=(7, 293), output_dtype=HALF, guided=True, mask=(7, 293), copy=HALF),
    "odd": Case(shape=(7, 293), sizes=(2, 3, 0)),
    "broadcast mask": Case(shape=(2, 3, 700), mask=(2, 1, 700), guided=True, copy=BF16),
    "unaligned": Case(shape=(2, 1027), layout=unaligned, guided=True, mask=(2, 1027), copy=HALF),
    "many rows": Case(shape=(2051,), sizes=(6, 5, 2), output_dtype=BF16),
    "float64": Case(shape=(2051,), dtype=F64, output_dtype=F64, noise_dtype=F64, guided=True, mask=(2051,)),
}


@dataclass(frozen=True)
class Traffic:
    """One launch. ``expected_*``: each tensor once, a byte of mask for each element."""

    name: str
    transposed: bool
    tensors: int
    expected_load: int
    expected_store: int
    loaded: int
    stored: int
    load_sectors: int
    store_sectors: int


def bytes_of(tensors: Sequence[Tensor | None]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


def traffic(library: ctypes.CDLL, name: str, case: Case) -> list[Traffic]:
    """The step and its transpose, one launch each."""

    def counted() -> list[int]:
        counts = (ctypes.c_uint64 * 5)()
        library.solver_step_traffic(counts)
        return list(counts)

    def launched(before: int, transposed: bool, read: Sequence[Tensor], written: Sequence[Tensor | None]) -> Traffic:
        calls, *counts = counted()
        assert calls == before + 1, "one launch"
        mask = 0 if problem.mask is None else read[0].numel()
        tensors = len(read) + len(written) + (mask > 0)
        return Traffic(name, transposed, tensors, bytes_of(read) + mask, bytes_of(written), *counts)

    problem = Problem.draw(case)
    (before, *_) = counted()
    results = problem.run("cpu")
    step = launched(before, False, problem.tensors, results)
    gradients = problem.gradients(results)
    return [step, launched(before + 1, True, problem.cotangents, gradients)]


def main(library: str, what: str, *names: str) -> None:
    torch.ops.load_library(library)
    for number, (name, case) in enumerate((TRAFFIC if what == "traffic" else ALL).items()):
        if names and name not in names:
            continue
        torch.manual_seed(number)
        if what == "traffic":
            for launch in traffic(ctypes.CDLL(library), name, case):
                print(json.dumps(asdict(launch)))
        else:
            try:
                check(case, "cpu")
            except AssertionError as error:
                raise AssertionError(f"case {name!r}") from error
            print("passed", name)


if __name__ == "__main__":
    main(*sys.argv[1:])
