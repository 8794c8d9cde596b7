"""Solver step, forward and transpose: each backend beside plain torch and beside a plain copy of the same bytes.

    python benchmarks/solver_step.py --output benchmarks/results/solver_step.json

The step is a third-order multistep one with guidance on float32 latents and bfloat16 network outputs (UniPC or DPM++ on
a large video model). No time is reported for a backend whose results are not the reference's.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import prfl_fast
from prfl_fast import ops
from prfl_fast.ops import StepCoefficients, solver_step

# Latents [B, C, F, H, W] of Wan 2.1 at 81 frames; the last one is for a CPU.
SHAPES = {"720p": (1, 16, 21, 90, 160), "480p": (1, 16, 21, 60, 104), "small": (1, 16, 5, 30, 52)}

# x' and the newest history entry are computed, the others are handed on.
COEFFICIENTS = StepCoefficients(
    A=((0.9731, 0.1417, -0.0613), (1.0313, 0.0, 0.0), (0.0, 1.0, 0.0)), B=(-0.2519, -0.8871, 0.0), C=((), (), ())
)
GUIDANCE = 5.0


def bytes_moved(elements: int, *, backward: bool) -> int:
    """Every tensor once. Forward: three entries and two outputs read; two entries and x' in bfloat16 written.
    Transpose: cotangents of those results read; gradients of three entries and two outputs written."""
    state, output = 4, 2
    if backward:
        return elements * ((2 * state + output) + (3 * state + 2 * output))
    return elements * ((3 * state + 2 * output) + (2 * state + output))


def times(run: Callable[[], object], device: torch.device, seconds: float) -> list[float]:
    """Seconds of single runs, for about ``seconds``, after a warm-up."""
    for _ in range(3):
        run()
    measured: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(measured) < 5:
        if device.type == "cuda":
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            stop.record()
            stop.synchronize()
            measured.append(start.elapsed_time(stop) / 1e3)
        else:
            began = time.perf_counter()
            run()
            measured.append(time.perf_counter() - began)
    return measured


def summary(measured: list[float]) -> dict[str, float]:
    """Median, p20 and p80, in microseconds."""
    cuts = statistics.quantiles(measured, n=10)
    median = statistics.median(measured)
    return {"median_us": median * 1e6, "p20_us": cuts[1] * 1e6, "p80_us": cuts[7] * 1e6, "runs": len(measured)}


def copy_speed(device: torch.device, moved: int, seconds: float) -> float:
    """Bytes per second, read and written, of a plain copy that moves as many bytes in all."""
    source = torch.zeros(moved // 8, device=device)
    target = torch.empty_like(source)
    return moved / statistics.median(times(lambda: target.copy_(source), device, seconds))


def draw(shape: tuple[int, ...], device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
    torch.manual_seed(0)
    state = [torch.randn(shape, device=device, requires_grad=True) for _ in range(3)]
    outputs = [torch.randn(shape, device=device).bfloat16().requires_grad_() for _ in range(2)]
    return state, outputs


def measure(name: str, shape: tuple[int, ...], device: torch.device, seconds: float) -> list[dict[str, Any]]:
    """One row per backend and direction."""
    state, outputs = draw(shape, device)
    cotangents = [torch.randn(shape, device=device) for _ in range(3)]
    cotangents.append(torch.randn(shape, device=device).bfloat16())

    def forward() -> tuple[Tensor, ...]:
        return solver_step(
            tuple(state), tuple(outputs), COEFFICIENTS, guidance_scale=GUIDANCE, model_dtype=torch.bfloat16
        )

    def gradients(results: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        pairs = [(r, g) for r, g in zip(results, cotangents, strict=True) if r.grad_fn is not None]
        ends, given = zip(*pairs, strict=True)
        return torch.autograd.grad(ends, [*state, *outputs], given, retain_graph=True)

    with ops.backend("reference"):
        expected = forward()
        expected_gradients = gradients(expected)
    rows = []
    elements = state[0].numel()
    copies = {
        backward: copy_speed(device, bytes_moved(elements, backward=backward), seconds) for backward in (False, True)
    }
    for backend in ("reference", "cpu") if device.type == "cpu" else ("reference", "triton", "cuda"):
        with ops.backend(backend):
            try:
                results = forward()
            except RuntimeError as error:
                rows.append({"shape": name, "backend": backend, "skipped": str(error)})
                continue
            wrong = difference([*results, *gradients(results)], [*expected, *expected_gradients])
            if wrong > 1:
                rows.append({"shape": name, "backend": backend, "wrong": f"{wrong:.3g} times the tolerance"})
                continue
            for backward in (False, True):
                with torch.set_grad_enabled(backward):
                    run = (lambda results=results: gradients(results)) if backward else forward
                    told = summary(times(run, device, seconds))
                speed = bytes_moved(elements, backward=backward) / (told["median_us"] / 1e6)
                rows.append(
                    {
                        "shape": name,
                        "backend": backend,
                        "direction": "backward" if backward else "forward",
                        **told,
                        "bytes": bytes_moved(elements, backward=backward),
                        "share_of_copy_speed": speed / copies[backward],
                        "error_over_tolerance": wrong,
                    }
                )
    return rows


def difference(actual: list[Tensor], expected: list[Tensor]) -> float:
    """Largest difference over what five roundings of sums of up to 60 may cost in the results' own dtype."""
    worst = 0.0
    for mine, theirs in zip(actual, expected, strict=True):
        tolerance = 5 * torch.finfo(mine.dtype).eps * 60
        worst = max(worst, float((mine.detach().double() - theirs.detach().double()).abs().max()) / tolerance)
    return worst


def environment(device: torch.device) -> dict[str, Any]:
    root = Path(__file__).parent.parent
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True).stdout.strip()
    told: dict[str, Any] = {
        "prfl_fast": prfl_fast.__version__,
        "commit": commit or "unknown",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
    }
    if device.type == "cuda":
        told |= {"device": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        told["driver"] = subprocess.run(query, capture_output=True, text=True).stdout.split()[:1]
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shapes", nargs="+", choices=[*SHAPES], default=["480p", "720p"])
    parser.add_argument("--seconds", type=float, default=1.0, help="per measurement")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    device = torch.device(options.device)
    rows = [row for name in options.shapes for row in measure(name, SHAPES[name], device, options.seconds)]
    report = json.dumps({"op": "solver_step", "environment": environment(device), "rows": rows}, indent=2)
    print(report)
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(report + "\n")


if __name__ == "__main__":
    main()
