"""A byte budget becomes a memory plan: the chain is run on fake tensors, and its live bytes are counted.

What is run is the chain itself, forward and backward, with all its latents, lanes, guidance branches and gradients.
Steps whose call is like a later one's (same network, weights and shapes) get a stand-in for the network, because they
add a latent and nothing else; so the price does not grow with the number of steps.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

from prfl_fast.memory.budget import parse_budget
from prfl_fast.memory.plan import Alternative, MemoryPlan, choose_plan
from prfl_fast.memory.pretend import Pretence, UntraceableError, real_leaf, tracing
from prfl_fast.memory.trace import ROUNDING, LiveBytes, storage_bytes
from prfl_fast.models.base import Adapter
from prfl_fast.models.generic import CallableAdapter
from prfl_fast.sampling.calls import Caller
from prfl_fast.sampling.chain import run_chain
from prfl_fast.sampling.guidance import StepNetwork
from prfl_fast.sampling.modes import GeneratorLike
from prfl_fast.sampling.request import Request
from prfl_fast.sampling.run import Run
from prfl_fast.sampling.steps import run_steps

# Fastest first. With C calls in the rollout: 2C - 1, 2C, 3C - 1 and 3C evaluations of a block.
_WAYS = (("call", True), ("call", False), ("blocks", True), ("blocks", False))


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
    dtypes: dict[int, torch.dtype] = {}

    def ways() -> Iterator[Alternative]:
        for recompute, keep_last_call in _ways(request):
            plan = MemoryPlan(recompute, keep_last_call)
            made = _made_bytes(replace(request, plan=plan), graph, dtypes)
            yield Alternative(recompute, keep_last_call, resident + made)

    return replace(request, plan=choose_plan(budget, ways()))


def _ways(request: Request) -> list[tuple[str, bool]]:
    """Ways that differ in their peak. A graph that is kept at the end of the chain is walked first in the backward,
    where a recomputed one would stand as well; only one that later calls run beside costs more: those of later steps,
    or the unconditional branch where it is constant."""
    blocks = any(n.adapter.blocks() for n in request.networks)
    beside = request.networks[-1].guided and not request.guidance.both_branches
    waits = beside or not request.differentiated(request.last_step - 1)
    return [way for way in _WAYS if (way[0] == "call" or blocks) and (way[1] or waits)]


def _resident_bytes(request: Request) -> int:
    """What lives before the chain begins: each storage once."""
    held: list[Any] = [request.latents, request.latent_mask, request.timesteps, request.conditioning, request.negative]
    for module in request.modules:
        held.extend((*module.parameters(), *module.buffers()))
    tensors = [t for t in tree_leaves(held) if isinstance(t, Tensor)]
    tensors += [t.grad for t in tensors if t.is_leaf and t.grad is not None]
    return sum({t.untyped_storage()._cdata: storage_bytes(t) for t in tensors}.values())


def _made_bytes(request: Request, graph: str, dtypes: dict[int, torch.dtype]) -> int:
    """Peak of what forward and backward of the chain make, counted on fake tensors.

    Earlier steps than those that are traced in full may have some more cotangents of the solver's state beside them
    (one for each entry at most), so the state is counted once more; and they may have conditioning of their own.
    """
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
        pretended = _pretended(request, pretence, dtypes)
        state = _state_bytes(pretended, dtypes.values())
        with LiveBytes() as live:
            _forward_and_backward(pretended, graph)
    peak: int = live.peak
    return peak + state + ROUNDING + _conditioning_gradient_bytes(request, graph)


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


def _state_bytes(request: Request, dtypes: Iterable[torch.dtype]) -> int:
    """The solver's state at its largest, for predictions of these dtypes; none: every step is traced in full."""
    solver, most = request.solver, 0
    for dtype in set(dtypes):
        state = solver.initial_state(request.latents.detach())
        for step in range(request.start_step, request.last_step):
            prediction = torch.empty_like(state[0], dtype=dtype)
            noise = solver.draw_noise(step, state[0], _copied(request.generator), model_dtype=dtype)
            with torch.no_grad():
                state = solver.step(step, state, prediction, noise, request.latent_mask)
            most = max(most, sum(map(storage_bytes, state)))
    return most


