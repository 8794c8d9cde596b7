"""What lives beside each network call of a chain, which runs on fake tensors with stand-ins for its calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

from prfl_fast.memory.trace import LiveBytes
from prfl_fast.models.base import Adapter


@dataclass(frozen=True, eq=False)
class Kind:
    """A call as the network sees it. ``x`` and the tensors in the keywords are fake; ``trained``: its parameters are in
    the graph."""

    network: int
    x: Tensor
    timestep: Tensor
    conditioning: Mapping[str, Any]
    overrides: Mapping[str, Any] | None
    trained: bool
    differentiable: bool


@dataclass(frozen=True)
class Event:
    """A call's ``"forward"``, the run of it ``"again"`` in a backward, or its ``"backward"``: bytes that live then, and
    the chain's peak since the event before; ``held``: gradients that the backward's caller holds until it is over."""

    what: str
    kind: Kind
    step: int
    live: int
    peak: int


class Observer:
    """Collects the events of one chain."""

    def __init__(self, live: LiveBytes) -> None:
        self._live = live
        self._kinds: dict[Any, Kind] = {}
        self.events: list[Event] = []

    def note(self, what: str, kind: Kind, step: int) -> None:
        """An event happens now."""
        live, peak = self._live.current, self._live.peak
        self._live.peak = live
        self.events.append(Event(what, kind, step, live, peak))

    def kind(self, made: Kind) -> Kind:
        """The first call of this kind."""
        tensors = [made.x, *_tensors(made.conditioning), *_tensors(made.overrides)]
        looks = tuple((tuple(t.shape), t.dtype, t.requires_grad) for t in tensors)
        key = (made.network, made.trained, made.differentiable, looks)
        return self._kinds.setdefault(key, made)


class StandInCall:
    """Looks like a network's adapter to the chain: a prediction that depends on what the real one depends on."""

    network = None

    def __init__(self, network: int, step: int, adapter: Adapter, dtype: torch.dtype, observer: Observer) -> None:
        self._network, self._step, self._adapter, self._dtype = network, step, adapter, dtype
        self._observer = observer

    def module(self) -> nn.Module | None:
        return self._adapter.module()

    def blocks(self) -> list[tuple[str, nn.Module]]:
        return []

    def __call__(
        self, x: Tensor, timestep: Tensor, conditioning: Mapping[str, Any], overrides: Mapping[str, Any] | None
    ) -> Tensor:
        module = self.module()
        trained = module is not None and any(p.requires_grad for p in module.parameters())
        given = [t for t in (x, *_tensors(conditioning), *_tensors(overrides)) if t.is_floating_point()]
        differentiable = torch.is_grad_enabled() and (trained or any(t.requires_grad for t in given))
        again = torch._C._current_graph_task_id() != -1
        with _disable_current_modes():  # what is made for the record does not count
            seen = (_like(x), timestep, _likes(conditioning), _likes(overrides))
            kind = self._observer.kind(Kind(self._network, *seen, trained, differentiable))
        self._observer.note("again" if again else "forward", kind, self._step)
        if trained and torch.is_grad_enabled():
            given.append(x.new_empty((), dtype=torch.float32).requires_grad_())

        def backward() -> None:
            self._observer.note("backward", kind, self._step)

        made: Tensor = _Prediction.apply(backward, self._dtype, *given)  # type: ignore[no-untyped-call]
        return made


def stand_in_call(network: int, step: int, adapter: Adapter, dtype: torch.dtype, observer: Observer) -> Adapter:
    """What a chain can call in the adapter's place."""
    # The chain asks an adapter for these things only.
    return cast(Adapter, StandInCall(network, step, adapter, dtype, observer))


class _Prediction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, moment: Callable[[], None], dtype: torch.dtype, x: Tensor, *others: Tensor) -> Tensor:
        ctx.moment = moment
        ctx.save_for_backward(x)  # a checkpoint in which nothing is saved lets go of its input
        ctx.others = [(t.shape, t.dtype, t.new_empty(0)) for t in others]
        return torch.empty_like(x, dtype=dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        (x,) = ctx.saved_tensors
        ctx.moment()
        wanted = ctx.needs_input_grad[2:]
        made = [seed.new_empty(shape, dtype=dtype) for shape, dtype, seed in ctx.others]
        into = [torch.empty_like(x), *made]
        return (None, None, *(g if wants else None for g, wants in zip(into, wanted, strict=True)))


def _tensors(keywords: Mapping[str, Any] | None) -> list[Tensor]:
    return [t for t in tree_leaves(dict(keywords or {})) if isinstance(t, Tensor)]


def _like(tensor: Tensor) -> Tensor:
    """Another tensor that looks the same; integers and masks themselves, for their values may matter."""
    if not tensor.is_floating_point():
        return tensor
    return torch.empty_like(tensor.detach()).requires_grad_(tensor.requires_grad and torch.is_grad_enabled())


def _likes(keywords: Mapping[str, Any] | None) -> Any:
    return None if keywords is None else tree_map_only(Tensor, _like, dict(keywords))
