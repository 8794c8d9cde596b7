"""A failure at every network call of forward and backward of a guided chain: all is as before, the next call is right.

The chain has dropout (the global random state), noise of its scheduler (a given generator) and gradients that were
accumulated before. ``state_of`` holds all that may not change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import plainloop
import pytest
import torch
from familyloop import Case
from modelstate import assert_untouched, living, state_of
from torch import Tensor

import prfl_fast
from prfl_fast.memory.plan import MemoryPlan

pytest.importorskip("diffusers")

STEPS, CALLS = 5, 10
ERRORS = [RuntimeError, KeyboardInterrupt, torch.OutOfMemoryError, MemoryError]
GRAPHS = ["chain", "steps"]


class Rig:
    """The problem, its random states, and a switch that fails at a chosen call of the network."""

    def __init__(self, graph: str, **arguments: Any) -> None:
        import diffusers

        self.graph, self.arguments = graph, arguments
        scheduler = diffusers.EulerAncestralDiscreteScheduler()
        self.problem = plainloop.Problem(seed=1, scheduler=scheduler, steps=STEPS, scale=2.0, dropout=0.2)
        self.net = self.problem.net
        self.leaves = [self.problem.latents, self.problem.condition, self.problem.negative]
        self.generator = torch.Generator()
        self.net.blocks[0].scaling = {"default": 0.3}

    def start(self) -> None:
        """Random states and ``.grad`` of the first run."""
        torch.manual_seed(5)
        self.generator.manual_seed(6)
        for number, tensor in enumerate((*self.leaves, *self.net.parameters())):
            tensor.grad = torch.full_like(tensor, 0.5) if number % 2 else None

    def state(self) -> dict[str, Any]:
        return state_of(self.net, self.problem.scheduler, self.leaves, self.generator)

    def sample(self) -> prfl_fast.Sample:
        return self.problem.sample(graph=self.graph, generator=self.generator, **self.arguments)

    def backward(self, sample: prfl_fast.Sample) -> None:
        self.problem.loss(sample.latents).backward()
        if self.graph == "steps":
            sample.backward()

    def run(self) -> dict[str, Tensor]:
        """From the present random states: latents and all gradients."""
        sample = self.sample()
        self.backward(sample)
        return {"sample": sample.latents.detach(), **self.problem.gradients()}

    def fails(self, error: type[BaseException]) -> str:
        """Runs until the injected error comes, and checks that nothing has changed; where it came."""
        before = self.state()
        try:
            sample = self.sample()
        except error:
            assert_untouched(before, self.state())
            return "forward"
        before = self.state()
        try:
            self.backward(sample)
        except error:
            # The leaf of graph="steps" is the sample's own.
            assert_untouched(before, self.state())
            return "backward"
        return "nowhere"

    def right(self, expected: dict[str, Tensor]) -> None:
        """The next call gives the very bits."""
        plainloop.assert_same(self.run(), expected, 0.0)


def at_call(module: torch.nn.Module, number: int, error: type[BaseException]) -> Any:
    """Fails in the number-th run of the module, counted from 1."""
    runs: list[int] = []

    def hook(*_: Any) -> None:
        runs.append(1)
        if len(runs) == number:
            raise error("injected")

    return module.register_forward_pre_hook(hook)


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("error", ERRORS)
def test_a_failure_at_every_call(error: type[BaseException], graph: str) -> None:
    """Inside the second block: of the 10 calls of the forward and of the 9 recomputations of the backward."""
    rig = Rig(graph)
    rig.start()
    fresh = rig.state()
    expected = rig.run()
    alive = living(rig.problem.latents.shape)
    places = []
    for call in range(1, 2 * CALLS):
        rig.start()
        handle = at_call(rig.net.blocks[1], call, error)
        before = rig.generator.get_state()
        places.append(rig.fails(error))
        handle.remove()
        if places[-1] == "forward":
            # The draws were given back, so that the same call again is the same rollout.
            assert torch.equal(rig.generator.get_state(), before)
        else:
            rig.start()
        rig.right(expected)
    assert places == ["forward"] * CALLS + ["backward"] * (CALLS - 1)
    assert living(rig.problem.latents.shape) == alive
    # A call that went well leaves nothing either, but for its draws and gradients.
    kept = fresh.keys() - {"random", "which .grad", ".grad"}
    now = rig.state()
    assert_untouched({k: fresh[k] for k in kept}, {k: now[k] for k in kept})


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("kind", ["block's hook", "tensor's hook", "accumulation"])
def test_a_failure_inside_the_backward_itself(kind: str, graph: str) -> None:
    """In a backward hook of a block, on a block's output, or after a parameter's gradient has been accumulated: some
    gradients are new by then, some are not."""
    rig = Rig(graph)
    rig.start()
    expected = rig.run()
    parameters = list(rig.net.parameters())
    alive = living(rig.problem.latents.shape)
    chances = len(parameters) if kind == "accumulation" else CALLS
    for number in range(1, chances + 1):
        rig.start()
        fired: list[int] = []

        def fail(*_: Any, number: int = number, fired: list[int] = fired) -> None:
            fired.append(1)
            if len(fired) == number:
                raise KeyboardInterrupt

        def on_output(_module: Any, _inputs: Any, output: Tensor, fail: Callable[..., None] = fail) -> None:
            if output.requires_grad:
                output.register_hook(fail)

        if kind == "block's hook":
            handles = [rig.net.blocks[0].register_full_backward_hook(fail)]
        elif kind == "tensor's hook":
            handles = [rig.net.blocks[0].register_forward_hook(on_output)]
        else:
            handles = [p.register_post_accumulate_grad_hook(fail) for p in parameters]
        place = rig.fails(KeyboardInterrupt)
        for handle in handles:
            handle.remove()
        assert place == "backward", number
        del handles, fail, on_output
        rig.start()
        rig.right(expected)
    assert living(rig.problem.latents.shape) == alive


def wan_state(case: Case, generator: torch.Generator) -> dict[str, Any]:
    return state_of(case.net, case.scheduler, [case.latents, case.text], generator)


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("plan", ["call", "blocks"])
def test_a_failure_with_lora_scale_and_checkpointed_blocks(plan: str, graph: str) -> None:
    """Scalings, block forwards and the model's own checkpointing are changed for the duration of a call."""
    pytest.importorskip("peft")
    case, generator = Case("wan", torch.float32, lora=True), torch.Generator()
    case.net.enable_gradient_checkpointing(lambda block, *args: block(*args))
    case.net.eval()
    arguments: dict[str, Any] = {"graph": graph, "plan": MemoryPlan(plan, True)}
    expected = case.chain(**arguments)
    places = []
    with torch.autocast("cpu", torch.bfloat16, enabled=False):
        for call in range(1, 12):
            handle = at_call(case.net.proj_out, call, KeyboardInterrupt)
            before = wan_state(case, generator)
            places.append("forward")
            with pytest.raises(KeyboardInterrupt):
                sample = case.sample(**arguments)
                places[-1] = "backward"
                case.loss(sample.latents).backward()
                sample.backward()
            handle.remove()
            assert_untouched({**before, "hooks": None}, {**wan_state(case, generator), "hooks": None})
    assert places == ["forward"] * 6 + ["backward"] * 5
    again = case.chain(**arguments)
    assert all(torch.equal(again[group], expected[group]) for group in expected)


