"""Rates of the device at hand: measured once, then read from the cache."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

from prfl_fast._env import cache_directory
from prfl_fast.memory.roofline import Device

_ROUNDS = 5
_RATES = ("product", "attention", "wide", "copy")


@cache
def measured_device(device: torch.device) -> Device:
    """The device with rates measured on it, cached on disk by its name and torch's version.

    Takes some tenths of a second the first time. Without a cache directory, or where it can't be written, every process
    measures again.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    folder = cache_directory()
    file = re.sub(r"[^A-Za-z0-9.]+", "-", f"rates-{name}-{torch.__version__}") + ".json"
    path = None if folder is None else folder / file
    known = None if path is None else _read(path)
    if known is None:
        known = measure(device)
        if path is not None:
            _write(path, known)
    memory = int(torch.cuda.get_device_properties(device).total_memory) if device.type == "cuda" else 0
    product, attention, wide, copy = (known[rate] for rate in _RATES)
    return Device(name, product, attention, wide, copy, memory, "measured on this device")


def measure(device: torch.device, size: int = 4096, tokens: int = 8192) -> dict[str, float]:
    """FLOPs per second of products, attention and float32 products, and bytes per second of a copy.

    Args:
        device: any.
        size: of the square matrices.
        tokens: of the attention, with 16 heads of 128.
    """
    half = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    q = torch.randn(1, 16, tokens, 128, device=device, dtype=torch.bfloat16)
    wide = half.float()
    into = torch.empty_like(wide)
    with torch.no_grad():
        return {
            "product": 2 * size**3 / _seconds(lambda: half @ half, device),
            "attention": 4 * 16 * tokens**2 * 128
            / _seconds(lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q), device),
            "wide": 2 * size**3 / _seconds(lambda: wide @ wide, device),
            "copy": 2 * into.numel() * into.element_size() / _seconds(lambda: into.copy_(wide), device),
        }  # fmt: skip


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    """Least time of some rounds."""
    times = []
    for _ in range(_ROUNDS):
        _wait(device)
        start = time.perf_counter()
        run()
        _wait(device)
        times.append(time.perf_counter() - start)
    return min(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _read(path: Path) -> dict[str, float] | None:
    """The cached rates; None where there are none, or others than these."""
    try:
        known = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    if not isinstance(known, dict):
        return None
    rates = {rate: known.get(rate) for rate in _RATES}
    fine = all(isinstance(value, float) and math.isfinite(value) and value > 0 for value in rates.values())
    return {rate: float(value) for rate, value in rates.items() if value is not None} if fine else None


def _write(path: Path, rates: dict[str, float]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(f".{time.time_ns()}")
        beside.write_text(json.dumps(rates))
        beside.replace(path)
    except OSError:
        return  # a cache that can't be written costs time only
