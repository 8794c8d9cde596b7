"""A byte budget becomes a memory plan: live bytes are counted on fake tensors, in parts.

Three things are traced, and put together: each different block alone, a network call with stand-ins for its blocks, and
the chain with stand-ins for its calls. So the price grows neither with the number of steps nor with that of the blocks.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

from prfl_fast.memory.budget import parse_budget
from prfl_fast.memory.call_cost import BlockTraces, CallCost, stand_ins, trace_call
from prfl_fast.memory.choice import Choice, Forward, Keeps, KeptCall, Moments, Walk, choose, peak_of
from prfl_fast.memory.keeps import ALL, NOTHING
from prfl_fast.memory.measured import measured_device
from prfl_fast.memory.plan import Alternative, InfeasibleBudget, MemoryPlan, PlannedBlock
from prfl_fast.memory.pretend import Pretence, UntraceableError, real_leaf, tracing
from prfl_fast.memory.roofline import Device, device_named
from prfl_fast.memory.trace import LiveBytes, storage_bytes
from prfl_fast.models.base import Adapter
from prfl_fast.models.generic import CallableAdapter
from prfl_fast.sampling.calls import Caller, frozen
from prfl_fast.sampling.chain import run_chain
from prfl_fast.sampling.modes import GeneratorLike
from prfl_fast.sampling.moments import Event, Kind, Observer, stand_in_call
from prfl_fast.sampling.request import Request
from prfl_fast.sampling.run import Run
from prfl_fast.sampling.steps import run_steps

_UNIFORM = {"call": ALL, "blocks": NOTHING}


def plan_for(request: Request, memory_budget: str | int | float, graph: str = "chain") -> Request:
    """The request with the fastest plan that stays within the budget.

    Covered: weights, buffers and gradients of the networks, latents, conditioning, and everything that forward and
    backward of the chain make. Not covered: the reward and whatever else the caller holds, buckets of a distributed
    wrapper, what kernels and libraries allocate by themselves, an allocator's fragmentation, and the looking of
    ``verify_recompute`` and ``detect_nonfinite``. The network is not run: it is traced on fake tensors, without the
    wrappers around it and without its hooks.

    Args:
        request: the chain.
        memory_budget: see :func:`prfl_fast.memory.budget.parse_budget`.
        graph: ``"chain"`` or ``"steps"``.

    Raises:
        InfeasibleBudget: with the least bytes that would do.
        UntraceableError: the network is a plain callable, sharded, or decides by its values what it does.
    """
    budget = parse_budget(memory_budget, request.latents.device)
    if any(n.adapter.module() is None for n in request.networks):
        raise UntraceableError("a plain callable hides its weights; wrap it in an nn.Module that holds them")
    if any("FSDP" in cls.__name__ for module in request.modules for cls in type(module).__mro__):
        raise UntraceableError("it is sharded by FSDP")
    resident = _resident_bytes(request)
    device = _device(request)
    ways = [_traced(request, graph, keep_last_call) for keep_last_call in _keeping(request)]
    blocks = _named_blocks(request)
    return replace(request, plan=_chosen(ways, blocks, budget, resident, device))


def _keeping(request: Request) -> list[bool]:
    """Whether the last call keeps its graph. One that is kept at the end of the chain is walked first in the backward,
    where a recomputed one would stand as well; only one that later calls run beside costs more: those of later steps,
    or the unconditional branch where it is constant."""
    beside = request.networks[-1].guided and not request.guidance.both_branches
    return [True, False] if beside or not request.differentiated(request.last_step - 1) else [True]


def _device(request: Request) -> Device:
    """Whose times the plan is made with."""
    device = request.latents.device
    return device_named("cpu") if device.type != "cuda" else measured_device(device)


@dataclass(frozen=True)
class _Way:
    keep_last_call: bool
    moments: Moments


def _chosen(
    ways: list[_Way], blocks: list[list[str]], budget: int, resident: int, device: Device
) -> MemoryPlan:
    counts = [len(names) for names in blocks]
    uniform = [(name, keep) for name, keep in _UNIFORM.items() if name == "call" or any(counts)]
    looked: list[Alternative] = []
    best: tuple[Choice, _Way] | None = None
    least = []
    for way in ways:
        choice, needed = choose(way.moments, counts, budget - resident, device, [keep for _, keep in uniform])
        least.append(Alternative("planned" if any(counts) else "call", way.keep_last_call, needed + resident))
        if choice is not None and (best is None or choice.extra_ns < best[0].extra_ns):
            best = choice, way
    for name, keep in uniform:
        for way in ways:
            keeps, last = _alike(way.moments, counts, keep)
            looked.append(Alternative(name, way.keep_last_call, peak_of(way.moments, keeps, last) + resident))
    if best is None:
        alternatives = (*looked, *(way for way in least if way.peak_bytes < min(a.peak_bytes for a in looked)))
        raise InfeasibleBudget(budget, min(way.peak_bytes for way in alternatives), alternatives)
    choice, way = best
    common: dict[str, Any] = {"budget_bytes": budget, "predicted_peak_bytes": choice.peak + resident}
    common |= {"alternatives": tuple(looked), "extra_ns": choice.extra_ns}
    common |= {"times_from": f"{device.name}, {device.source}"}
    for name, keep in uniform:
        if all(k == keep for row in (*choice.keeps, choice.last or ()) for k in row):
            return MemoryPlan(name, way.keep_last_call, **common)
    return MemoryPlan(
        "planned", way.keep_last_call, **common, keeps=choice.keeps, last_keeps=choice.last,
        blocks=_table(way.moments, choice, blocks, device),
    )  # fmt: skip


def _alike(moments: Moments, counts: list[int], keep: str) -> tuple[tuple[Keeps, ...], Keeps | None]:
    keeps = tuple((keep,) * count for count in counts)
    return keeps, None if moments.kept is None else keeps[moments.kept.walk.network]


def _table(moments: Moments, choice: Choice, blocks: list[list[str]], device: Device) -> tuple[PlannedBlock, ...]:
    rows = []
    for network, names in enumerate(blocks):
        walks = [walk for walk in moments.walks if walk.network == network]
        keeps = choice.keeps[network]
        if not walks and moments.kept is not None and moments.kept.walk.network == network:
            walks, keeps = [moments.kept.walk], choice.last or keeps
        for piece in walks[0].call.pieces if walks else ():
            if piece.block is None:
                continue
            cost = piece.cost(keeps[piece.block])
            extra = device.nanoseconds(cost.walked) - min(device.nanoseconds(c.walked) for c in piece.costs)
            name = names[piece.block] if network == 0 else f"{network + 1}: {names[piece.block]}"
            rows.append(PlannedBlock(name, keeps[piece.block], cost.kept, extra))
    return tuple(rows)


def _named_blocks(request: Request) -> list[list[str]]:
    return [[name for name, _ in adapter.blocks()] for adapter in distinct_adapters(request)]


def distinct_adapters(request: Request) -> list[Adapter]:
    """The networks' adapters, in the order in which a plan counts networks."""
    return list({id(n.adapter): n.adapter for n in request.networks}.values())


