"""A tiny network of each family in any dtype: gradients of the plain loop, of the chain, and of the loop in float64."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import tinyfamilies
import torch
from torch import Tensor, nn

import prfl_fast

STEPS, GUIDANCE = 3, 3.0
Context = Callable[[], AbstractContextManager[Any]]


def scheduler(name: str) -> Any:
    import diffusers

    if name == "unipc":
        flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
        return diffusers.UniPCMultistepScheduler(**flow)
    return diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)


class Case:
    """Network, latents and text of one family in one dtype, guided where the family is; every leaf is fresh."""

    def __init__(self, name: str, dtype: torch.dtype, *, lora: bool = False, batch: int = 2, solver: str = "unipc"):
        twin = tinyfamilies.make(name, batch=batch)
        if lora:
            with torch.random.fork_rng():
                torch.manual_seed(1)
                tinyfamilies.add_lora(twin.net)
        kept = getattr(twin.net, "_keep_in_fp32_modules", None) or []
        for key, parameter in twin.net.named_parameters():
            if not any(part in key.split(".") for part in kept):
                parameter.data = parameter.data.to(dtype)
        self.net, self.scheduler = twin.net, scheduler(solver)
        self.latents = twin.latents.detach().clone().requires_grad_()
        self.text = twin.conditioning["encoder_hidden_states"].detach().clone().requires_grad_()
        self.conditioning: dict[str, Any] = {**twin.conditioning, "encoder_hidden_states": self.text}
        self.negative: Tensor | None = None
        if twin.negative_conditioning is not None:
            self.negative = twin.negative_conditioning["encoder_hidden_states"].detach().clone().requires_grad_()
        if lora:
            self.conditioning["attention_kwargs"] = {"scale": 0.5}
        generator = torch.Generator().manual_seed(5)
        self.weights = torch.randn(self.latents.shape, generator=generator)

    def float64(self) -> Case:
        """The same numbers in float64, so that the loop's own rounding shows."""
        other = copy.copy(self)
        other.net = nn.Module.to(copy.deepcopy(self.net), torch.float64)

        def raised(value: Any) -> Any:
            if not isinstance(value, Tensor) or not value.is_floating_point():
                return value
            # The pipelines round these to the network's dtype before anything else.
            return value.detach().to(self.net.dtype).double().requires_grad_(value.requires_grad)

        other.latents = self.latents.detach().double().requires_grad_()
        other.conditioning = {k: raised(v) for k, v in self.conditioning.items()}
        other.text, other.negative = other.conditioning["encoder_hidden_states"], raised(self.negative)
        return other

    def leaves(self) -> dict[str, list[Tensor]]:
        named = [(k, p) for k, p in self.net.named_parameters() if p.requires_grad]
        groups = {
            "latents": [self.latents],
            "text": [t for t in (self.text, self.negative) if t is not None],
            "weights": [p for k, p in named if "lora_" not in k],
            "lora": [p for k, p in named if "lora_" in k],
        }
        return {name: tensors for name, tensors in groups.items() if tensors}

    def gradients(self) -> dict[str, Tensor]:
        """Each group's gradient as one float64 vector; the leaves' ``.grad`` is taken away."""
        flat = {}
        for name, tensors in self.leaves().items():
            grads = [torch.zeros_like(t) if t.grad is None else t.grad for t in tensors]
            flat[name] = torch.cat([g.detach().double().flatten() for g in grads])
            for tensor in tensors:
                tensor.grad = None
        return flat

    def loss(self, latents: Tensor) -> Tensor:
        return (latents.to(self.latents.dtype) * self.weights.to(self.latents.dtype)).sum()

    def plain(self, inside: Context = nullcontext) -> dict[str, Tensor]:
        """The loop as the pipelines write it, kept in one graph."""
        own = copy.deepcopy(self.scheduler)
        own.set_timesteps(STEPS)
        with inside():
            x = self.latents
            for t in own.timesteps:
                m = tinyfamilies.plain_call(self.net, x, t, self.conditioning)
                if self.negative is not None:
                    other = {**self.conditioning, "encoder_hidden_states": self.negative}
                    u = tinyfamilies.plain_call(self.net, x, t, other)
                    m = u + GUIDANCE * (m - u)
                x = own.step(m, t, x, return_dict=False)[0]
            loss = self.loss(x)
        loss.backward()
        return self.gradients()

    def sample(self, **arguments: Any) -> prfl_fast.Sample:
        if self.negative is not None:
            negative = {"encoder_hidden_states": self.negative}
            arguments = {"negative_conditioning": negative, "guidance_scale": GUIDANCE, **arguments}
        arguments = {"conditioning": self.conditioning, **arguments}
        return prfl_fast.unrolled_sample(self.net, self.scheduler, self.latents, STEPS, **arguments)

    def backward(self, inside: Context = nullcontext, **arguments: Any) -> None:
        with inside():
            sample = self.sample(**arguments)
            loss = self.loss(sample.latents)
        loss.backward()
        if arguments.get("graph") == "steps":
            sample.backward()

    def chain(self, inside: Context = nullcontext, **arguments: Any) -> dict[str, Tensor]:
        self.backward(inside, **arguments)
        return self.gradients()


@functools.cache
def reference(
    name: str, dtype: torch.dtype, lora: bool = False
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The plain loop's gradients, and by how much their own rounding moves them: their distance to float64's."""
    case = Case(name, dtype, lora=lora)
    truth = case.float64().plain()
    plain = case.plain()
    return plain, {group: float((plain[group] - truth[group]).norm()) for group in plain}


def error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())
