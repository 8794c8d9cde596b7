"""``plan_memory``: the plan of a training iteration, without running it, and without a GPU or weights if need be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prfl_fast.memory.budget import parse_budget
from prfl_fast.memory.call_cost import BlockTraces, CallCost, trace_call
from prfl_fast.memory.iteration_plan import CurvePoint, IterationPlan
from prfl_fast.memory.keeps import NOTHING
from prfl_fast.memory.outlook import (
    Iteration,
    Outcome,
    least_bytes,
    most_bytes,
    plan_iteration,
    same_for_all,
)
from prfl_fast.memory.plan import InfeasibleBudget, PlannedBlock
from prfl_fast.memory.pretend import Pretence, UntraceableError, tracing
from prfl_fast.memory.roofline import Device, device_named
from prfl_fast.memory.trace import storage_bytes
from prfl_fast.models import adapter_for
from prfl_fast.models.base import Adapter, unwrap
from prfl_fast.models.published import VideoModel, parse_size, video_model
from prfl_fast.sampling.modes import GradientMode, resolve_mode

STATES = {"adamw": 2, "sgd": 0, "none": 0}  # of each trainable parameter, in its dtype
# Modes that draw, and the draw that takes most.
_LONGEST = {"prfl": "last:1", "random": "full"}


@dataclass(frozen=True)
class Forecast:
    """An iteration traced once, from which plans for any budget and device come in an instant.

    Attributes:
        iteration: its costs.
        names: of the network's blocks.
        about: fields of the :class:`IterationPlan` that no budget changes.
    """

    iteration: Iteration
    names: tuple[str, ...]
    about: Mapping[str, Any]

    def plan(self, budget_bytes: int, device: Device, *, curve: int = 0) -> IterationPlan:
        """The fastest plan within the budget, beside ``curve`` other budgets from the least to what keeps all.

        Raises:
            InfeasibleBudget: with the least bytes that would do.
        """
        outcome = plan_iteration(self.iteration, budget_bytes, device)
        try:
            everything = plan_iteration(self.iteration, budget_bytes, device, same_for_all(NOTHING)).total_ns
        except InfeasibleBudget:
            everything = None
        low, high = least_bytes(self.iteration, device), most_bytes(self.iteration, device)
        return IterationPlan(
            recompute="planned" if outcome.keeps else "call",
            keep_last_call=outcome.keep_last_call,
            keeps=(outcome.keeps,) if outcome.keeps else (),
            last_keeps=outcome.last_keeps,
            extra_ns=outcome.extra_ns,
            budget_bytes=budget_bytes,
            predicted_peak_bytes=outcome.peak_bytes,
            device=device.name,
            times_from=device.source,
            held=tuple(self.iteration.held.items()),
            blocks=self._blocks(outcome, device),
            reward_keeps=outcome.reward_keeps,
            total_ns=outcome.total_ns,
            recompute_all_ns=everything,
            least_bytes=low,
            most_bytes=high,
            curve=self.curve(device, curve, low, high),
            **self.about,
        )

    def curve(self, device: Device, points: int, low: int, high: int) -> tuple[CurvePoint, ...]:
        """Plans for budgets from ``low`` to ``high``, the closer the smaller: that is where most of the time goes."""
        found = []
        for place in range(points):
            budget = low + (high - low) * place**2 // max(1, points - 1) ** 2
            outcome = plan_iteration(self.iteration, budget, device)
            found.append(CurvePoint(budget, outcome.peak_bytes, outcome.total_ns))
        return tuple(found)

    def _blocks(self, outcome: Outcome, device: Device) -> tuple[PlannedBlock, ...]:
        pieces = [piece for piece in self.iteration.call.pieces if piece.block is not None]
        fastest = [min(device.nanoseconds(cost.walked) for cost in piece.costs) for piece in pieces]
        rows = zip(self.names, outcome.costs, fastest, strict=False)
        return tuple(PlannedBlock(name, c.keep, c.kept, device.nanoseconds(c.walked) - f) for name, c, f in rows)


def plan_memory(
    transformer: nn.Module | str,
    latents_shape: Sequence[int] | str | None = None,
    *,
    memory_budget: str | int | float | None = None,
    device: str = "h200",
    num_inference_steps: int = 40,
    gradient: str | GradientMode = "full",
    guidance: bool | None = None,
    guidance_gradient: str = "both",
    conditioning: Mapping[str, Any] | None = None,
    lora: int | None = None,
    optimizer: str = "adamw",
    reward_blocks: int = 8,
    gpus: int = 1,
    batch: int = 1,
    reserve: str | int = "2GiB",
    curve: int = 0,
) -> IterationPlan:
    """The fastest plan of a training iteration within a byte budget, before a GPU is asked for.

    Bytes are counted by tracing one block of each kind on fake tensors; nanoseconds are a roofline estimate for the
    named device. On each GPU are counted: weights, their gradients, the optimiser's state, a latent process reward with
    weights of its own, latents and conditioning, what the calls and the reward keep and make, and ``reserve``.

    With ``gpus`` above 1 weights, gradients and optimiser state are sharded as FSDP2 does it with one backward per step
    (``graph="steps"``), and two blocks' whole weights are added; each GPU has a chain of its own.

    Args:
        transformer: a diffusers transformer of a known family, on any device (the meta device too), with
            ``requires_grad`` as in training; or a name of :data:`prfl_fast.models.published.PUBLISHED`; or the path of
            a ``config.json``.
        latents_shape: in the pipeline's layout; of a model by name also ``"1280x720x81"`` (width, height, frames in
            pixels), or None: what it was published for.
        memory_budget: as in ``unrolled_sample``, a fraction being one of the named device; None: all of that device.
        device: one of :data:`prfl_fast.memory.roofline.DEVICES`.
        num_inference_steps: of the rollout.
        gradient: as in ``unrolled_sample``; a mode that draws counts with the draw that takes most.
        guidance: two calls per step; None: one, or what the named model's pipeline does.
        guidance_gradient: ``"both"`` branches are differentiated or the ``"conditional"`` one.
        conditioning: keyword arguments of a call; a ``torch.Size`` stands for a tensor of that shape in the network's
            dtype. Not for a model by name.
        lora: rank of an adapter on the attention's projections; for a model by name.
        optimizer: ``"adamw"`` (two states in the dtype of each trained weight), ``"sgd"`` or ``"none"``.
        reward_blocks: blocks of a frozen latent reward over a copy of the network's first blocks; 0: no reward.
        gpus: that share weights, gradients and optimiser state.
        batch: samples per GPU, for a model by name.
        reserve: bytes for what can't be counted: the CUDA context, workspaces of libraries, fragmentation.
        curve: so many budgets from the least that would do to what keeps everything.

    Raises:
        InfeasibleBudget: with the least bytes that would do.
        TypeError, ValueError: bad input, named; a network that can't be traced.
        ImportError: diffusers, or peft for ``lora``, is missing.
    """
    rates, points = device_named(device), _whole("curve", curve, 0)
    budget = _budget(memory_budget, rates)
    found = forecast(
        transformer,
        latents_shape,
        num_inference_steps=num_inference_steps,
        gradient=gradient,
        guidance=guidance,
        guidance_gradient=guidance_gradient,
        conditioning=conditioning,
        lora=lora,
        optimizer=optimizer,
        reward_blocks=reward_blocks,
        gpus=gpus,
        batch=batch,
        reserve=reserve,
    )
    return found.plan(budget, rates, curve=points)


def forecast(
    transformer: nn.Module | str,
    latents_shape: Sequence[int] | str | None = None,
    *,
    num_inference_steps: int = 40,
    gradient: str | GradientMode = "full",
    guidance: bool | None = None,
    guidance_gradient: str = "both",
    conditioning: Mapping[str, Any] | None = None,
    lora: int | None = None,
    optimizer: str = "adamw",
    reward_blocks: int = 8,
    gpus: int = 1,
    batch: int = 1,
    reserve: str | int = "2GiB",
) -> Forecast:
    """The iteration of :func:`plan_memory`, traced, for any number of budgets and devices."""
    steps = _whole("num_inference_steps", num_inference_steps, 1)
    gpus, batch = _whole("gpus", gpus, 1), _whole("batch", batch, 1)
    blocks = _whole("reward_blocks", reward_blocks, 0)
    if optimizer not in STATES:
        raise ValueError(f"optimizer: expected one of {', '.join(STATES)}, got {optimizer!r}")
    if guidance_gradient not in ("both", "conditional"):
        raise ValueError(f"guidance_gradient: expected 'both' or 'conditional', got {guidance_gradient!r}")
    if lora is not None:
        _whole("lora", lora, 1)
    reserved = parse_budget(reserve, torch.device("cpu")) if reserve != 0 else 0
    chosen = _differentiated_steps(gradient, steps)
    times = len(chosen)
    if isinstance(transformer, str):
        if conditioning is not None:
            raise ValueError("conditioning: a model by name brings its own; expected None")
        model = video_model(transformer)
        size = _size(model, latents_shape)
        shape = model.latents_shape(*size, batch)
        net, keywords, name = model.build(lora=lora), model.conditioning(*size, batch), model.name
        guided = model.guided if guidance is None else guidance
    else:
        if lora is not None:
            raise ValueError("lora: a network brings its own adapters; expected None")
        net, shape, name = transformer, _shape(latents_shape), type(unwrap(transformer)).__name__
        keywords, guided = _keywords(conditioning or {}, net), bool(guidance)
    adapter = adapter_for(unwrap(net))
    if adapter.module() is None:
        raise UntraceableError("a plain callable hides its weights; wrap it in an nn.Module that holds them")
    where = _where(net)
    latents = torch.zeros(shape, device=where)
    adapter.validate(latents, keywords, prepared=False)
    branches = 2 if guided else 1
    call = _traced_call(adapter, net, latents, keywords, differentiable=times > 0)
    reward, reward_bytes = _traced_reward(adapter, latents, keywords, blocks) if blocks else (None, 0)
    held = _held(net, adapter, optimizer, gpus)
    held |= {"reward": reward_bytes} if blocks else {}
    # Each step's latent, and the solver's state with its cotangents beside them.
    state = (steps + 8) * storage_bytes(latents)
    held["latents and conditioning"] = state + branches * sum(storage_bytes(t) for t in _tensors(keywords))
    held["reserve"] = reserved
    return Forecast(
        Iteration(
            call=call,
            reward=reward,
            calls=branches * steps,
            differentiated=times * (2 if guided and guidance_gradient == "both" else 1),
            held={key: count for key, count in held.items() if count},
            beside=bool(chosen) and (chosen[-1] < steps - 1 or (guided and guidance_gradient == "conditional")),
        ),
        tuple(block for block, _ in adapter.blocks()),
        {
            "model": name,
            "latents_shape": tuple(shape),
            "gpus": gpus,
            "calls": branches * steps,
            "differentiated_calls": times * (2 if guided and guidance_gradient == "both" else 1),
        },
    )


def _traced_call(
    adapter: Adapter, net: nn.Module, latents: Tensor, keywords: dict[str, Any], *, differentiable: bool
) -> CallCost:
    pretence = Pretence()
    with tracing(), pretence.inside(unwrap(net)), pretence:
        x = pretence.twin(latents.requires_grad_(differentiable))
        given, timestep = pretence.twins(keywords), torch.full((), 500.0, device=latents.device)
        return trace_call(
            lambda: adapter(x, timestep, given, None),
            [block for _, block in adapter.blocks()],
            BlockTraces(),
            differentiable=differentiable,
        )


def _traced_reward(adapter: Adapter, latents: Tensor, keywords: dict[str, Any], blocks: int) -> tuple[CallCost, int]:
    """The reward's forward and backward to the latents, and the bytes of its weights, which are its own."""
    trunk = adapter.trunk(blocks, copy=False)
    count = sum(p.numel() * p.element_size() for p in trunk.parameters())
    # Its head, in float32: the pooling's projections and a perceptron of 1024, 512, 1.
    count += 4 * (4 * trunk.dim**2 + 1024 * trunk.dim + 1024 * 512)
    pretence = Pretence()
    with tracing(), pretence.inside(trunk), pretence:
        for parameter in trunk.parameters():
            parameter.requires_grad_(False)
        x = pretence.twin(latents.requires_grad_(True))
        given, timestep = pretence.twins(keywords), torch.full((), 500.0, device=latents.device)
        cost = trace_call(
            # The pooling reads the tokens in slices and keeps no more than their scores.
            lambda: trunk(x, timestep, **given).mean(1),
            [block for _, block in trunk.blocks()],
            BlockTraces(),
        )
    return cost, count