def _resident_bytes(request: Request) -> int:
    """What lives before the chain begins: each storage once."""
    held: list[Any] = [request.latents, request.latent_mask, request.timesteps, request.conditioning, request.negative]
    for module in request.modules:
        held.extend((*module.parameters(), *module.buffers()))
    tensors = [t for t in tree_leaves(held) if isinstance(t, Tensor)]
    tensors += [t.grad for t in tensors if t.is_leaf and t.grad is not None]
    return sum({t.untyped_storage()._cdata: storage_bytes(t) for t in tensors}.values())


def _traced(request: Request, graph: str, keep_last_call: bool) -> _Way:
    """The moments of the chain, counted on fake tensors."""
    request = replace(request, plan=MemoryPlan("call", keep_last_call))
    pretence = Pretence()
    devices = [request.latents.device] if request.latents.device.type == "cuda" else []
    with ExitStack() as stack:
        stack.enter_context(tracing())
        stack.enter_context(_disable_current_modes())  # what the caller counts or traces is not this
        stack.enter_context(torch.random.fork_rng(devices))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # what a real run has to say, the real run says
        stack.enter_context(pretence.inside(*request.modules))
        stack.enter_context(pretence)
        eager = [_without_wrappers(adapter) for adapter in distinct_adapters(request)]
        pretended = _pretended(request, pretence, eager)
        dtypes = _dtypes(pretended, eager)
        with LiveBytes() as live:
            observer = Observer(live)
            _forward_and_backward(_stood_in(pretended, eager, dtypes, observer), graph)
            observer.note("end", observer.events[-1].kind, request.last_step)
        return _Way(keep_last_call, _moments(pretended, graph, keep_last_call, observer.events, eager))


def _dtypes(request: Request, eager: list[Adapter]) -> dict[int, torch.dtype]:
    """Dtypes of the networks' predictions, by one call of each."""
    dtypes: dict[int, torch.dtype] = {}
    caller = Caller(request, Run(request))
    for place, network in enumerate(request.networks):
        if id(network.adapter) not in dtypes:
            with stand_ins([block for _, block in network.adapter.blocks()]):
                made = caller.constant(
                    request.start_step + place, "conditional", request.latents, request.conditioning[place]
                )
            dtypes[id(network.adapter)] = made.dtype
    return dtypes


