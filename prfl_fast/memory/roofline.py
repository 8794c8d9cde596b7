"""Nanoseconds of traced operations: floating-point work over a device's rates, bytes over its copy rate."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from prfl_fast.memory.trace import tensors_in

_HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Work:
    """What operations compute and move.

    Attributes:
        product: FLOPs of matrix products and convolutions in half precision.
        attention: FLOPs of attention in half precision.
        wide: FLOPs of either in float32 or float64.
        moved: bytes that all other operations read and write.
    """

    product: int = 0
    attention: int = 0
    wide: int = 0
    moved: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.product + other.product,
            self.attention + other.attention,
            self.wide + other.wide,
            self.moved + other.moved,
        )

    def __sub__(self, other: Work) -> Work:
        return Work(
            self.product - other.product,
            self.attention - other.attention,
            self.wide - other.wide,
            self.moved - other.moved,
        )


@dataclass(frozen=True)
class Device:
    """Rates of a device.

    Attributes:
        product, attention, wide: FLOPs per second.
        copy: bytes per second.
        memory: bytes, nominal; 0: not known.
        source: where the rates are from.
    """

    name: str
    product: float
    attention: float
    wide: float
    copy: float
    memory: int
    source: str

    def nanoseconds(self, work: Work) -> int:
        """Time of the work, each kind at its own rate, one after the other; rounded up."""
        seconds = (
            work.product / self.product
            + work.attention / self.attention
            + work.wide / self.wide
            + work.moved / self.copy
        )
        return math.ceil(seconds * 1e9)


_TAKEN = "roofline: rates as measured or published for it"
_ESTIMATE = "roofline: an estimate, the vendor's peak numbers times the shares that an H200 reaches"
# Shares that an H200 reaches of its peaks (989 TFLOP/s and 4.8 TB/s).
_PRODUCT, _ATTENTION, _COPY = 790 / 989, 700 / 989, 4.3 / 4.8


def _estimated(name: str, half: float, wide: float, copy: float, gigabytes: int) -> Device:
    """From peaks in TFLOP/s and TB/s."""
    return Device(
        name, half * _PRODUCT * 1e12, half * _ATTENTION * 1e12, wide * _PRODUCT * 1e12, copy * _COPY * 1e12,
        gigabytes * 10**9, _ESTIMATE,
    )  # fmt: skip


DEVICES: Mapping[str, Device] = MappingProxyType(
    {
        device.name: device
        for device in (
            Device("h100", 680e12, 640e12, 67e12 * _PRODUCT, 2.9e12, 80 * 10**9, _TAKEN),
            Device("h200", 790e12, 700e12, 67e12 * _PRODUCT, 4.3e12, 141 * 10**9, _TAKEN),
            Device("a100", 255e12, 200e12, 19.5e12 * _PRODUCT, 1.7e12, 80 * 10**9, _TAKEN),
            _estimated("b200", 2250, 75, 8.0, 180),
            _estimated("rtx4090", 165, 82.6, 1.008, 24),
            Device("cpu", 5e11, 5e11, 5e11, 2e10, 0, "roofline: an estimate of some eight cores"),
        )
    }
)


def device_named(name: str) -> Device:
    """One of :data:`DEVICES`. Raises ValueError for another name."""
    if name not in DEVICES:
        raise ValueError(f"device: expected one of {', '.join(DEVICES)}, got {name!r}")
    return DEVICES[name]


@cache
def _flop_formulas() -> dict[Any, Any]:
    # Imported late: it brings triton where that is installed.
    from torch.utils.flop_counter import flop_registry

    return flop_registry


def work_of(func: Any, args: Any, kwargs: Any, result: Any) -> Work:
    """The work of one operation as a dispatch mode sees it; views have none."""
    kind = _kind(func)
    if kind == "view":
        return NO_WORK
    given, made = tensors_in((args, kwargs)), tensors_in(result)
    if kind == "glue":
        return Work(moved=sum(t.numel() * t.element_size() for t in (*given, *made)))
    half = bool(given) and given[0].dtype in _HALF
    if kind == "product":
        flops = int(_flop_formulas()[func._overloadpacket](*args, **kwargs, out_val=result))
        return Work(product=flops) if half else Work(wide=flops)
    flops = _attention_flops(func, given)
    return Work(attention=flops) if half else Work(wide=flops)


NO_WORK = Work()


@cache
def _kind(func: Any) -> str:
    name = str(func.name())
    if "attention" in name.lower():
        return "attention"
    if func._overloadpacket in _flop_formulas():
        return "product"
    returned = func._schema.returns
    is_view = bool(returned) and all(r.alias_info is not None and not r.alias_info.is_write for r in returned)
    return "view" if is_view or "detach" in name or ".empty" in name else "glue"


def _attention_flops(func: Any, given: list[Tensor]) -> int:
    """Two products forward, five backward (one of them the scores again)."""
    backward = "backward" in str(func.name())
    heads_first = str(func.name()).startswith("aten::")
    *_, q, k = [t for t in given if t.ndim == 4][: 3 if backward else 2]
    length = 2 if heads_first else 1
    queries, keys = q.shape[length], k.shape[length]
    return (10 if backward else 4) * q.shape[0] * q.shape[3 - length] * queries * keys * q.shape[3]
