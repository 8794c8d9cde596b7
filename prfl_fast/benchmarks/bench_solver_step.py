"""Solver step, forward and transpose: our backends beside plain torch, torch.compile and diffusers' own step.

The step is UniPC's (order 2, flow shift 3, step 20 of 40) with guidance, on float32 latents and bfloat16 network
outputs, as Wan is sampled: guidance in bfloat16, the step in float32. The new state has four entries, one of which is
handed on; the other three are computed, and the new latents also in bfloat16 for the next network call.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from prfl_fast.benchmarks.contest import AbsentError, Contest, Contestant, Forward, ours
from prfl_fast.benchmarks.registry import Row, Setting
from prfl_fast.ops import StepCoefficients, solver_step

# Latents [B, C, F, H, W] of Wan 2.1 at 81 frames; a quarter of that for a CPU.
SHAPES = {
    "cuda": {"480p": (1, 16, 21, 60, 104), "720p": (1, 16, 21, 90, 160)},
    "cpu": {"480p": (1, 16, 21, 60, 104), "quarter of 480p": (1, 16, 21, 30, 52)},
    "tiny": {"tiny": (2, 4, 3, 5, 7)},
}
MODEL_DTYPE = torch.bfloat16
STEPS, STEP = 40, 20
GUIDANCE = 5.0
SCHEDULER = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}

# What SolverTable reads from the scheduler above, here as numbers so that diffusers need not be there; a test holds
# the two together. State: latents, the corrected latents before, two denoised predictions.
COEFFICIENTS = StepCoefficients(
    A=(
        (0.0482044479097999, 0.9512791042690836, -0.001913635335254353, 0.00243006615436951),
        (0.010100156793892923, 0.9762476086616516, -0.0019638630886651505, 0.015616106946346362),
        (0.0, 0.0, 0.0, 1.0),
        (1.0, 0.0, 0.0, 0.0),
    ),
    B=(-0.03617140267050582, -0.007578903073649215, 0.0, -0.7503747940063477),
    C=((), (), (), ()),
)
COMPUTED = (0, 1, 3)  # entry 2 is entry 3 of before, the same tensor


def details(setting: Setting) -> dict[str, Any]:
    """What stands above the rows."""
    return {
        "scheduler": {"class": "UniPCMultistepScheduler", **SCHEDULER, "steps": STEPS, "step": STEP},
        "guidance_scale": GUIDANCE,
        "seconds_per_measurement": setting.seconds,
    }


def rows(setting: Setting) -> Iterator[Row]:
    """All contestants at one shape after the other."""
    device = torch.device(setting.device)
    for name, shape in SHAPES["tiny" if setting.tiny else setting.kind].items():
        yield from contest(name, shape, device, setting.tiny).rows(setting)


def bytes_moved(elements: int) -> dict[str, int]:
    """Every tensor once. Forward: four entries and two outputs read; three entries and x' in bfloat16 written.
    Transpose: cotangents of those results read; gradients of four entries and of two outputs written."""
    state, output = torch.float32.itemsize, MODEL_DTYPE.itemsize
    results, inputs = len(COMPUTED) * state + output, len(COEFFICIENTS.A) * state + 2 * output
    return {"forward": elements * (inputs + results), "backward": elements * (results + inputs)}


def contest(name: str, shape: tuple[int, ...], device: torch.device, tiny: bool) -> Contest:
    """Random tensors of this shape, and what is right for them."""
    generator = torch.Generator(device).manual_seed(0)

    def draw() -> Tensor:
        return torch.randn(shape, device=device, generator=generator)

    state = [draw().requires_grad_() for _ in COEFFICIENTS.A]
    outputs = [draw().to(MODEL_DTYPE).requires_grad_() for _ in range(2)]
    cotangents = [*(draw() for _ in COMPUTED), draw().to(MODEL_DTYPE)]

    def forward() -> tuple[Tensor, ...]:
        new = solver_step(tuple(state), tuple(outputs), COEFFICIENTS, guidance_scale=GUIDANCE, model_dtype=MODEL_DTYPE)
        return (*(new[i] for i in COMPUTED), new[-1])

    expected, scales = exact(state, outputs, cotangents)
    # Ours: one rounding of a float64 sum, then those of the guidance's gradient: the cast, the product, the difference.
    # Torch in float32: five products and four sums a row, where ours has one rounding.
    contestants = ours(("reference", "cpu", "triton", "cuda"), forward, device, roundings=4)
    contestants += [
        Contestant("torch", lambda: lambda: plain(state, outputs), roundings=12),
        # It fuses guidance without the roundings to bfloat16 that are asked for.
        Contestant("torch.compile", lambda: compiled(state, outputs, tiny), roundings=12, computes_in=torch.bfloat16),
        # It multiplies the output by sigma in bfloat16; then as torch.
        Contestant("diffusers", lambda: diffusers_step(state, outputs), roundings=13, computes_in=torch.bfloat16),
    ]
    labels = {"op": "solver_step", "shape": name, "sizes": list(shape), "dtype": "float32, bfloat16 outputs"}
    inputs = (*state, *outputs)
    return Contest(
        labels, device, inputs, cotangents, expected, scales, bytes_moved(state[0].numel()), tuple(contestants)
    )


def exact(
    state: Sequence[Tensor], outputs: Sequence[Tensor], cotangents: Sequence[Tensor]
) -> tuple[list[Tensor], list[float]]:
    """Results and gradients in float64 after guidance in the outputs' dtype, and the norms of what each adds up."""
    z, m = [t.detach().double() for t in state], guided(*(t.detach() for t in outputs)).double()
    g = [t.double() for t in cotangents[:-1]]
    g[0] = g[0] + cotangents[-1].double()
    columns = list(range(len(z)))
    A, B = COEFFICIENTS.A, COEFFICIENTS.B
    results = [sum((A[i][j] * z[j] for j in columns), B[i] * m) for i in COMPUTED]
    into_state = [sum(A[i][j] * gi for i, gi in zip(COMPUTED, g, strict=True)) for j in columns]
    into_m = sum(B[i] * gi for i, gi in zip(COMPUTED, g, strict=True))

    def norm(t: Tensor) -> float:
        return float(torch.linalg.vector_norm(t))

    sizes = [sum(abs(A[i][j]) * norm(z[j]) for j in columns) + abs(B[i]) * norm(m) for i in COMPUTED]
    column_sizes = [sum(abs(A[i][j]) * norm(gi) for i, gi in zip(COMPUTED, g, strict=True)) for j in columns]
    m_size = sum(abs(B[i]) * norm(gi) for i, gi in zip(COMPUTED, g, strict=True))
    expected = [*results, results[0], *into_state, GUIDANCE * into_m, (1 - GUIDANCE) * into_m]
    scales = [*sizes, sizes[0], *column_sizes, GUIDANCE * m_size, (1 + GUIDANCE) * m_size]
    return [torch.as_tensor(t) for t in expected], scales