def _stood_in(
    request: Request, eager: list[Adapter], dtypes: dict[int, torch.dtype], observer: Observer
) -> Request:
    numbers = {id(adapter): number for number, adapter in enumerate(eager)}
    networks = []
    for place, network in enumerate(request.networks):
        adapter = network.adapter
        stand_in = stand_in_call(
            numbers[id(adapter)], request.start_step + place, adapter, dtypes[id(adapter)], observer
        )
        networks.append(replace(network, adapter=stand_in))
    return replace(request, networks=tuple(networks))


def _moments(
    request: Request, graph: str, keep_last_call: bool, events: list[Event], eager: list[Adapter]
) -> Moments:
    """Forwards and walks with the bytes beside them, gradients included."""
    forwards = [k for k, event in enumerate(events) if event.what == "forward"]
    differentiable = [k for k in forwards if events[k].kind.differentiable]
    kept_at = differentiable[-1] if keep_last_call and differentiable else None
    backwards = [k for k, event in enumerate(events) if event.what == "backward"]
    kept_until = backwards[0] if kept_at is not None and backwards else len(events)
    costs = _Costs(request, eager, single=_single(events, graph))
    gradients = _Gradients(request, eager, graph, [events[k] for k in backwards])
    walks: list[Walk] = []
    kept: KeptCall | None = None
    besides = {len(events) - 1: 0}  # gradients at the end of what lies between two events
    for k in backwards:
        event = events[k]
        beside, growing = gradients.walk(event)
        besides[k] = besides[k - 1] = beside
        again = events[k - 1].what == "again"
        live = (events[k - 1].live if again else event.live) + beside
        if graph == "steps":
            live += storage_bytes(event.kind.x)  # the gradient that the sweep holds while a call is walked
        walk = Walk(event.kind.network, costs.of(event.kind), live, growing)
        if again:
            walks.append(walk)
        elif kept_at is not None:
            kept = KeptCall(walk, events[kept_at].live)
    besides[len(events) - 1] = gradients.standing
    inside = [] if kept_at is None else events[kept_at + 1 : kept_until + 1]
    peak_beside = max((event.peak for event in inside), default=0)
    peak = max(event.peak + besides.get(k, 0) for k, event in enumerate(events))
    made = tuple(
        Forward(events[k].live, costs.of(events[k].kind).plain_peak, kept_at is not None and k > kept_at)
        for k in forwards
        if k != kept_at or kept is None
    )
    return Moments(made, tuple(walks), kept, peak, peak_beside)


def _single(events: list[Event], graph: str) -> bool:
    """Whether gradients of each walk go to the parameters before the next one."""
    walked = [(event.kind.network, event.step) for event in events if event.what == "backward" and event.kind.trained]
    if graph == "steps":
        return len(set(walked)) == len(walked)
    return len({network for network, _ in walked}) == len(walked)


class _Costs:
    """Costs of the kinds of calls, traced on demand."""

    def __init__(self, request: Request, eager: list[Adapter], single: bool) -> None:
        self._eager, self._runs = eager, 1 if single else 2
        self._traces = BlockTraces()
        self._made: dict[int, CallCost] = {}

    def of(self, kind: Kind) -> CallCost:
        """The cost of a call of this kind."""
        if id(kind) not in self._made:
            self._made[id(kind)] = self._trace(kind)
        return self._made[id(kind)]

    def _trace(self, kind: Kind) -> CallCost:
        adapter = self._eager[kind.network]
        module = adapter.module()
        blocks = [block for _, block in adapter.blocks()]
        compiled = any(vars(block).get("_compiled_call_impl") is not None for block in blocks)
        with ExitStack() as stack:
            if module is not None:
                if not kind.trained:
                    stack.enter_context(frozen(module))
                stack.enter_context(_without_gradients(module, kind))
            return trace_call(
                lambda: adapter(kind.x, kind.timestep, kind.conditioning, kind.overrides),
                blocks,
                self._traces,
                selective=not compiled,
                differentiable=kind.differentiable,
                runs=self._runs,
            )


@contextmanager
def _without_gradients(module: nn.Module, kind: Kind) -> Iterator[None]:
    """Gradients of parameters are out of the way, and those that a trace leaves are gone afterwards."""
    held = [*module.parameters(), *(t for t in tree_leaves([kind.x, kind.conditioning, kind.overrides]))]
    tensors = [t for t in held if isinstance(t, Tensor) and t.is_leaf]
    before = [(t, t.grad) for t in tensors]
    for t in tensors:
        t.grad = None
    try:
        yield
    finally:
        for t, gradient in before:
            t.grad = gradient