def blocks_and_branches() -> Iterator[tuple[int, int, str]]:
    for call in range(CALLS):
        for block in (0, 1):
            branch = "conditional" if call % 2 == 0 else "unconditional"
            yield call, block, f"step {call // 2}, {branch} branch, blocks.{block}: "


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("graph", GRAPHS)
def test_nonfinite_values_of_the_forward_are_named(graph: str, value: float) -> None:
    """One element of one block's output, at every call and block; in the forward and in the recomputation."""
    rig = Rig(graph, detect_nonfinite=True)
    rig.start()
    expected = rig.run()
    for call, block, text in blocks_and_branches():
        runs: list[int] = []

        def poison(
            _module: Any, _inputs: Any, output: Tensor, call: int = call, runs: list[int] = runs
        ) -> Tensor:
            runs.append(1)
            if len(runs) != call + 1:
                return output
            mask = torch.zeros_like(output, dtype=torch.bool)
            mask[1, 4] = True
            return output.masked_fill(mask, value)

        handle = rig.net.blocks[block].register_forward_hook(poison)
        rig.start()
        before = rig.state()
        with pytest.raises(FloatingPointError, match=text + "the forward gave a value that is not finite"):
            rig.sample()
        assert_untouched(before, rig.state())
        handle.remove()
    rig.right(expected)


@pytest.mark.parametrize("graph", GRAPHS)
def test_nonfinite_gradients_are_named(graph: str) -> None:
    rig = Rig(graph, detect_nonfinite=True)
    rig.start()
    expected = rig.run()
    for call, block, text in blocks_and_branches():
        runs: list[int] = []

        def poison(
            _module: Any, _inputs: Any, output: Tensor, call: int = call, runs: list[int] = runs
        ) -> None:
            runs.append(1)
            # A checkpoint's backward walks the forward's own nodes: those of the last call are its own, kept.
            if len(runs) == call + 1:
                output.register_hook(lambda gradient: gradient * float("inf"))

        handle = rig.net.blocks[block].register_forward_hook(poison)
        rig.start()
        sample = rig.sample()
        before = rig.state()
        with pytest.raises(FloatingPointError, match=text + "the backward gave a gradient that is not finite"):
            rig.backward(sample)
        handle.remove()
        assert_untouched({**before, "hooks": None}, {**rig.state(), "hooks": None})
    rig.start()
    rig.right(expected)


