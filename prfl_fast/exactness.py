"""The check behind ``prfl-fast doctor --gradients``: this package's gradients against plain autograd's."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prfl_fast.sampling.door import unrolled_sample
from prfl_fast.twin import Twin, make_twin, read_config

_STEPS = 4
_GUIDANCE = 3.0
_UNIT = 2.0**-24  # float32: norms, embeddings and several schedulers' steps round to it whatever the model's dtype
# Float32 roundings in a row on the longest path through one block, and through embeddings, final norm, guidance and
# solver step together; the backward passes the same places again.
_ROUNDINGS_PER_BLOCK = 12
_ROUNDINGS_PER_CALL = 12


@dataclass(frozen=True)
class Comparison:
    """One group of gradients of one form of the chain: relative error in the 2-norm, and the bound it must keep."""

    form: str
    group: str
    error: float
    bound: float


@dataclass(frozen=True)
class GradientCheck:
    """All comparisons on one twin; ``passed`` when every error is within its bound."""

    model: str
    scheduler: str
    steps: int
    comparisons: list[Comparison]

    @property
    def passed(self) -> bool:
        """Every comparison keeps its bound (a NaN does not)."""
        return all(c.error <= c.bound for c in self.comparisons)

    def render(self) -> str:
        """A table for a terminal."""
        lines = [
            f"gradients of the full chain against plain autograd: tiny {self.model}, {self.scheduler},"
            f" {self.steps} guided steps",
            f"  {'form':<30} {'gradient of':<16} {'relative error':>14} {'bound':>9}",
        ]
        for c in self.comparisons:
            verdict = "" if c.error <= c.bound else "  NOT EXACT"
            lines.append(f"  {c.form:<30} {c.group:<16} {c.error:>14.1e} {c.bound:>9.1e}{verdict}")
        lines.append("exact within the bound" if self.passed else "FAILED: do not train with these gradients here")
        return "\n".join(lines)


def check_gradients(model: str | Path | None = None, *, seed: int = 0) -> GradientCheck:
    """Compare the chain's gradients with a plain loop under autograd, on a tiny twin of ``model`` on the CPU.

    ``model`` is a ``config.json``, a model folder or a pipeline folder of Wan, HunyuanVideo, LTX or CogVideoX; ``None``
    takes a Wan. Both guidance branches are differentiated; with peft installed the twin carries LoRA layers and the
    call scales them. The bound is (roundings on the longest path) x 2^-24 x (how much the plain loop's own gradient
    moves, relatively, when its starting latents are moved by a small relative amount, at least 1).

    Raises FileNotFoundError or ValueError for a model that cannot be read, ImportError without diffusers.
    """
    config, scheduler_config = read_config(model)
    twin = make_twin(config, scheduler_config, num_inference_steps=_STEPS, seed=seed)
    if importlib.util.find_spec("peft") is not None:
        _add_lora(twin)
    generator = torch.Generator().manual_seed(seed + 1)
    weights = torch.randn(twin.latents.shape, generator=generator, dtype=twin.latents.dtype)
    direction = torch.randn(twin.latents.shape, generator=generator, dtype=twin.latents.dtype)

    def plain(latents: Tensor) -> dict[str, Tensor]:
        return _gradients(twin, latents, lambda x, c, n: (_plain_loop(twin, x, c, n) * weights).sum().backward())

    expected = plain(twin.latents)
    # Larger than the float32 noise that the moved run itself carries, small enough to be in the linear range.
    shift = 2.0**-12
    moved = plain(twin.latents + shift * direction * twin.latents.norm() / direction.norm())
    branches = 1 if twin.negative_conditioning is None else 2
    calls = branches * len(twin.scheduler.timesteps)
    roundings = 2 * calls * (_ROUNDINGS_PER_BLOCK * _num_blocks(twin) + _ROUNDINGS_PER_CALL)
    bounds = {
        group: _UNIT * roundings * max(1.0, _relative_error(moved[group], gradient) / shift)
        for group, gradient in expected.items()
    }

    comparisons = []
    for solver in ("auto", "scheduler"):
        for graph in ("chain", "steps"):
            form = f"solver={solver!r}, graph={graph!r}"
            actual = _gradients(twin, twin.latents, _our_chain(twin, weights, solver, graph))
            comparisons += [
                Comparison(form, group, _relative_error(actual[group], expected[group]), bounds[group])
                for group in expected
            ]
    return GradientCheck(config["_class_name"], type(twin.scheduler).__name__, _STEPS, comparisons)


_Backward = Callable[[Tensor, dict[str, Any], "dict[str, Any] | None"], None]


def _our_chain(twin: Twin, weights: Tensor, solver: str, graph: str) -> _Backward:
    def backward(latents: Tensor, conditioning: dict[str, Any], negative: dict[str, Any] | None) -> None:
        sample = unrolled_sample(
            twin.net,
            twin.scheduler,
            latents,
            num_inference_steps=None,
            conditioning=conditioning,
            negative_conditioning=negative,
            guidance_scale=1.0 if negative is None else _GUIDANCE,
            prepare_input=twin.prepare_input,
            solver=solver,
            graph=graph,
        )
        (sample.latents * weights).sum().backward()
        if graph == "steps":
            sample.backward()

    return backward


def _plain_loop(twin: Twin, latents: Tensor, conditioning: dict[str, Any], negative: dict[str, Any] | None) -> Tensor:
    """The sampling loop as a pipeline writes it, with the graph kept: the reference."""
    scheduler = copy.deepcopy(twin.scheduler)
    x = latents
    for t in scheduler.timesteps:
        shown = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        prediction = twin.call(shown, t, conditioning)
        if negative is not None:
            other = twin.call(shown, t, {**conditioning, **negative})
            prediction = other + _GUIDANCE * (prediction - other)
        x = scheduler.step(prediction, t, x, return_dict=False)[0]
    return x


def _gradients(twin: Twin, latents: Tensor, backward: _Backward) -> dict[str, Tensor]:
    """Run one forward and backward from fresh leaves; every group's gradients as one flat float64 vector."""
    leaf = latents.detach().clone().requires_grad_()
    texts: list[Tensor] = []

    def fresh(arguments: dict[str, Any] | None) -> dict[str, Any] | None:
        if arguments is None:
            return None
        text = arguments["encoder_hidden_states"].detach().clone().requires_grad_()
        texts.append(text)
        return {**arguments, "encoder_hidden_states": text}

    conditioning, negative = fresh(twin.conditioning), fresh(twin.negative_conditioning)
    assert conditioning is not None
    twin.net.zero_grad(set_to_none=True)
    backward(leaf, conditioning, negative)
    lora = [p for name, p in twin.net.named_parameters() if "lora_" in name]
    weights = [p for name, p in twin.net.named_parameters() if "lora_" not in name]
    groups: dict[str, Sequence[Tensor]] = {"latents": [leaf], "text embeddings": texts, "weights": weights}
    if lora:
        groups["LoRA weights"] = lora
    flat = {group: torch.cat([_flat_gradient(tensor) for tensor in leaves]) for group, leaves in groups.items()}
    twin.net.zero_grad(set_to_none=True)
    return flat


def _flat_gradient(leaf: Tensor) -> Tensor:
    gradient = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
    return gradient.detach().to(torch.float64).flatten()


def _relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


def _num_blocks(twin: Twin) -> int:
    config: Any = twin.net.config
    return int(config.num_layers) + sum(int(config.get(k, 0)) for k in ("num_single_layers", "num_refiner_layers"))


def _add_lora(twin: Twin) -> None:
    from peft import LoraConfig

    net: Any = twin.net
    # Random, not zero: with a zero second factor the first one's gradient would be zero.
    net.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    for parameter in net.parameters():
        parameter.requires_grad_()
    twin.conditioning["attention_kwargs"] = {"scale": 0.5}