class _Gradients:
    """Gradients of parameters beside each walk, in the order of the walks.

    Autograd adds up what all calls of one backward give to a parameter, and hands it over after the last of them.
    """

    def __init__(self, request: Request, eager: list[Adapter], graph: str, backwards: list[Event]) -> None:
        self._graph = graph
        self._all: list[int] = []
        self._new: list[int] = []
        for adapter in eager:
            module = adapter.module()
            trained = [] if module is None else [p for p in module.parameters() if p.requires_grad]
            self._all.append(sum(map(storage_bytes, trained)))
            self._new.append(sum(storage_bytes(p) for p in trained if p.grad is None))
        self._counts: dict[Any, int] = {}
        for event in backwards:
            if event.kind.trained:
                self._counts[self._pass(event)] = self._counts.get(self._pass(event), 0) + 1
        self._done: dict[Any, int] = {}
        self._standing: dict[int, int] = {}  # `.grad` that the chain has made, by network
        self._buffers: dict[int, int] = {}  # sums that wait, by network

    def _pass(self, event: Event) -> Any:
        """Walks whose gradients are handed over together."""
        return (event.kind.network, event.step if self._graph == "steps" else None)

    def walk(self, event: Event) -> tuple[int, bool]:
        """Bytes beside this walk, and whether it makes gradients that stay."""
        beside = sum(self._standing.values()) + sum(self._buffers.values())
        network, group = event.kind.network, self._pass(event)
        growing = False
        if event.kind.trained:
            count, done = self._counts[group], self._done.get(group, 0)
            if count == 1:
                growing = self._new[network] > 0 and not self._standing.get(network)
            else:
                growing = done == 0
                if growing:
                    self._buffers[network] = self._all[network]
            self._done[group] = done + 1
            if done + 1 == count:
                self._buffers.pop(network, None)
                self._standing[network] = self._new[network]
        return beside, growing

    @property
    def standing(self) -> int:
        """Bytes that the walks so far leave."""
        return sum(self._standing.values()) + sum(self._buffers.values())


def _forward_and_backward(request: Request, graph: str) -> None:
    sample = run_chain(request) if graph == "chain" else run_steps(request)
    taps = [tap.latents for tap in sample.taps if tap.latents.requires_grad]
    if not taps:
        return
    nodes = [latents.grad_fn for latents in taps] if sample._tape is None else sample._tape.nodes()
    if real_leaf(nodes) is not None:
        raise UntraceableError("it has trainable tensors that are none of its parameters")
    gradients = [torch.empty_like(latents) for latents in taps]
    if graph == "chain":
        torch.autograd.backward(taps, gradients)
        return
    for latents, gradient in zip(taps, gradients, strict=True):
        latents.grad = gradient
    sample.backward()


def _pretended(request: Request, pretence: Pretence, eager: list[Adapter]) -> Request:
    """The request on twins."""
    inner = {id(adapter): bare for adapter, bare in zip(distinct_adapters(request), eager, strict=True)}
    return replace(
        request,
        latents=pretence.twin(request.latents),
        conditioning=_each_once(request.conditioning, pretence),
        negative=_each_once(request.negative, pretence),
        latent_mask=None if request.latent_mask is None else pretence.twin(request.latent_mask),
        networks=tuple(replace(n, adapter=inner[id(n.adapter)]) for n in request.networks),
        generator=_copied(request.generator),
        verify_recompute=False,
        detect_nonfinite=False,
        progress=False,
    )


def _each_once(conditioning: tuple[dict[str, Any], ...], pretence: Pretence) -> tuple[dict[str, Any], ...]:
    """Twins of the steps' keyword arguments; steps that share a dictionary go on sharing it."""
    made: dict[int, dict[str, Any]] = {}
    return tuple(made.setdefault(id(c), pretence.twins(c)) for c in conditioning)


def _copied(generator: GeneratorLike) -> GeneratorLike:
    """Generators whose draws are not the caller's."""
    if generator is None or isinstance(generator, torch.Generator):
        return None if generator is None else generator.clone_state()
    return [g.clone_state() for g in generator]


def _without_wrappers(adapter: Adapter) -> Adapter:
    """The adapter of the module inside: a compiler or DDP's reducer has no place in a prediction."""
    if not isinstance(adapter, CallableAdapter):
        return adapter
    inner = copy.copy(adapter)
    inner.network = adapter.inner
    return inner