@pytest.mark.parametrize("graph", GRAPHS)
def test_a_recomputation_that_is_not_finite_is_named(graph: str) -> None:
    rig = Rig(graph, detect_nonfinite=True)
    for call in range(CALLS, 2 * CALLS - 1):
        runs: list[int] = []

        def poison(
            _module: Any, _inputs: Any, output: Tensor, call: int = call, runs: list[int] = runs
        ) -> Tensor:
            runs.append(1)
            return output * float("nan") if len(runs) == call + 1 else output

        handle = rig.net.blocks[0].register_forward_hook(poison)
        rig.start()
        sample = rig.sample()
        before = rig.state()
        with pytest.raises(FloatingPointError, match=r"step \d, (un)?conditional branch, blocks.0: the forward"):
            rig.backward(sample)
        assert_untouched(before, rig.state())
        handle.remove()


@pytest.mark.parametrize("graph", GRAPHS)
def test_a_value_that_is_not_finite_does_not_outlive_its_call(graph: str) -> None:
    """Without detection NaN is a value like another: it comes out, and the next call knows nothing of it."""
    rig = Rig(graph)
    rig.start()
    expected = rig.run()
    for call in range(1, 2 * CALLS):
        runs: list[int] = []

        def poison(
            _module: Any, _inputs: Any, output: Tensor, call: int = call, runs: list[int] = runs
        ) -> Tensor:
            runs.append(1)
            return output * float("nan") if len(runs) == call else output

        handle = rig.net.last.register_forward_hook(poison)
        rig.start()
        result = rig.run()
        handle.remove()
        assert result["sample"].isnan().any() == (call <= CALLS)
        rig.start()
        rig.right(expected)


def test_refusals_after_a_draw_give_it_back() -> None:
    """The random mode draws before the mask is looked at."""
    rig = Rig("chain", gradient="random:2", latent_mask=torch.ones(7))
    rig.start()
    before = rig.state()
    with pytest.raises(ValueError, match="latent_mask"):
        rig.sample()
    assert_untouched(before, rig.state())


def test_each_samples_own_generator() -> None:
    rig = Rig("chain")
    generators = [torch.Generator().manual_seed(3 + k) for k in range(2)]
    states = [g.get_state() for g in generators]
    handle = at_call(rig.net, 4, MemoryError)
    with pytest.raises(MemoryError):
        rig.problem.sample(generator=generators)
    handle.remove()
    assert all(torch.equal(g.get_state(), state) for g, state in zip(generators, states, strict=True))
    rig.problem.sample(generator=generators)
    assert not torch.equal(generators[1].get_state(), states[1])


@pytest.mark.parametrize("accumulated", [False, True])
@pytest.mark.parametrize("failing", ["older", "newer"])
def test_two_samples_in_one_backward_fail_together(failing: str, accumulated: bool) -> None:
    """The newer sample is walked first, and a leaf of its own has its whole gradient before the older one begins. The
    older one knows that leaf too, though no gradient of it: it must not take the half-way state for the one before."""
    first = plainloop.Problem(seed=1, scheduler=plainloop.scheduler("unipc"), steps=3, scale=2.0)
    older = first.sample(guidance_gradient="conditional")  # `negative` is in the request, not in the graph
    newer = first.sample()
    leaves = [first.latents, first.condition, first.negative, *first.net.parameters()]
    for leaf in leaves:
        leaf.grad = torch.full_like(leaf, 0.5) if accumulated else None
    before = [(leaf.grad, None if leaf.grad is None else leaf.grad.clone()) for leaf in leaves]
    seen: list[Tensor | None] = []

    def fail(*_: Any) -> None:
        # 6 calls: the newer one's 5 recomputations, then the older one's.
        seen.append(first.negative.grad)
        if len(seen) == (6 if failing == "older" else 5):
            raise KeyboardInterrupt

    handle = first.net.register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        (first.loss(older.latents) + first.loss(newer.latents)).backward()
    handle.remove()
    for leaf, (grad, copy) in zip(leaves, before, strict=True):
        assert leaf.grad is grad
        assert grad is None or torch.equal(grad, copy)


def test_two_samples_in_one_backward_are_their_sum() -> None:
    first = plainloop.Problem(seed=1, scheduler=plainloop.scheduler("unipc"), steps=3, scale=2.0)
    once = first.chain_gradients()
    first.clear()
    older, newer = first.sample(), first.sample(supervise=(1, 3))
    (first.loss(older.latents) + first.loss(newer.latents)).backward()
    assert not older._run.in_backward and not newer._run.in_backward
    assert older.gradient_norms.isfinite().all() and newer.gradient_norms.isfinite().all()
    # float64, a sum of two equal numbers: nothing is rounded.
    plainloop.assert_same({k: v / 2 for k, v in first.gradients().items()}, once, 1e-15)


def test_a_failed_backward_can_be_run_again() -> None:
    """retain_graph: the first backward fails, the second one through the same graph is right."""
    problem = plainloop.Problem(seed=1, scheduler=plainloop.scheduler("unipc"), steps=3, scale=2.0)
    expected = problem.chain_gradients()
    problem.clear()
    loss = problem.loss(problem.sample().latents)
    handle = at_call(problem.net, 3, MemoryError)
    with pytest.raises(MemoryError):
        loss.backward(retain_graph=True)
    handle.remove()
    assert all(g == 0 for g in (float(v.norm()) for v in problem.gradients().values()))
    loss.backward()
    plainloop.assert_same(problem.gradients(), expected, 0.0)
