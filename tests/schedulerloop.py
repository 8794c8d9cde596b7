"""Schedulers under test, their own loop written out, and the loop over a solver."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from prfl_fast.solvers import Solver

Network = Callable[[Tensor, Tensor], Tensor]

FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}

# name -> (class, settings)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "unipc1-bh2": ("UniPCMultistepScheduler", {"solver_order": 1, **FLOW}),
    "unipc2-bh2": ("UniPCMultistepScheduler", {"solver_order": 2, **FLOW}),
    "unipc3-bh2": ("UniPCMultistepScheduler", {"solver_order": 3, **FLOW}),
    "unipc-epsilon": ("UniPCMultistepScheduler", {}),
    "ddim-epsilon": ("DDIMScheduler", {"clip_sample": False}),
    "ddim-v": ("DDIMScheduler", {"clip_sample": False, "prediction_type": "v_prediction"}),
    "ddim-zero-snr": (
        "DDIMScheduler",
        {
            "clip_sample": False,
            "prediction_type": "v_prediction",
            "rescale_betas_zero_snr": True,
            "timestep_spacing": "trailing",
        },
    ),
    "cogvideox-ddim": ("CogVideoXDDIMScheduler", {"prediction_type": "v_prediction"}),
    "dpm1-flow": ("DPMSolverMultistepScheduler", {"solver_order": 1, **FLOW}),
    "dpm2-flow": ("DPMSolverMultistepScheduler", {"solver_order": 2, **FLOW}),
    "dpm3-flow": ("DPMSolverMultistepScheduler", {"solver_order": 3, **FLOW}),
    "dpm2-epsilon": ("DPMSolverMultistepScheduler", {"solver_order": 2}),
    "dpm2-v": ("DPMSolverMultistepScheduler", {"solver_order": 2, "prediction_type": "v_prediction"}),
    "euler-epsilon": ("EulerDiscreteScheduler", {}),
    "euler-v": ("EulerDiscreteScheduler", {"prediction_type": "v_prediction"}),
    "flow-euler": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    "flow-euler-inverted": ("FlowMatchEulerDiscreteScheduler", {"invert_sigmas": True}),
    "flow-heun": ("FlowMatchHeunDiscreteScheduler", {"shift": 3.0}),
    "heun": ("HeunDiscreteScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "pndm": ("PNDMScheduler", {}),
    "deis": ("DEISMultistepScheduler", {}),
}
# UniPC's B(h) = h has no limit at sigma 0, so it needs a schedule that ends above.
CASES |= {
    f"unipc{k}-bh1": (
        "UniPCMultistepScheduler",
        {"solver_order": k, "solver_type": "bh1", "final_sigmas_type": "sigma_min", **FLOW},
    )
    for k in (1, 2, 3)
}
# Those that round latents to float32 inside their step, whatever came in.
ROUNDING = {name for name in CASES if name.startswith(("dpm", "euler", "flow"))}

STOCHASTIC: dict[str, tuple[str, dict[str, Any]]] = {
    "euler-ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "flow-euler-stochastic": ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True, "shift": 3.0}),
    "dpm-sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", **FLOW}),
    "ddpm": ("DDPMScheduler", {"clip_sample": False}),
    "lcm": ("LCMScheduler", {}),
}


def build(name: str) -> Any:
    import diffusers

    kind, settings = (CASES | STOCHASTIC)[name]
    return getattr(diffusers, kind)(**settings)


def network(x: Tensor, t: Tensor) -> Tensor:
    """Mixes the elements of a sample, depends on time, in the dtype of x."""
    return torch.tanh(0.7 * x + 0.1 * float(t) / 1000) + 0.3 * x.flip(-1)


def own_loop(
    scheduler: Any,
    steps: int | None,
    x: Tensor,
    net: Network = network,
    generator: Any = None,
    output_dtype: torch.dtype | None = None,
) -> Tensor:
    """The pipelines' loop over a copy of the scheduler."""
    scheduler = copy.deepcopy(scheduler)
    if steps is not None:
        scheduler.set_timesteps(steps)
    more = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
    kind, times, old = type(scheduler).__name__, scheduler.timesteps, None
    for i, t in enumerate(times):
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        output = net(scaled, t)
        output = output if output_dtype is None else output.to(output_dtype)
        if kind == "CogVideoXDPMScheduler":  # as in CogVideoXPipeline
            x, old = scheduler.step(output, old, t, times[i - 1] if i > 0 else None, x, return_dict=False, **more)
            continue
        if kind == "UnCLIPScheduler":  # as in UnCLIPPipeline
            more["prev_timestep"] = times[i + 1] if i + 1 < len(times) else None
        x = scheduler.step(output, t, x, return_dict=False, **more)[0]
        if kind == "SCMScheduler" and i + 2 == len(times):  # as in SanaSprintPipeline: timesteps[:-1]
            break
    return x


def solver_loop(
    solver: Solver,
    x: Tensor,
    net: Network = network,
    generator: Any = None,
    output_dtype: torch.dtype | None = None,
    stop: int | None = None,
) -> Tensor:
    state = solver.initial_state(x)
    for i in range(solver.start_step, solver.num_steps if stop is None else stop):
        noise = solver.draw_noise(i, state[0], generator, model_dtype=output_dtype)
        output = net(solver.scale_input(i, state[0]), solver.timesteps[i])
        state = solver.step(i, state, output if output_dtype is None else output.to(output_dtype), noise)
    return state[0]


@contextmanager
def without_rounding() -> Iterator[None]:
    """Latents of dtype float64 stay so: ``tensor.to(torch.float32)`` does nothing to more than one element."""
    to = torch.Tensor.to

    def kept(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        wanted = kwargs.get("dtype", args[0] if args else None)
        if wanted is torch.float32 and self.dtype is torch.float64 and self.ndim > 1:
            return self
        return to(self, *args, **kwargs)

    with mock.patch.object(torch.Tensor, "to", kept):
        yield


def distance(a: Tensor, b: Tensor) -> float:
    """Relative 2-norm of the difference."""
    return float((a.double() - b.double()).norm() / b.double().norm())