def _pretended(request: Request, pretence: Pretence, dtypes: dict[int, torch.dtype]) -> Request:
    """The request on twins, with stand-ins where a step's call is like a later one's. ``dtypes`` are those of the
    networks' predictions; it is filled here, by one call of each."""
    eager = {id(n.adapter): _without_wrappers(n.adapter) for n in request.networks}
    networks = [replace(n, adapter=eager[id(n.adapter)]) for n in request.networks]
    twins = replace(
        request,
        latents=pretence.twin(request.latents),
        conditioning=_each_once(request.conditioning, pretence),
        negative=_each_once(request.negative, pretence),
        latent_mask=None if request.latent_mask is None else pretence.twin(request.latent_mask),
        networks=tuple(networks),
        generator=_copied(request.generator),
        verify_recompute=False,
        detect_nonfinite=False,
        progress=False,
    )
    needed = _needed_steps(request)
    for step in range(request.start_step, request.last_step):
        place = step - request.start_step
        if step in needed:
            continue
        adapter, known = networks[place].adapter, id(request.networks[place].adapter)
        if known not in dtypes:
            caller = Caller(twins, Run(twins))
            dtypes[known] = caller.constant(step, "conditional", twins.latents, twins.conditioning[place]).dtype
        networks[place] = replace(networks[place], adapter=_stand_in(dtypes[known], adapter, pretence))
    return replace(twins, networks=tuple(networks))


def _needed_steps(request: Request) -> set[int]:
    """The last steps of each kind; earlier ones have fewer latents beside them in the backward.

    Two of a kind: the backward of the second to last one finds the gradients of all parameters in place, and what the
    later step sends back past its own call.
    """
    kinds: dict[Any, list[int]] = {}
    for step in range(request.start_step, request.last_step):
        place = step - request.start_step
        network: StepNetwork = request.networks[place]
        ahead = [k for k, tap in enumerate(request.mode.taps) if step < tap]
        weights = [request.mode.weights(k, step) for k in ahead]
        cuts = tuple((w.zero, w.parameters == 0, w.input == 0) for w in weights)
        shapes = (_shapes(request.conditioning[place]), _shapes(request.negative[place]))
        kinds.setdefault((id(network.adapter), network.guided, cuts, shapes), []).append(step)
    needed: set[int] = set()
    for (_, _, cuts, _), steps in kinds.items():
        constant = all(zero for zero, _, _ in cuts)
        needed.update(steps[-1:] if constant else steps[-2:])
    return needed


def _conditioning_gradient_bytes(request: Request, graph: str) -> int:
    """Gradients of conditioning tensors that no traced step is given; a tape has a second one, of its own leaf."""
    needed = _needed_steps(request)
    traced: set[int] = set()
    others: dict[int, int] = {}
    for step in range(request.start_step, request.last_step):
        place = step - request.start_step
        for tensor in tree_leaves([request.conditioning[place], request.negative[place]]):
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                if step in needed:
                    traced.add(id(tensor))
                else:
                    others[id(tensor)] = storage_bytes(tensor)
    return (2 if graph == "steps" else 1) * sum(size for key, size in others.items() if key not in traced)


def _shapes(conditioning: Mapping[str, Any]) -> tuple[Any, ...]:
    tensors = [t for t in tree_leaves(dict(conditioning)) if isinstance(t, Tensor)]
    return tuple((tuple(t.shape), t.dtype, t.requires_grad) for t in tensors)


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


class _StandIn:
    """Looks like the network to the graph of the chain: a prediction that depends on the latents and on a parameter,
    and that saves something for its backward (a checkpoint in which nothing is saved lets go of its input)."""

    network = None

    def __init__(self, dtype: torch.dtype, anchor: Tensor) -> None:
        self._dtype = dtype
        self._anchor = anchor

    def module(self) -> None:
        return None

    def blocks(self) -> list[tuple[str, Any]]:
        return []

    def __call__(self, x: Tensor, timestep: Tensor, conditioning: Any, overrides: Any) -> Tensor:
        return x.to(self._dtype) * self._anchor


def _stand_in(dtype: torch.dtype, adapter: Adapter, pretence: Pretence) -> Adapter:
    module = adapter.module()
    trainable = module is not None and any(p.requires_grad for p in module.parameters())
    anchor = torch.zeros((), dtype=dtype, device="cpu").requires_grad_(trainable)
    # The chain asks an adapter for these things only.
    return cast(Adapter, _StandIn(dtype, pretence.twin(anchor)))
