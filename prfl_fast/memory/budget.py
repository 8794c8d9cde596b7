"""Byte budgets as users write them."""

from __future__ import annotations

import os
import re
from fractions import Fraction

import torch

_PATTERN = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(?:([KMGT])(I?))?B\s*", re.IGNORECASE)
_EXPECTED = "expected a size such as '60GiB' or '64GB', whole bytes from 1, or a fraction of the device in (0, 1]"


def parse_budget(memory_budget: str | int | float, device: torch.device) -> int:
    """The budget in bytes.

    Args:
        memory_budget: ``"60GiB"`` (binary), ``"64GB"`` (decimal), bytes as an int, or a float in (0, 1]: that fraction
            of the CUDA device's memory, on the CPU of the machine's physical memory.
        device: where the latents lie.

    Raises:
        TypeError, ValueError: anything else; the message begins with ``memory_budget:``.
    """
    if isinstance(memory_budget, bool) or not isinstance(memory_budget, (str, int, float)):
        raise TypeError(f"memory_budget: {_EXPECTED}, got {type(memory_budget).__name__}")
    if isinstance(memory_budget, float):
        if not 0 < memory_budget <= 1:
            raise ValueError(f"memory_budget: {_EXPECTED}, got {memory_budget!r}")
        return max(1, int(memory_budget * _total(device)))
    if isinstance(memory_budget, int):
        count = memory_budget
    else:
        match = _PATTERN.fullmatch(memory_budget)
        if match is None:
            raise ValueError(f"memory_budget: {_EXPECTED}, got {memory_budget!r}")
        power = " KMGT".index((match[2] or " ").upper())
        count = int(Fraction(match[1]) * (1024 if match[3] else 1000) ** power)  # rounded down, never up
    if count < 1:
        raise ValueError(f"memory_budget: {_EXPECTED}, got {memory_budget!r}")
    return count


def _total(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    names = getattr(os, "sysconf_names", {})
    if device.type == "cpu" and {"SC_PAGE_SIZE", "SC_PHYS_PAGES"} <= names.keys():
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    raise ValueError(f"memory_budget: the size of {device} can't be read here; expected bytes, not a fraction")
