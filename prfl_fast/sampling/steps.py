"""The chain as a tape that is walked back step by step (``graph="steps"``).

The discrete adjoint of ``z[i+1] = A z[i] + B m[i]``, ``m[i] = net(x[i])``, ``x[i] = z[i][0]``:

    lam[i] = A^T lam[i+1] + e_x vjp_net(x[i]; B^T lam[i+1])

One backward per step: the parameters' gradients are reduced and sharded step by step, which full fine-tuning of a
sharded model needs, and one call's graph lives at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.utils._pytree import tree_map_only
from tqdm import tqdm

from prfl_fast.sampling.calls import Caller
from prfl_fast.sampling.modes import CONSTANT, EXACT, StepWeights
from prfl_fast.sampling.request import Conditioning, Request
from prfl_fast.sampling.run import Backward, Run
from prfl_fast.sampling.sample import Sample, Tap, TapLoss

Cotangents = tuple[Tensor | None, ...]


@dataclass
class _Record:
    """One step of the tape. ``x`` is the network's input, cut from the step before. Of each guidance branch (one where
    the prediction was combined) ``edges`` holds the graph of the call (a checkpoint), None for a constant one,
    ``dtypes`` the dtype and ``shares`` its part of the gradient; ``scale`` is guidance's. ``prediction``, ``state`` and
    ``noise`` are kept for a solver that is not linear; a linear one needs no record at all of a step that gives no
    gradient, and of the others no value but x."""

    x: Tensor
    edges: tuple[GradientEdge | None, ...]
    dtypes: tuple[torch.dtype, ...]
    shares: tuple[float, ...]
    scale: float
    prediction: Tensor | None = None
    state: tuple[Tensor, ...] | None = None
    noise: tuple[Tensor, ...] = ()


@dataclass
class _Sweep:
    """Taps with one adjoint: their masks agree on every step that is still to come."""

    tap: int
    cotangents: Cotangents


class _LeafConditioning:
    """Conditioning cut into leaves, so that a text encoder's graph is walked once, after the last step."""

    def __init__(self, request: Request) -> None:
        self._leaves: dict[int, tuple[Tensor, Tensor]] = {}
        self.positive = tuple(self._cut(kwargs) for kwargs in request.conditioning)
        self.negative = tuple(self._cut(kwargs) for kwargs in request.negative)

    def _cut(self, conditioning: Conditioning) -> Conditioning:
        cut: Conditioning = tree_map_only(Tensor, self._leaf, conditioning)
        return cut

    def _leaf(self, value: Tensor) -> Tensor:
        if not value.requires_grad:
            return value
        return self._leaves.setdefault(id(value), (value, value.detach().requires_grad_()))[1]

    def backward(self) -> None:
        pairs = [(value, leaf.grad) for value, leaf in self._leaves.values() if leaf.grad is not None]
        if pairs:
            torch.autograd.backward([value for value, _ in pairs], [grad for _, grad in pairs])