def guided(conditional: Tensor, unconditional: Tensor) -> Tensor:
    """As the pipeline computes it."""
    return unconditional + GUIDANCE * (conditional - unconditional)


def plain(state: Sequence[Tensor], outputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """As one would write the step by hand in float32."""
    m = guided(*outputs).float()
    new = []
    for i in COMPUTED:
        total = COEFFICIENTS.B[i] * m
        for a, z in zip(COEFFICIENTS.A[i], state, strict=True):
            total = total + a * z if a != 0 else total
        new.append(total)
    return (*new, new[0].to(MODEL_DTYPE))


def compiled(state: Sequence[Tensor], outputs: Sequence[Tensor], tiny: bool) -> Forward:
    """The same through torch.compile, where a compiler works."""
    if tiny:
        raise AbsentError("left out of a tiny run: compiling takes longer than all the rest")
    torch.compiler.reset()
    run = torch.compile(plain)
    try:
        results = run(state, outputs)
        torch.autograd.grad(results, [*state, *outputs], [torch.zeros_like(r) for r in results])
    except torch._dynamo.exc.TorchDynamoException as error:
        raise AbsentError(f"torch.compile does not work here: {str(error).strip().splitlines()[0]}") from None
    return lambda: run(state, outputs)


def diffusers_step(state: Sequence[Tensor], outputs: Sequence[Tensor]) -> Forward:
    """The scheduler's own step in the same state, after the same guidance."""
    try:
        import diffusers
    except ImportError:
        raise AbsentError("diffusers is not installed") from None
    scheduler = diffusers.UniPCMultistepScheduler(**SCHEDULER)
    scheduler.set_timesteps(STEPS, device=state[0].device)
    timestep = scheduler.timesteps[STEP]
    order = scheduler.config.solver_order

    def step() -> tuple[Tensor, ...]:
        scheduler._step_index, scheduler.this_order, scheduler.lower_order_nums = STEP, order, order
        scheduler.last_sample, scheduler.model_outputs = state[1], list(state[2:])
        x = scheduler.step(guided(*outputs), timestep, state[0], return_dict=False)[0]
        return x, scheduler.last_sample, scheduler.model_outputs[-1], x.to(MODEL_DTYPE)

    return step
