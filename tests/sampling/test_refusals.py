"""Bad input through the public door: one error that names the argument, before any network call and any change."""

from __future__ import annotations

import copy
from typing import Any

import familyloop
import plainloop
import pytest
import torch
from familyloop import Case

import prfl_fast

pytest.importorskip("diffusers")


def counted(case: Case) -> list[int]:
    calls: list[int] = []
    case.net.register_forward_pre_hook(lambda module, inputs: calls.append(1))
    return calls


def nan(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.full(shape, float("nan"))


@pytest.mark.parametrize(
    ("name", "change", "text"),
    [
        ("wan", {"encoder_hidden_state": torch.ones(2, 5, 16)}, "did you mean 'encoder_hidden_states'"),
        ("wan", {"atention_kwargs": {}}, "did you mean 'attention_kwargs'"),
        ("hunyuan-distilled", {"pooled_projection": torch.ones(2, 8)}, "did you mean 'pooled_projections'"),
        ("wan", {"encoder_hidden_states": torch.ones(3, 5, 16)}, "'encoder_hidden_states': expected a batch of 2"),
        ("ltx", {"encoder_attention_mask": torch.ones(1, 5)}, "'encoder_attention_mask': expected a batch of 2"),
        ("hunyuan-distilled", {"guidance": torch.ones(3)}, "'guidance': expected a batch of 2"),
        ("wan", {"encoder_hidden_states": nan((2, 5, 16))}, "'encoder_hidden_states' holds NaN"),
        ("cogvideox-rotary", {"image_rotary_emb": (nan((12, 16)), nan((12, 16)))}, "'image_rotary_emb' holds NaN"),
        ("wan", {"encoder_hidden_states": torch.ones(2, 5, 17)}, r"expected \[2, tokens, 16\]"),
        ("wan", {"encoder_hidden_states": None}, "needs 'encoder_hidden_states'"),
        ("wan", {"hidden_states": torch.ones(1)}, "'hidden_states' is given by the chain itself"),
    ],
)
@pytest.mark.parametrize("where", ["conditioning", "negative_conditioning", "by step"])
def test_conditioning(where: str, name: str, change: dict[str, Any], text: str) -> None:
    case = Case(name, torch.float32)
    calls = counted(case)
    wrong = {**case.conditioning, **change}
    if where == "negative_conditioning":
        arguments: dict[str, Any] = {"negative_conditioning": change, "guidance_scale": 3.0}
    elif where == "by step":  # the last step only: found before the first
        arguments = {"conditioning": lambda step, t: wrong if step == familyloop.STEPS - 1 else case.conditioning}
    else:
        arguments = {"conditioning": wrong}
    with pytest.raises((ValueError, TypeError), match=text):
        case.sample(**arguments)
    assert not calls


@pytest.mark.parametrize(
    ("shape", "text"),
    [
        ((2, 16, 2, 4), "latents: expected .*B.*C.*F.*H.*W"),
        ((2, 15, 2, 4, 6), "latents: expected 16 channels"),
        ((2, 16, 2, 5, 6), "latents: expected H"),
    ],
)
def test_latents_of_another_shape(shape: tuple[int, ...], text: str) -> None:
    case = Case("wan", torch.float32)
    calls = counted(case)
    case.latents = torch.randn(shape)
    with pytest.raises(ValueError, match=text):
        case.sample()
    assert not calls


@pytest.mark.parametrize("expert", ["transformer", "transformer_2"])
def test_networks_without_gradients(expert: str) -> None:
    accelerate = pytest.importorskip("accelerate")
    good, bad = Case("wan", torch.float32), Case("wan", torch.float32)
    calls = counted(good)

    def sample() -> None:
        pair = (bad.net, None) if expert == "transformer" else (good.net, bad.net)
        second = {} if pair[1] is None else {"transformer_2": pair[1], "boundary_ratio": 0.5}
        prfl_fast.unrolled_sample(
            pair[0], good.scheduler, good.latents, 3, conditioning=good.conditioning, **second
        )

    accelerate.cpu_offload(bad.net, execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match="offloaded by accelerate.*no gradients"):
        sample()
    accelerate.hooks.remove_hook_from_submodules(bad.net)
    sample()
    calls.clear()

    from diffusers import FirstBlockCacheConfig, PyramidAttentionBroadcastConfig

    for config in (
        FirstBlockCacheConfig(threshold=0.1),
        PyramidAttentionBroadcastConfig(spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500),
    ):
        bad.net.enable_cache(config)
        with pytest.raises(ValueError, match="disable_cache"):
            sample()
        assert not calls
        bad.net.disable_cache()
    sample()


def test_a_refusal_changes_nothing() -> None:
    problem = plainloop.Problem(seed=1, scheduler=plainloop.scheduler("unipc"), steps=4, scale=1.0)
    before = copy.deepcopy(problem.scheduler.__dict__)
    state = torch.get_rng_state()
    for wrong in ({"gradient": "last:9"}, {"latent_mask": torch.ones(7)}, {"stop_step": 0}, {"supervise": ()}):
        with pytest.raises(ValueError):
            problem.sample(**wrong)
    assert str(problem.scheduler.__dict__) == str(before) and torch.equal(torch.get_rng_state(), state)
    assert problem.net.calls == 0 and problem.net.training
