"""The public door: ``unrolled_sample`` validates once, before any network call, and hands a frozen request down."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from prfl_fast.memory.plan import MemoryPlan, choose_plan
from prfl_fast.models import adapter_for, refuse_unusable
from prfl_fast.models.base import Adapter
from prfl_fast.models.unusable import refuse_rounded_gradients
from prfl_fast.pixels import decoder_for
from prfl_fast.sampling.budgeting import plan_for
from prfl_fast.sampling.chain import run_chain
from prfl_fast.sampling.guidance import Guidance, GuidanceFunction, StepNetwork
from prfl_fast.sampling.modes import GeneratorLike, GradientMode, ResolvedMode, resolve_mode
from prfl_fast.sampling.request import Conditioning, PrepareInput, Request
from prfl_fast.sampling.sample import Sample
from prfl_fast.sampling.steps import run_steps
from prfl_fast.sampling.transaction import random_state_back_on_failure
from prfl_fast.solvers import make_solver
from prfl_fast.solvers.base import Solver
from prfl_fast.solvers.refused import refuse_missing_seed, refuse_unsupported

ConditioningLike = Conditioning | Callable[[int, Tensor], Conditioning] | None
Scale = float | Callable[[int], float]


def unrolled_sample(
    transformer: Any,
    scheduler: Any,
    latents: Tensor,
    num_inference_steps: int | None = 40,
    *,
    start_step: int = 0,
    stop_step: int | None = None,
    supervise: Sequence[int] | None = None,
    conditioning: ConditioningLike = None,
    negative_conditioning: ConditioningLike = None,
    guidance_scale: Scale = 1.0,
    guidance_fn: GuidanceFunction | None = None,
    guidance_gradient: str = "both",
    transformer_2: Any = None,
    boundary_ratio: float | None = None,
    guidance_scale_2: Scale | None = None,
    prepare_input: PrepareInput | None = None,
    latent_mask: Tensor | None = None,
    decode: Any = None,
    solver: str = "auto",
    gradient: str | GradientMode = "full",
    graph: str = "chain",
    memory_budget: str | int | float | None = None,
    plan: MemoryPlan | None = None,
    verify_recompute: bool = False,
    detect_nonfinite: bool = False,
    generator: GeneratorLike = None,
    progress: bool = False,
) -> Sample:
    """Runs the sampling chain so that a loss on its latents has the exact gradient through every step.

    The solver's steps are linear, ``z[i+1] = A[i] z[i] + B[i] m[i] + C[i] eps``, so the adjoint needs one latent per
    step, and each network call is recomputed in the backward: memory does not grow with the steps beyond those
    latents. With C network calls in the rollout the full chain makes at most 2C - 1.

    Args:
        transformer: a diffusers transformer (plain, LoRA, sharded) or any callable ``net(x, t, **conditioning)``.
        scheduler: any diffusers scheduler whose step is deterministic given its noise draws; read, never changed.
        latents: initial noise in the pipeline's layout: ``[B, C, F, H, W]``; LTX ``[B, S, C]``; CogVideoX
            ``[B, F, C, H, W]``. Any float dtype; the table solver computes in float32, or float64 when given.
        num_inference_steps: None takes the scheduler's timesteps as the caller set them (custom sigmas, mu). One step
            is one entry of the scheduler's timesteps.
        start_step: first step (the latents are then those of that noise level).
        stop_step: end after this many steps, counted from the schedule's start: a noisy latent for a process reward.
        supervise: numbers of steps after which the latents are tapped, ascending; the chain ends at the last.
        conditioning: keyword arguments of every network call, or a function ``(step, timestep)`` that gives them.
        negative_conditioning: those of the unconditional branch; keys not given are taken from ``conditioning``.
        guidance_scale: classifier-free guidance, a number or a function of the step; exactly 1 makes one call.
        guidance_fn: ``(conditional, unconditional, step) -> prediction`` instead of ``u + s (c - u)``, in the graph.
        guidance_gradient: ``"both"`` branches are differentiated, or the ``"conditional"`` one only.
        transformer_2, boundary_ratio, guidance_scale_2: Wan 2.2's second expert, called below the boundary timestep.
        prepare_input: ``(x, timestep, step) -> overrides`` of the network's keywords (``hidden_states``, ``timestep``,
            ...), part of the differentiated call; must be a pure function.
        latent_mask: broadcastable to the latents; only elements where it is true are updated.
        decode: for rewards on pixels: the pipeline's VAE, a :class:`~prfl_fast.pixels.PixelDecoder`, or a function of
            the latents; then ``sample.frames`` has frames ``[B, C, T, H, W]`` in 0..1 with a gradient. Nothing is
            decoded before it is asked for. Its memory (one chunk's graph) comes on top of ``memory_budget``.
        solver: ``"table"``: fused linear steps; ``"scheduler"``: its own ``step`` in the graph, bit for bit the
            pipeline's latents; ``"auto"``: the table where the scheduler proves linear.
        gradient: see :mod:`prfl_fast.sampling.modes`.
        graph: ``"chain"``: an ordinary autograd graph; ``"steps"``: ``sample.backward()`` walks one step at a time.
        memory_budget: ``"60GiB"``, ``"64GB"``, bytes, or a fraction of the device: weights, gradients, latents and
            graphs of this call stay below it; the reward's own memory and the allocator's come on top. Predicting takes
            seconds, so give ``plan=sample.plan`` from the second call on. None: whole-call recomputation.
        plan: the plan of an earlier sample instead of a budget.
        verify_recompute: compare every block's output in the recomputation bit for bit with the forward's.
        detect_nonfinite: name step, branch and block of the first value or gradient that is not finite (slow).
        generator: of the scheduler's noise and of random modes; one, or one per sample.
        progress: show progress bars of forward and backward.

    Returns:
        A :class:`~prfl_fast.sampling.sample.Sample`.

    Raises:
        TypeError, ValueError: bad input, named, before any network call.
        InfeasibleBudget: the budget can't hold the chain; it tells the least bytes that would do. For a network whose
            memory can't be predicted (plain callable, sharded, values that decide) a ValueError says so.
        NonFiniteError, RecomputationError: what ``detect_nonfinite`` and ``verify_recompute`` found.

    Example:
        >>> sample = prfl_fast.unrolled_sample(**prfl_fast.pipeline_inputs(pipe, prompt="a heron takes off"))
        >>> (-reward(sample.latents, sample.timestep)).mean().backward()
    """
    _check_choice("solver", solver, ("auto", "table", "scheduler"))
    _check_choice("graph", graph, ("chain", "steps"))
    _check_choice("guidance_gradient", guidance_gradient, ("both", "conditional"))
    _check_latents(latents)
    _check_generator(generator, latents)
    adapters = _adapters(transformer, transformer_2, boundary_ratio)
    _check_scheduler(scheduler, generator)
    if num_inference_steps is not None and (not _is_int(num_inference_steps) or num_inference_steps < 1):
        raise ValueError(f"num_inference_steps: expected a whole number from 1, or None, got {num_inference_steps!r}")
    with random_state_back_on_failure(latents, generator):
        table = make_solver(scheduler, num_inference_steps, start_step=_start(start_step), kind=solver)
        mode = _mode(gradient, table, start_step, stop_step, supervise, generator)
        timesteps = table.timesteps.to(latents.device)
        steps = range(start_step, mode.taps[-1])

        networks = _networks(
            adapters, table, steps, scheduler, boundary_ratio, guidance_scale, guidance_scale_2, negative_conditioning
        )
        positive = _per_step("conditioning", conditioning, steps, timesteps)
        negative = _per_step("negative_conditioning", negative_conditioning, steps, timesteps)
        negative = _merge(positive, negative)
        for adapter in adapters:
            for keywords in {id(k): k for k in (*positive, *negative)}.values():
                adapter.validate(latents, keywords, prepared=prepare_input is not None)
        _check_mask(latent_mask, latents)
        decoder = None if decode is None else decoder_for(decode, latents)
        modules = tuple(m for m in (adapter.module() for adapter in adapters) if m is not None)
        request = Request(
            latents=latents,
            solver=table,
            timesteps=timesteps,
            start_step=start_step,
            mode=mode,
            networks=networks,
            conditioning=positive,
            negative=negative,
            guidance=Guidance(guidance_fn, guidance_gradient == "both"),
            prepare_input=prepare_input,
            latent_mask=latent_mask,
            plan=plan if plan is not None else choose_plan(None),
            modules=modules,
            generator=generator,
            verify_recompute=verify_recompute,
            detect_nonfinite=detect_nonfinite,
            progress=progress,
        )
        _check_gradient(request, len(adapters))
        if memory_budget is not None:
            if plan is not None:
                raise ValueError("memory_budget, plan: expected one of the two, got both")
            request = plan_for(request, memory_budget, graph)
        sample = run_chain(request) if graph == "chain" else run_steps(request)
    return sample if decoder is None else replace(sample, _decode=decoder)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")


def _check_latents(latents: Any) -> None:
    if not isinstance(latents, Tensor):
        raise TypeError(f"latents: expected a tensor, got {type(latents).__name__}")
    if not latents.is_floating_point():
        raise TypeError(f"latents: expected a float dtype, got {latents.dtype}")
    if latents.ndim == 0 or latents.numel() == 0:
        raise ValueError(f"latents: expected at least one element and a batch dimension, got {tuple(latents.shape)}")
    if not torch.isfinite(latents).all():
        raise ValueError("latents: expected finite values, got NaN or infinity")


def _check_generator(generator: Any, latents: Tensor) -> None:
    given = [generator] if isinstance(generator, torch.Generator) else generator
    if given is None:
        return
    if not isinstance(given, (list, tuple)) or not all(isinstance(g, torch.Generator) for g in given):
        raise TypeError(f"generator: expected a torch.Generator or a list of them, got {type(generator).__name__}")
    if not isinstance(generator, torch.Generator) and len(given) != latents.shape[0]:
        raise ValueError(f"generator: expected one per sample ({latents.shape[0]}), got {len(given)}")


def _check_scheduler(scheduler: Any, generator: Any) -> None:
    refuse_unsupported(scheduler)
    refuse_missing_seed(scheduler, generator)
    missing = [name for name in ("set_timesteps", "step", "config") if not hasattr(scheduler, name)]
    if missing:
        raise TypeError(
            f"scheduler: expected a diffusers scheduler, got {type(scheduler).__name__} (without {', '.join(missing)})"
        )


def _check_mask(mask: Any, latents: Tensor) -> None:
    if mask is None:
        return
    if not isinstance(mask, Tensor):
        raise TypeError(f"latent_mask: expected a tensor, got {type(mask).__name__}")
    try:
        shape = torch.broadcast_shapes(mask.shape, latents.shape)
    except RuntimeError:
        shape = torch.Size()
    if shape != latents.shape:
        raise ValueError(
            f"latent_mask: expected a shape that broadcasts to the latents' {tuple(latents.shape)}, "
            f"got {tuple(mask.shape)}"
        )


def _adapters(transformer: Any, transformer_2: Any, boundary_ratio: float | None) -> list[Adapter]:
    if (transformer_2 is None) != (boundary_ratio is None):
        raise ValueError(
            "transformer_2, boundary_ratio: expected both or none, got "
            + ("transformer_2 only" if boundary_ratio is None else "boundary_ratio only")
        )
    if boundary_ratio is not None and not 0 <= boundary_ratio <= 1:
        raise ValueError(f"boundary_ratio: expected a number in 0..1, got {boundary_ratio!r}")
    networks = [transformer] if transformer_2 is None else [transformer, transformer_2]
    for name, network in zip(("transformer", "transformer_2"), networks, strict=False):
        if not callable(network):
            raise TypeError(f"{name}: expected a diffusers transformer or a callable, got {type(network).__name__}")
        refuse_unusable(network)
    return [adapter_for(network) for network in networks]


def _start(start_step: Any) -> int:
    if not _is_int(start_step) or start_step < 0:
        raise ValueError(f"start_step: expected a whole number from 0, got {start_step!r}")
    return int(start_step)


def _mode(
    gradient: str | GradientMode,
    table: Solver,
    start_step: int,
    stop_step: int | None,
    supervise: Sequence[int] | None,
    generator: GeneratorLike,
) -> ResolvedMode:
    low, high = start_step + 1, table.num_steps
    if stop_step is not None and (not _is_int(stop_step) or not low <= stop_step <= high):
        raise ValueError(f"stop_step: expected a whole number in {low}..{high}, got {stop_step!r}")
    taps: tuple[int, ...] | None = None
    if supervise is not None:
        taps = tuple(supervise)
        if stop_step is not None:
            raise ValueError("supervise, stop_step: the chain ends at the last supervised step; give one of the two")
        if not taps or not all(_is_int(k) and low <= k <= high for k in taps) or list(taps) != sorted(set(taps)):
            raise ValueError(f"supervise: expected ascending whole numbers in {low}..{high}, got {supervise!r}")
    return resolve_mode(
        gradient,
        num_steps=table.num_steps,
        start_step=start_step,
        stop_step=stop_step,
        supervise=taps,
        generator=generator,
    )


def _networks(
    adapters: list[Adapter],
    table: Solver,
    steps: range,
    scheduler: Any,
    boundary_ratio: float | None,
    guidance_scale: Scale,
    guidance_scale_2: Scale | None,
    negative_conditioning: ConditioningLike,
) -> tuple[StepNetwork, ...]:
    boundary = -math.inf if boundary_ratio is None else boundary_ratio * scheduler.config.num_train_timesteps
    low_noise_scale = guidance_scale if guidance_scale_2 is None else guidance_scale_2
    networks = []
    for step in steps:
        high_noise = float(table.timesteps[step]) >= boundary
        given = guidance_scale if high_noise else low_noise_scale
        scale = given(step) if callable(given) else given
        if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not math.isfinite(scale):
            raise ValueError(f"guidance_scale: expected a finite number, got {scale!r} in step {step}")
        guided = scale != 1
        if guided and negative_conditioning is None:
            raise ValueError(
                f"guidance_scale: {scale} needs negative_conditioning (the unconditional branch's keyword arguments; "
                "{} repeats conditioning), got None"
            )
        networks.append(StepNetwork(adapters[0] if high_noise else adapters[-1], float(scale), guided))
    return tuple(networks)


def _per_step(name: str, given: ConditioningLike, steps: range, timesteps: Tensor) -> tuple[Conditioning, ...]:
    if given is None or isinstance(given, dict):
        return (dict(given or {}),) * len(steps)
    if not callable(given):
        raise TypeError(
            f"{name}: expected a dictionary of keyword arguments or a function of (step, timestep), "
            f"got {type(given).__name__}"
        )
    values = []
    for step in steps:
        value = given(step, timesteps[step])
        if not isinstance(value, dict):
            raise TypeError(f"{name}: the function must give a dictionary, got {type(value).__name__} in step {step}")
        values.append(dict(value))
    return tuple(values)


def _merge(positive: tuple[Conditioning, ...], negative: tuple[Conditioning, ...]) -> tuple[Conditioning, ...]:
    """Negative keywords over the positive ones; equal pairs of dictionaries give one and the same."""
    merged: dict[tuple[int, int], Conditioning] = {}
    return tuple(merged.setdefault((id(p), id(n)), {**p, **n}) for p, n in zip(positive, negative, strict=True))


def _check_gradient(request: Request, num_networks: int) -> None:
    """A gradient was asked for: can there be one?"""
    if not any(request.differentiated(i) for i in range(request.start_step, request.last_step)):
        return
    if not torch.is_grad_enabled():
        raise RuntimeError(
            f"gradient={request.mode.name!r}, but gradients are switched off here (torch.no_grad or "
            "torch.set_grad_enabled(False)). Call under torch.enable_grad(), or pass gradient='none' to sample only."
        )
    for module in request.modules:
        refuse_rounded_gradients(module)
    opaque = len(request.modules) < num_networks
    weights = [m.weights(i) for m in request.mode.masks for i in range(request.start_step, request.last_step)]
    if opaque and any(w.parameters == 0 and w.input != 0 for w in weights):
        raise ValueError(
            "gradient: a step with parameter weight 0 and another input weight needs an nn.Module, whose parameters "
            "can be taken out of the graph; got a plain callable"
        )
    if any("FSDP" in c.__name__ for m in request.modules for c in type(m).__mro__) and any(
        w.parameters == 0 and w.input != 0 for w in weights
    ):
        raise ValueError("gradient: a step with parameter weight 0 and another input weight can't be sharded by FSDP")
    given = [request.latents, *tree_leaves([*request.conditioning, *request.negative])]
    reachable = any(isinstance(value, Tensor) and value.requires_grad for value in given)
    if not opaque and not reachable and not any(_trainable(m) for m in request.modules):
        raise ValueError(
            f"gradient={request.mode.name!r}, but nothing requires a gradient: no parameter of the transformer, not "
            "the latents, no conditioning tensor. Unfreeze something, or pass gradient='none' to sample only."
        )


def _trainable(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())
