"""A float64 problem small enough to differentiate by brute force, and the plain loop that does it."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

import prfl_fast
from prfl_fast.sampling.modes import GradientMode, resolve_mode


class TinyNet(nn.Module):
    """net(x, t, c): float64 throughout; every element depends on every other of its sample."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.first = nn.Linear(width + 1 + 4, 9)
        self.drop = nn.Dropout(dropout)
        self.blocks = nn.ModuleList([nn.Linear(9, 9) for _ in range(2)])
        self.last = nn.Linear(9, width)
        self.calls = 0

    def forward(self, x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        self.calls += 1
        time = (t.double() / 1000).reshape(-1, 1).expand(x.shape[0], 1)
        h = torch.tanh(self.first(torch.cat([x.flatten(1), time, c], 1)))
        for block in self.blocks:
            h = h + self.drop(torch.tanh(block(h)))
        return self.last(h).reshape(x.shape)


def scheduler(name: str) -> Any:
    import diffusers

    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    return {
        "unipc": lambda: diffusers.UniPCMultistepScheduler(solver_order=2, **flow),
        "unipc3": lambda: diffusers.UniPCMultistepScheduler(solver_order=3, **flow),
        "dpm": lambda: diffusers.DPMSolverMultistepScheduler(solver_order=2, **flow),
        "ddim": lambda: diffusers.DDIMScheduler(clip_sample=False, prediction_type="v_prediction"),
        "euler_epsilon": lambda: diffusers.EulerDiscreteScheduler(),
        "euler": lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        "heun": lambda: diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0),
    }[name]()


def resolved(gradient: str, steps: int, *, stop: int | None = None, seed: int = 0) -> GradientMode:
    mode = resolve_mode(
        gradient,
        num_steps=steps,
        start_step=0,
        stop_step=stop,
        supervise=None,
        generator=torch.Generator().manual_seed(seed),
    )
    return mode.masks[0]


class Problem:
    """Network, latents, conditioning and loss; the plain loop and the chain over them."""

    def __init__(self, *, seed: int, scheduler: Any, steps: int, scale: float, dropout: float = 0.0) -> None:
        g = torch.Generator().manual_seed(seed)
        self.scheduler, self.steps, self.scale = scheduler, steps, scale
        self.latents = torch.randn(2, 3, 1, 2, 1, generator=g, dtype=torch.float64).requires_grad_()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.net = TinyNet(6, dropout).double()
        self.condition = torch.randn(2, 4, generator=g, dtype=torch.float64).requires_grad_()
        self.negative = torch.randn(2, 4, generator=g, dtype=torch.float64).requires_grad_()
        self.weights = torch.randn(self.latents.shape, generator=g, dtype=torch.float64)

    def loss(self, latents: Tensor) -> Tensor:
        return (self.weights * latents).sum() + latents.square().sum() / 2

    def clear(self) -> None:
        for tensor in (self.latents, self.condition, self.negative, *self.net.parameters()):
            tensor.grad = None

    def gradients(self) -> dict[str, Tensor]:
        named = {"latents": self.latents, "condition": self.condition, "negative": self.negative}
        named.update(self.net.named_parameters())
        return {
            k: v.grad.clone() if v.is_leaf and v.grad is not None else torch.zeros_like(v) for k, v in named.items()
        }

    def sample(self, **arguments: Any) -> prfl_fast.Sample:
        guided = {"negative_conditioning": {"c": self.negative}, "guidance_scale": self.scale}
        return prfl_fast.unrolled_sample(
            self.net,
            self.scheduler,
            self.latents,
            self.steps,
            conditioning={"c": self.condition},
            **({} if self.scale == 1 else guided),
            **arguments,
        )

    def chain_gradients(self, **arguments: Any) -> dict[str, Tensor]:
        self.clear()
        sample = self.sample(**arguments)
        torch.stack([self.loss(tap.latents) for tap in sample.taps]).sum().backward()
        if arguments.get("graph") == "steps":
            sample.backward()
        return self.gradients()

    def _call(self, x: Tensor, t: Tensor, c: Tensor, parameters: float, inputs: float) -> Tensor:
        """A call with weights, written the slow way: one part carries the parameters' gradient, another the input's."""
        if parameters == inputs == 1:
            return self.net(x, t, c)
        rng = torch.get_rng_state()
        value = self.net(x.detach(), t, c)
        torch.set_rng_state(rng)
        frozen = copy.deepcopy(self.net).requires_grad_(False)
        through = frozen(x, t, c.detach())
        return value.detach() + parameters * (value - value.detach()) + inputs * (through - through.detach())

    def plain_gradients(self, mode: GradientMode | None = None, stop: int | None = None) -> dict[str, Tensor]:
        """scheduler.step in an ordinary Python loop, everything kept in one graph."""
        self.clear()
        scheduler = copy.deepcopy(self.scheduler)
        scheduler.set_timesteps(self.steps)
        x = self.latents
        for i, t in enumerate(scheduler.timesteps[: stop or self.steps]):
            weights = mode.weights(i) if mode is not None else None
            p, q = (1.0, 1.0) if weights is None else (weights.parameters, weights.input)
            scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
            m = self._call(scaled, t, self.condition, p, q)
            if self.scale != 1:
                u = self._call(scaled, t, self.negative, p, q)
                m = u + self.scale * (m - u)
            x = scheduler.step(m, t, x, return_dict=False)[0]
        self.loss(x).backward()
        return self.gradients()


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert actual.keys() == expected.keys()
    total = max(float(v.norm()) for v in expected.values())
    assert total > 0
    for key, value in expected.items():
        error = float((actual[key] - value).norm())
        # Relative to each tensor's own norm; a gradient that is zero must be zero to rounding of the largest one.
        assert error <= tolerance * max(float(value.norm()), 1e-3 * total), f"{key}: {error} of {float(value.norm())}"
