"""Capture and restore of a scheduler's run state: its attributes, with the latent-shaped tensors as open slots.

A snapshot is taken once per step. From then on putting the scheduler to the beginning of that step costs one walk
over its attributes, and which tensors fill the slots is free: the step becomes a function of them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from prfl_fast.solvers.private import is_scheduler

_SEQUENCES = (list, tuple, deque)


class _Node:
    """A value that must be rebuilt at each restore, because it holds a slot or can be changed in place."""


@dataclass(frozen=True)
class _Slot(_Node):
    index: int


@dataclass(frozen=True)
class _Items(_Node):
    kind: Any
    values: tuple[Any, ...]


@dataclass(frozen=True)
class _Mapping(_Node):
    kind: Any
    values: tuple[tuple[Any, Any], ...]


@dataclass(frozen=True)
class _Nested(_Node):
    scheduler: Any
    values: _Mapping


class Snapshot:
    """The run state of ``scheduler``; tensors for which ``is_slot`` holds become slots, in the order of the walk."""

    def __init__(self, scheduler: Any, is_slot: Callable[[Tensor], bool]) -> None:
        self._scheduler = scheduler
        self._is_slot = is_slot
        self._found: list[Tensor] = []
        self._root = _Mapping(dict, tuple((k, self._freeze(v)) for k, v in vars(scheduler).items()))
        self.num_slots = len(self._found)
        self._found = []

    def _freeze(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            if not self._is_slot(value):
                return value
            self._found.append(value)
            return _Slot(len(self._found) - 1)
        if type(value) in _SEQUENCES:
            return _Items(type(value), tuple(self._freeze(v) for v in value))
        if type(value) is dict:
            return _Mapping(dict, tuple((k, self._freeze(v)) for k, v in value.items()))
        if is_scheduler(value):
            nested = _Mapping(dict, tuple((k, self._freeze(v)) for k, v in vars(value).items()))
            return _Nested(value, nested)
        return value

    def restore(self, slots: Sequence[Tensor]) -> None:
        """Puts the scheduler back to this state, with ``slots`` for the latent-shaped tensors."""
        self._scheduler.__dict__ = _thaw(self._root, slots)

    def collect(self) -> tuple[Tensor, ...]:
        """The slots' tensors in the scheduler as it is now, which must be in a state of this form."""
        found: list[tuple[int, Tensor]] = []
        _gather(self._root, vars(self._scheduler), found)
        return tuple(tensor for _, tensor in sorted(found, key=lambda pair: pair[0]))

    def difference(self, other: Snapshot) -> set[str]:
        """Names of attributes that aren't slots and yet differ."""
        mine, theirs = dict(self._root.values), dict(other._root.values)
        names = {*mine, *theirs}
        return {n for n in names if n not in mine or n not in theirs or not _equal(mine[n], theirs[n])}


def _thaw(node: Any, slots: Sequence[Tensor]) -> Any:
    if not isinstance(node, _Node):
        return node
    if isinstance(node, _Slot):
        return slots[node.index]
    if isinstance(node, _Items):
        return node.kind([_thaw(v, slots) for v in node.values])
    if isinstance(node, _Nested):
        node.scheduler.__dict__ = _thaw(node.values, slots)
        return node.scheduler
    assert isinstance(node, _Mapping)
    return {k: _thaw(v, slots) for k, v in node.values}


def _gather(node: Any, value: Any, found: list[tuple[int, Tensor]]) -> None:
    if isinstance(node, _Slot):
        if not isinstance(value, Tensor):
            raise RuntimeError("the scheduler's run state depends on the values of the latents; expected a tensor")
        found.append((node.index, value))
    elif isinstance(node, _Items):
        for child, part in zip(node.values, value, strict=True):
            if isinstance(child, _Node):
                _gather(child, part, found)
    elif isinstance(node, _Mapping):
        for key, child in node.values:
            if isinstance(child, _Node):
                _gather(child, value[key], found)
    elif isinstance(node, _Nested):
        _gather(node.values, vars(value), found)


def _equal(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and _same_numbers(a, b)
    if isinstance(a, _Nested):
        return _equal(a.values, b.values)
    if isinstance(a, (_Items, tuple)):
        mine, theirs = (a.values, b.values) if isinstance(a, _Items) else (a, b)
        return len(mine) == len(theirs) and all(_equal(x, y) for x, y in zip(mine, theirs, strict=True))
    if isinstance(a, _Mapping):
        return _equal(a.values, b.values)
    if hasattr(a, "shape"):
        return a.shape == b.shape and _same_numbers(a, b)
    return bool(a == b) or bool(a != a and b != b)


def _same_numbers(a: Any, b: Any) -> bool:
    """Elementwise equal, NaN (an unused end of a schedule) being equal to itself."""
    return bool(((a == b) | ((a != a) & (b != b))).all())