def _held(net: nn.Module, adapter: Adapter, optimizer: str, gpus: int) -> dict[str, int]:
    held = {id(t): t for t in (*net.parameters(), *net.buffers())}
    weights = sum(_bytes(t) for t in held.values())
    trained = sum(_bytes(p) for p in net.parameters() if p.requires_grad)
    made = {
        "weights": -(-weights // gpus),
        "gradients": -(-trained // gpus),
        "optimiser's state": STATES[optimizer] * -(-trained // gpus),
    }
    if gpus > 1:
        largest = max((sum(map(_bytes, block.parameters())) for _, block in adapter.blocks()), default=weights)
        made["two blocks' gathered weights"] = 2 * largest
    return made


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _budget(memory_budget: str | int | float | None, device: Device) -> int:
    if memory_budget is None or isinstance(memory_budget, float):
        if not device.memory:
            raise ValueError(f"memory_budget: how much memory {device.name} has is not known; expected bytes")
        if memory_budget is None:
            return device.memory
        if not 0 < memory_budget <= 1:
            raise ValueError(f"memory_budget: expected a fraction in (0, 1], got {memory_budget!r}")
        return max(1, int(memory_budget * device.memory))
    return parse_budget(memory_budget, torch.device("cpu"))


def _differentiated_steps(gradient: str | GradientMode, steps: int) -> list[int]:
    named = gradient
    if isinstance(gradient, str):
        kind, _, number = gradient.partition(":")
        named = f"last:{number}" if number and kind in ("random", "uniform") else _LONGEST.get(gradient, gradient)
    mode = resolve_mode(named, num_steps=steps, start_step=0, stop_step=None, supervise=None, generator=None)
    return [step for step in range(steps) if not mode.weights(0, step).zero]


def _size(model: VideoModel, size: Sequence[int] | str | None) -> tuple[int, int, int]:
    if size is None:
        return model.size
    if not isinstance(size, str):
        raise TypeError(f"latents_shape: of a model by name expected a size such as '1280x720x81', got {size!r}")
    return parse_size(size)


def _shape(shape: Sequence[int] | str | None) -> tuple[int, ...]:
    if isinstance(shape, Sequence) and not isinstance(shape, str) and all(_is_whole(n) for n in shape):
        if min(shape, default=0) > 0:
            return tuple(shape)
    raise TypeError(f"latents_shape: expected whole numbers above 0, the latents' shape, got {shape!r}")


def _keywords(conditioning: Mapping[str, Any], net: nn.Module) -> dict[str, Any]:
    dtype = getattr(unwrap(net), "dtype", None)
    where = _where(net)

    def tensor(value: Any) -> Any:
        if isinstance(value, torch.Size):
            return torch.zeros(value, dtype=dtype if isinstance(dtype, torch.dtype) else None, device=where)
        return value

    return {name: tensor(value) for name, value in conditioning.items()}


def _where(net: nn.Module) -> torch.device:
    first = next(iter(net.parameters()), None)
    return torch.device("cpu") if first is None or first.is_meta else first.device


def _tensors(keywords: Mapping[str, Any]) -> list[Tensor]:
    given = [v for value in keywords.values() for v in (value if isinstance(value, (tuple, list)) else (value,))]
    return [value for value in given if isinstance(value, Tensor)]


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _whole(name: str, value: Any, least: int) -> int:
    if not _is_whole(value) or value < least:
        raise ValueError(f"{name}: expected a whole number from {least}, got {value!r}")
    return int(value)
