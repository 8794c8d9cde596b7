"""Every family in tiny form through the chain against a plain loop over calls written out as its pipeline writes them:
latents and every gradient (weights, LoRA at a scale, initial latents, conditioning of both branches).

Plain loop and ``solver="scheduler"``, ``graph="chain"`` are the same operations, so they agree bit for bit. The others
sum in another order. In float64 that is far below 1e-10. Where network or scheduler round to float32 on the way, a
rounding may fall on the other side: such results are two float32 computations, of some 12 roundings in a row in a block
and as many around 2 blocks in 3 steps, forward and backward: 216, which add up as a random walk does, to 15; with the
same again for the network's condition 30, and two of them lie up to twice that apart. Kandinsky rounds its rotated
queries and keys to bfloat16: a rounding in each of 3 blocks in 3 steps, forward and backward, and again for the keys:
36, as a random walk 6.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any

import familynets
import plainloop
import pytest
import torch
from familynets import FAMILIES, SCALE
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import prfl_fast

pytest.importorskip("diffusers")
pytest.importorskip("peft")

STEPS, GUIDANCE = 3, 2.5
FLOAT64, FLOAT32, BFLOAT16 = 1e-10, 2 * 30 * 2.0**-24, 2 * 6 * 2.0**-9
FORMS = [("scheduler", "chain"), ("scheduler", "steps"), ("table", "chain"), ("table", "steps")]


class Case:
    """A family ready to be differentiated: everything trainable, float tensors of the conditioning are leaves."""

    def __init__(self, name: str) -> None:
        import peft

        with torch.random.fork_rng():
            torch.manual_seed(len(name))
            self.family = family = FAMILIES[name]()
            self.nets: list[nn.Module] = [net for net in (family.net, family.other) if net is not None]
            for net in self.nets:
                config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=list(family.lora), init_lora_weights=False)
                peft.inject_adapter_in_model(config, net)
                # Module.to itself: diffusers' own would keep parts in float32.
                nn.Module.to(net, family.dtype).requires_grad_(True)
            self.latents = family.latents.to(family.dtype).requires_grad_()
            scaled = {} if family.scale is None else {family.scale: dict(SCALE)}
            self.keywords = {**self._leaves(family.keywords), **scaled}
            self.negative = self._leaves(family.negative)
            self.weights = torch.randn(family.latents.shape, dtype=family.dtype)
        self.scheduler = familynets.scheduler(family.scheduler)

    def _leaves(self, keywords: dict[str, Any]) -> dict[str, Any]:
        def leaf(value: Tensor) -> Tensor:
            return value.detach().to(self.family.dtype).requires_grad_() if value.is_floating_point() else value

        leaves: dict[str, Any] = tree_map_only(Tensor, leaf, keywords)
        return leaves

    def results(self, latents: Tensor) -> dict[str, Tensor]:
        """Latents and all gradients by name; the leaves' ``.grad`` is taken away."""
        named: list[tuple[str, Any]] = [("initial", self.latents)]
        for branch, keywords in (("positive", self.keywords), ("negative", self.negative)):
            named += [(f"{branch}.{k}.{i}", v) for k, vs in keywords.items() for i, v in enumerate(tree_leaves(vs))]
        for i, net in enumerate(self.nets):
            named += [(f"{i}.{k}", p) for k, p in net.named_parameters()]
        found = {"latents": latents.detach()}
        for name, value in named:
            if isinstance(value, Tensor) and value.requires_grad:
                found[name] = torch.zeros_like(value) if value.grad is None else value.grad
                value.grad = None
        return found

    def plain(self) -> dict[str, Tensor]:
        """The pipelines' loop, kept in one graph."""
        family, own = self.family, copy.deepcopy(self.scheduler)
        own.set_timesteps(STEPS)
        generator = torch.Generator().manual_seed(1)
        drawn = {"generator": generator} if "generator" in inspect.signature(own.step).parameters else {}
        x = self.latents
        for t in own.timesteps:
            high = t >= family.boundary
            net, scale = (family.net, GUIDANCE) if high else (family.other, family.more["guidance_scale_2"])

            def branch(keywords: dict[str, Any], net: Any = net, x: Tensor = x, t: Tensor = t) -> Tensor:
                # Each scales and casts the latents on its own, so that their gradients are cast on their own, too.
                scaled = own.scale_model_input(x, t) if hasattr(own, "scale_model_input") else x
                return family.call(net, scaled.to(family.dtype), t, keywords)

            c, u = branch(self.keywords), branch({**self.keywords, **self.negative})
            moved = own.step(u + scale * (c - u), t, x, return_dict=False, **drawn)[0]
            x = moved if family.mask is None else torch.where(family.mask, moved, x)
        (x * self.weights).sum().backward()
        return self.results(x)

    def sample(self, **arguments: Any) -> prfl_fast.Sample:
        return prfl_fast.unrolled_sample(
            self.family.net, self.scheduler, self.latents, STEPS, conditioning=self.keywords,
            negative_conditioning=self.negative, guidance_scale=GUIDANCE, generator=torch.Generator().manual_seed(1),
            **{**self.family.more, **arguments},
        )  # fmt: skip

    def chain(self, **arguments: Any) -> dict[str, Tensor]:
        sample = self.sample(**arguments)
        (sample.latents * self.weights).sum().backward()
        if arguments.get("graph") == "steps":
            sample.backward()
        return self.results(sample.latents)


class Rounds(TorchDispatchMode):
    """Sees whether latents or anything made of them is rounded from float64 to float32 while it is active."""

    seen = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        wide = any(isinstance(a, Tensor) and a.dtype == torch.float64 and a.numel() > 32 for a in tree_leaves(args))
        self.seen |= wide and isinstance(result, Tensor) and result.dtype == torch.float32
        return result


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> tuple[Case, dict[str, Tensor], float]:
    """The case, what the plain loop gives, and how exact a computation in another order can be."""
    case = Case(request.param)
    with Rounds() as rounds:
        expected = case.plain()
    exact = case.family.dtype == torch.float64 and not rounds.seen
    return case, expected, BFLOAT16 if case.family.coarse else FLOAT64 if exact else FLOAT32


@pytest.mark.parametrize(("solver", "graph"), FORMS)
def test_latents_and_every_gradient(
    family: tuple[Case, dict[str, Tensor], float], solver: str, graph: str
) -> None:
    case, expected, tolerance = family
    actual = case.chain(solver=solver, graph=graph)
    if (solver, graph) == ("scheduler", "chain"):
        assert actual.keys() == expected.keys()
        assert [key for key in expected if not torch.equal(actual[key], expected[key])] == []
        assert all(torch.isfinite(value).all() for value in expected.values())
        # All that the user may want a gradient of has one.
        wanted = [key for key in expected if "lora" in key or key.startswith(("initial", "positive", "negative"))]
        assert len(wanted) > 4 and [key for key in wanted if not expected[key].any()] == []
    plainloop.assert_same(actual, expected, tolerance)


@pytest.mark.parametrize("name", ["allegro", "cosmos", "easyanimate", "kandinsky5"])
def test_families_that_take_no_lora_scale_say_so(name: str) -> None:
    case = Case(name)
    assert case.family.scale is None
    case.keywords["attention_kwargs"] = SCALE
    with pytest.raises(ValueError, match="takes no keyword 'attention_kwargs'"):
        case.sample()
