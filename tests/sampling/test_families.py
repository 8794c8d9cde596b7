"""Every family in tiny form through the chain against a plain loop over calls written out as its pipeline writes them:
latents and every gradient (weights, LoRA at a scale, initial latents, conditioning of both branches).

Plain loop and ``solver="scheduler"``, ``graph="chain"`` are the same operations, so they agree bit for bit. The others
sum in another order. In float64 that is far below 1e-10. Where a network or a scheduler rounds to float32 inside, a
rounding may fall on the other side: such results are two float32 computations, of some 12 roundings in a row in a block
and as many around 2 blocks in 3 steps, forward and backward: 216, which add up as a random walk does, to 15; with the
same again for the network's condition 30, and two of them lie up to twice that apart.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any

import familynets
import plainloop
import pytest
import torch
from familynets import FAMILIES, SCALE, Family
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

import prfl_fast

pytest.importorskip("diffusers")
pytest.importorskip("peft")

STEPS, GUIDANCE = 3, 2.5
FLOAT32 = 2 * 30 * 2.0**-24
# In float64, and neither network nor scheduler rounds to float32 on the way.
FLOAT64 = {"easyanimate", "qwen_image"}
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
            high = t >= family.boundary * 1000
            net, scale = (family.net, GUIDANCE) if high else (family.other, family.more["guidance_scale_2"])
            scaled = own.scale_model_input(x, t) if hasattr(own, "scale_model_input") else x
            shown = scaled.to(family.dtype)
            c = family.call(net, shown, t, self.keywords)
            u = family.call(net, shown, t, {**self.keywords, **self.negative})
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


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> tuple[str, Case, dict[str, Tensor]]:
    case = Case(request.param)
    return request.param, case, case.plain()


@pytest.mark.parametrize(("solver", "graph"), FORMS)
def test_latents_and_every_gradient(family: tuple[str, Case, dict[str, Tensor]], solver: str, graph: str) -> None:
    name, case, expected = family
    actual = case.chain(solver=solver, graph=graph)
    if (solver, graph) == ("scheduler", "chain"):
        assert actual.keys() == expected.keys()
        assert all(torch.equal(actual[key], expected[key]) for key in expected)
        assert all(torch.isfinite(value).all() for value in expected.values())
    plainloop.assert_same(actual, expected, 1e-10 if name in FLOAT64 else FLOAT32)
