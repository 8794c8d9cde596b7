"""Progress bars of both ways, and what a failure anywhere in them leaves behind: nothing."""

from __future__ import annotations

import io
import os
import signal
from typing import Any

import plainloop
import pytest
import torch
from torch import Tensor
from tqdm import tqdm

import prfl_fast

pytest.importorskip("diffusers")
STEPS = 4


def make(scale: float = 2.0) -> plainloop.Problem:
    return plainloop.Problem(seed=1, scheduler=plainloop.scheduler("unipc"), steps=STEPS, scale=scale)


def open_bars() -> list[Any]:
    return list(tqdm._instances)


def run(problem: plainloop.Problem, graph: str, **arguments: Any) -> prfl_fast.Sample:
    sample = problem.sample(graph=graph, **arguments)
    problem.loss(sample.latents).backward()
    if graph == "steps":
        sample.backward()
    return sample


@pytest.mark.parametrize("graph", ["chain", "steps"])
def test_bars_of_forward_and_backward(graph: str, capsys: pytest.CaptureFixture[str]) -> None:
    run(make(), graph)
    assert capsys.readouterr().err == ""
    run(make(), graph, progress=True)
    shown = capsys.readouterr().err
    for name, count in (("sampling", STEPS), ("backward", STEPS)):
        assert f"{name}: 100%" in shown and f"{count}/{count}" in shown
    run(make(), graph, progress=True, gradient="last:1")
    shown = capsys.readouterr().err
    assert f"{STEPS}/{STEPS}" in shown and "backward: 100%" in shown and "1/1" in shown
    assert not open_bars()


class Failing(torch.autograd.Function):
    """Fails in the backward of an operation of the network itself, as a kernel does that is out of memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, error: BaseException | None) -> Tensor:
        ctx.error = error
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        if ctx.error is not None:
            raise ctx.error
        return gradients[0], None


class Interrupting(torch.autograd.Function):
    """Ctrl-C in the midst of the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, now: bool) -> Tensor:
        ctx.now = now
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        if ctx.now:
            os.kill(os.getpid(), signal.SIGINT)
        return gradients[0], None


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("graph", ["chain", "steps"])
@pytest.mark.parametrize("kind", ["out of memory", "interrupt"])
@pytest.mark.parametrize("call", range(2 * STEPS))
def test_a_failure_inside_a_backward_operation_is_undone(call: int, kind: str, graph: str) -> None:
    """The forward's calls are numbered, and the backward walks their nodes, so every step's backward fails once."""
    problem = make()
    expected = problem.chain_gradients(graph=graph)
    for p in problem.net.parameters():
        p.grad = torch.ones_like(p)
    own = [p.grad for p in problem.net.parameters()]
    problem.net.calls = 0

    def hook(module: Any, inputs: Any, output: Tensor) -> Tensor:
        hit = problem.net.calls == call + 1
        if kind == "interrupt":
            return Interrupting.apply(output, hit)
        return Failing.apply(output, torch.OutOfMemoryError("injected") if hit else None)

    handle = problem.net.register_forward_hook(hook)
    with pytest.raises(KeyboardInterrupt if kind == "interrupt" else torch.OutOfMemoryError):
        run(problem, graph, progress=True)
    assert not open_bars()
    assert all(p.grad is g for p, g in zip(problem.net.parameters(), own, strict=True))
    assert all(bool((g == 1).all()) for g in own)
    handle.remove()
    plainloop.assert_same(problem.chain_gradients(graph=graph), expected, 0.0)


def test_a_failure_in_the_users_own_hooks_is_undone() -> None:
    """A hook on a parameter runs after its gradient is summed, when others are in `.grad` already."""
    problem = make()
    names, parameters = zip(*problem.net.named_parameters(), strict=True)
    reached = []

    def failing(gradient: Tensor) -> None:
        reached.extend(n for n, p in zip(names, parameters, strict=True) if p.grad is not None)
        raise RuntimeError("of the user's")

    handle = problem.net.first.weight.register_hook(failing)
    sample = problem.sample()
    with pytest.raises(RuntimeError, match="of the user's"):
        problem.loss(sample.latents).backward(retain_graph=True)
    assert reached, "some gradients must have been there, or this shows nothing"
    assert all(p.grad is None for p in parameters) and problem.latents.grad is None
    handle.remove()
    problem.loss(sample.latents).backward()
    actual = problem.gradients()
    plainloop.assert_same(actual, problem.chain_gradients(), 1e-12)


@pytest.mark.parametrize("graph", ["chain", "steps"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_no_bar_stays_open_after_a_failure_in_a_call(graph: str, error: type[BaseException]) -> None:
    for call in range(1, 4 * STEPS):
        problem = make()

        def hook(module: Any, inputs: Any, call: int = call) -> None:
            if module.calls + 1 == call:
                raise error("injected")

        problem.net.register_forward_pre_hook(hook)
        # The exception is held, and its frames with it, while the bars are looked at.
        with pytest.raises(error) as caught:
            run(problem, graph, progress=True)
        assert not open_bars(), f"call {call}"
        assert caught.value is not None


def test_a_loss_that_fails_in_its_own_backward_leaves_the_chain_usable() -> None:
    problem = make()
    expected = problem.chain_gradients()
    problem.clear()
    sample = problem.sample(progress=True)
    with pytest.raises(torch.OutOfMemoryError):
        problem.loss(Failing.apply(sample.latents, torch.OutOfMemoryError("reward"))).backward(retain_graph=True)
    assert not open_bars()
    problem.loss(sample.latents).backward()
    plainloop.assert_same(problem.gradients(), expected, 0.0)


def test_two_samples_in_one_backward_that_fails() -> None:
    problem = make()
    first, second = problem.sample(), problem.sample()
    problem.net.first.weight.register_hook(lambda g: (_ for _ in ()).throw(RuntimeError("of the user's")))
    with pytest.raises(RuntimeError, match="of the user's"):
        (problem.loss(first.latents) + problem.loss(second.latents)).backward()
    assert all(p.grad is None for p in problem.net.parameters())


def test_bars_go_to_standard_error_as_tqdm_does(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr("sys.stderr", stream)
    run(make(1.0), "chain", progress=True)
    assert "sampling" in stream.getvalue() and "backward" in stream.getvalue()
