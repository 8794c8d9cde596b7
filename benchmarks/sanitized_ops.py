"""A small run of every CUDA kernel, to be watched by compute-sanitizer: the tests' cases, results and gradients.

    compute-sanitizer --tool memcheck python benchmarks/sanitized_ops.py

Outputs are not poisoned beforehand here as they are in the tests: that would write them, and hide from initcheck what
a kernel leaves out.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import solverstepcases
import torch


def solver_step(backend: str, device: str) -> int:
    cases = [*solverstepcases.CASES.values(), *solverstepcases.BFLOAT16_CASES.values()]
    for case in cases:
        solverstepcases.check(case, backend, device)
    return len(cases)


RUNS: dict[str, Callable[[str, str], int]] = {"solver_step": solver_step}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    device = parser.parse_args().device
    torch.manual_seed(0)
    solverstepcases.poisoned = contextlib.nullcontext
    total = 0
    for name, run in RUNS.items():
        count = run(device, device)  # the compiled backend has its device's name
        if device == "cuda":
            torch.cuda.synchronize()
        print(f"{name}: {count} cases", flush=True)
        total += count
    print(f"{total} cases hold")


if __name__ == "__main__":
    main()