class StepTape:
    """The tape of one chain; see the module's text."""

    def __init__(self, request: Request, run: Run, conditioning: _LeafConditioning) -> None:
        self._request: Request | None = request
        self._run = run
        self._conditioning = conditioning
        self._records: dict[int, _Record] = {}

    def record(self, step: int, record: _Record) -> None:
        """Adds a step."""
        self._records[step] = record

    def nodes(self) -> list[Node]:
        """Ends of the calls' graphs that are still to be walked."""
        return [edge.node for record in self._records.values() for edge in record.edges if edge is not None]

    def backward(
        self, taps: Sequence[Tap], gradient: Tensor | Sequence[Tensor | None] | TapLoss | None
    ) -> Tensor | None:
        """The reverse sweep; see Sample.backward."""
        if self._request is None:
            raise RuntimeError("sample.backward() was called before: the tape is used up; sample again")
        given = _given(taps, gradient)
        request, run = self._request, self._run
        backward = Backward()
        backward.begin(run)
        self._request = None
        with run.undoing():
            total = self._sweep(request, taps, given, gradient if callable(gradient) else None)
            backward.end()
        return total

    def _sweep(
        self, request: Request, taps: Sequence[Tap], given: Sequence[Tensor | None], loss_fn: TapLoss | None
    ) -> Tensor | None:
        total: Tensor | None = None
        sweeps: list[_Sweep] = []
        for step in reversed(range(request.start_step, request.last_step)):
            for index, tap in enumerate(taps):
                if tap.step == step + 1:
                    cotangent = given[index]
                    if loss_fn is not None:
                        cotangent, loss = _tap_gradient(tap, loss_fn)
                        total = loss if total is None else total + loss
                    if cotangent is not None:
                        _join(request, sweeps, _Sweep(index, (cotangent,)), step)
            sweeps = _merge(request, sweeps, step)
            self._step_back(request, sweeps, step)
        self._conditioning.backward()
        if request.latents.requires_grad:
            ends = [s.cotangents[0] for s in sweeps if s.cotangents[0] is not None]
            if ends:
                torch.autograd.backward(request.latents, torch.stack(ends).sum(0).to(request.latents.dtype))
        return total

    def _step_back(self, request: Request, sweeps: list[_Sweep], step: int) -> None:
        record = self._records.pop(step, None)
        kept = (None, None, ()) if record is None else (record.state, record.prediction, record.noise)
        for number, sweep in enumerate(sweeps):
            weights = request.mode.weights(sweep.tap, step)
            called = record is not None and not weights.zero
            into_state, into_branches = request.solver.pullback(
                step,
                *kept,
                sweep.cotangents,
                request.latent_mask,
                output_dtypes=record.dtypes if record is not None and called else (),
                guidance_scale=record.scale if record is not None else 1.0,
            )
            if record is not None and any(gradient is not None for gradient in into_branches):
                self._run.record(step, into_branches, record.shares)
                into_x = _call_back(record, into_branches, weights, retain=number < len(sweeps) - 1)
                if into_x is not None:
                    into_x = into_x if into_state[0] is None else into_x + into_state[0]
                    into_state = (into_x, *into_state[1:])
            sweep.cotangents = into_state


def _given(
    taps: Sequence[Tap], gradient: Tensor | Sequence[Tensor | None] | TapLoss | None
) -> Sequence[Tensor | None]:
    if callable(gradient):
        return [None] * len(taps)
    if gradient is None:
        given: Sequence[Tensor | None] = [tap.latents.grad for tap in taps]
        if all(g is None for g in given):
            raise RuntimeError(
                "sample.backward(): no gradient has reached sample.latents; call loss.backward() first, or pass the "
                "gradient or a loss function"
            )
        return given
    given = [*([None] * (len(taps) - 1)), gradient] if isinstance(gradient, Tensor) else list(gradient)
    if len(given) != len(taps):
        raise ValueError(f"gradient: expected one entry per tap ({len(taps)}), got {len(given)}")
    for tap, entry in zip(taps, given, strict=True):
        if entry is not None and entry.shape != tap.latents.shape:
            raise ValueError(f"gradient: expected shape {tuple(tap.latents.shape)}, got {tuple(entry.shape)}")
    return given


def _tap_gradient(tap: Tap, loss_fn: TapLoss) -> tuple[Tensor | None, Tensor]:
    leaf = tap.latents.detach().requires_grad_()
    loss = loss_fn(leaf, tap.timestep, tap.step)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise TypeError("sample.backward(loss_fn): the function must give one number as a tensor")
    loss.backward()
    return leaf.grad, loss.detach()


def _same_below(request: Request, a: int, b: int, step: int) -> bool:
    """True where two taps' masks agree on this step and on all before it: then their adjoints may be summed."""
    mode = request.mode
    return all(mode.weights(a, i) == mode.weights(b, i) for i in range(request.start_step, step + 1))


def _add(a: Cotangents, b: Cotangents) -> Cotangents:
    length = max(len(a), len(b))
    padded = [(*t, *([None] * (length - len(t)))) for t in (a, b)]
    return tuple(y if x is None else x if y is None else x + y for x, y in zip(*padded, strict=True))


def _join(request: Request, sweeps: list[_Sweep], new: _Sweep, step: int) -> None:
    for sweep in sweeps:
        if _same_below(request, sweep.tap, new.tap, step):
            sweep.cotangents = _add(sweep.cotangents, new.cotangents)
            return
    sweeps.append(new)


def _merge(request: Request, sweeps: list[_Sweep], step: int) -> list[_Sweep]:
    merged: list[_Sweep] = []
    for sweep in sweeps:
        _join(request, merged, sweep, step)
    return merged


def _call_back(record: _Record, gradients: Cotangents, weights: StepWeights, *, retain: bool) -> Tensor | None:
    """Parameter gradients into ``.grad`` and the input's gradient back, each by its weight."""
    x = record.x
    pairs = [(e, g) for e, g in zip(record.edges, gradients, strict=True) if e is not None and g is not None]
    if not pairs:
        return None
    wants_x = x.requires_grad and weights.input != 0
    if weights.parameters == 0 and not wants_x:
        return None
    factor = weights.parameters or weights.input
    edges, scaled = zip(*((edge, g if factor == 1 else g * factor) for edge, g in pairs), strict=True)
    if weights.parameters == 0:
        (only,) = torch.autograd.grad(edges, x, scaled, retain_graph=retain, allow_unused=True)
        return only
    x.grad = None
    torch.autograd.backward(edges, scaled, retain_graph=retain)
    into_x, x.grad = x.grad, None
    return into_x * (weights.input / weights.parameters) if wants_x and into_x is not None else None


def _passes_input(request: Request, step: int) -> bool:
    """True where some gradient into this step's input can end anywhere: dead ones are not computed."""
    passes = any(
        step < tap and request.mode.weights(k, step).input != 0 for k, tap in enumerate(request.mode.taps)
    )
    earlier = any(request.differentiated(i) for i in range(request.start_step, step))
    return passes and (earlier or request.latents.requires_grad)


def run_steps(request: Request) -> Sample:
    """Samples, and keeps the tape."""
    run = Run(request)
    conditioning = _LeafConditioning(request)
    caller = Caller(request, run, conditioning.positive, conditioning.negative, own_backwards=True)
    tape = StepTape(request, run, conditioning)
    solver, mode = request.solver, request.mode
    differentiated = [i for i in range(request.start_step, request.last_step) if request.differentiated(i)]
    state = solver.initial_state(request.latents.detach())
    taps: dict[int, Tap] = {}
    last_input = last_prediction = request.latents
    steps = range(request.start_step, request.last_step)
    with tqdm(steps, desc="sampling", unit="step", disable=not request.progress) as bar:
        for step in bar:
            x = state[0].detach()
            if step in differentiated:
                x.requires_grad_(_passes_input(request, step))
                keep = step == differentiated[-1] and request.plan.keep_last_call
                prediction = caller.predict(step, x, EXACT, keep)
            else:
                prediction = caller.predict(step, x, CONSTANT, False)
            # After the call, as in the scheduler's own loop: dropout and noise may share a generator.
            noise = solver.draw_noise(step, x, request.generator, model_dtype=prediction.dtype)
            # The graph outlives this step, the prediction does not.
            edges = tuple(get_gradient_edge(b) if b.requires_grad else None for b in prediction.branches)
            prediction = prediction.detach()
            dtypes = tuple(b.dtype for b in prediction.branches)
            record = _Record(x, edges, dtypes, prediction.shares, prediction.scale)
            if not solver.linear:
                record.prediction, record.state, record.noise = prediction.output, state, noise
            if step in differentiated or not solver.linear:
                tape.record(step, record)
            if step + 1 == request.last_step:
                last_input, last_prediction = x.detach(), prediction.combined()
            with torch.no_grad():
                state = solver.step(
                    step,
                    state,
                    prediction.output,
                    noise,
                    request.latent_mask,
                    unconditional=prediction.unconditional,
                    guidance_scale=prediction.scale,
                )
            del x, prediction, record, noise  # the next calls would live beside them
            for index, tap in enumerate(mode.taps):
                if tap == step + 1:
                    leaf = state[0].detach().clone()
                    leaf.requires_grad_(bool(differentiated) or request.latents.requires_grad)
                    taps[index] = Tap(leaf, request.timestep_after(tap), float(solver.sigmas[tap]), tap)
    return Sample(
        taps=tuple(taps[k] for k in range(len(mode.taps))),
        plan=request.plan,
        gradient_mode=mode.name,
        _run=run,
        _last_input=last_input,
        _last_prediction=last_prediction,
        _original=solver.original_coefficients(request.last_step - 1),
        _tape=tape,
    )
