"""What fuse keeps, refuses and tells: saving, LoRA, hooks, checkpointing, sharding, projections, processors."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from fusecases import SHORT, distance, make_case, no_islands
from tinyfamilies import make
from torch import Tensor, nn

import prfl_fast
from prfl_fast.models.fused.door import is_fused


def blocks(net: nn.Module) -> list[Any]:
    return [m for m in net.modules() if type(m).__name__.endswith("Block") and hasattr(m, "forward") and _family(m)]


def _family(module: nn.Module) -> bool:
    from prfl_fast.models.fused.door import _family

    return _family(module) is not None


def same(a: list[Tensor | None], b: list[Tensor | None]) -> bool:
    return all(x is None or (y is not None and torch.equal(x, y)) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("name", SHORT)
def test_unfuse_leaves_nothing_and_fusing_twice_does_nothing(name: str) -> None:
    case = make_case(name)
    plain = [dict(vars(block)) for block in blocks(case.net)]
    keys, expected = list(case.net.state_dict()), case.results()
    assert prfl_fast.fuse(case.net) is case.net
    first = [vars(block)["forward"] for block in blocks(case.net)]
    prfl_fast.fuse(case.net)
    assert all(vars(b)["forward"] is f for b, f in zip(blocks(case.net), first, strict=True))
    assert list(case.net.state_dict()) == keys
    assert prfl_fast.unfuse(case.net) is case.net
    assert [dict(vars(block)) for block in blocks(case.net)] == plain
    assert same(case.results(), expected)
    prfl_fast.unfuse(case.net)


def test_only_some_blocks() -> None:
    case = make_case("hunyuan")
    everything = (*case.net.transformer_blocks, *case.net.single_transformer_blocks)
    prfl_fast.fuse(case.net, only=["single_transformer_blocks"])
    assert [is_fused(b) for b in everything] == [False, True, True]
    prfl_fast.unfuse(case.net)
    prfl_fast.fuse(case.net, only="transformer_blocks.0")
    assert [is_fused(b) for b in everything] == [True, False, False]
    with pytest.raises(ValueError, match=r"only: expected .*single_transformer_blocks.*got 'blocks'"):
        prfl_fast.fuse(case.net, only=["blocks"])


def test_a_fused_network_is_freed() -> None:
    case = make_case("wan")
    prfl_fast.fuse(case.net)
    ref = weakref.ref(case.net.blocks[0])
    case.results()
    del case
    gc.collect()
    assert ref() is None


def test_saving_and_loading(tmp_path: Path) -> None:
    case = make_case("ltx", torch.float32)
    expected = case.run()
    prfl_fast.fuse(case.net)
    case.net.save_pretrained(tmp_path)
    loaded = type(case.net).from_pretrained(tmp_path)
    assert torch.equal(case.call(loaded), expected)
    fused = case.run()
    assert torch.equal(case.call(prfl_fast.fuse(loaded)), fused)


def test_other_transformers_stay_as_they_are_and_it_says_so() -> None:
    from diffusers import DiTTransformer2DModel

    net = DiTTransformer2DModel(
        num_attention_heads=1, attention_head_dim=4, in_channels=2, num_layers=1, num_embeds_ada_norm=3, sample_size=4
    )
    with pytest.warns(UserWarning, match="DiTTransformer2DModel stays unfused"):
        assert prfl_fast.fuse(net) is net
    with pytest.raises(ValueError, match=r"only: .*none that can be fused"):
        prfl_fast.fuse(net, only=["transformer_blocks"])
    with pytest.raises(TypeError, match="transformer: expected a module, got function"):
        prfl_fast.fuse(lambda x, t: x)  # type: ignore[type-var]


@pytest.mark.parametrize("name", ["wan", "cogvideox-rotary"])
def test_projections_that_diffusers_fused(name: str) -> None:
    case = make_case(name)
    case.net.requires_grad_(False)
    with torch.no_grad():
        case.net.fuse_qkv_projections()
    case.net.requires_grad_(True)
    with no_islands():
        expected = case.results()
        prfl_fast.fuse(case.net)
        assert distance(case.results(), expected) < 1e-10
        # The other way round, with the blocks fused already.
        case.net.unfuse_qkv_projections()
        found = case.results()
        prfl_fast.unfuse(case.net)
        assert distance(found, case.results()) < 1e-10


class Doubled:
    """A processor of the user's own: twice what the usual one gives."""

    def __init__(self, usual: Any) -> None:
        self.usual = usual

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        made = self.usual(*args, **kwargs)
        return tuple(2 * m for m in made) if isinstance(made, tuple) else 2 * made


@pytest.mark.parametrize("name", SHORT)
def test_a_processor_of_the_users_own_is_respected(name: str) -> None:
    case = make_case(name)
    attentions = [m for b in blocks(case.net) for m in b.modules() if hasattr(m, "to_q")]
    for attention in attentions:
        attention.set_processor(Doubled(attention.processor))
    with no_islands():
        expected = case.results()
    more = f"and {len(attentions) - 1} more" if len(attentions) > 1 else ""
    with pytest.warns(UserWarning, match=f"{more}.* its processor is Doubled") as told:
        prfl_fast.fuse(case.net)
    assert len(told) == 1
    with no_islands():
        assert distance(case.results(), expected) < 1e-10


@pytest.mark.parametrize("name", ["wan", "hunyuan", "ltx"])
def test_an_attention_backend_of_the_users_own_runs(name: str) -> None:
    case = make_case(name)
    with no_islands():
        expected = case.results()
        case.net.set_attention_backend("_native_math")
        prfl_fast.fuse(case.net)
        assert distance(case.results(), expected) < 1e-10


@pytest.mark.parametrize("name", ["hunyuan", "ltx"])
def test_a_mask_with_holes_is_a_mask(name: str) -> None:
    case = make_case(name)
    block = case.net.transformer_blocks[0]
    seen: list[Any] = []
    block.register_forward_pre_hook(lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
    case.run()
    args, kwargs = seen[0]
    holes = (kwargs["encoder_attention_mask"] if name == "ltx" else args[3]).clone()
    # The second of five words; the third is behind it and counts.
    holes[..., -4] = -10000.0 if name == "ltx" else False
    if name == "ltx":
        kwargs = {**kwargs, "encoder_attention_mask": holes}
    else:
        args = (*args[:3], holes, *args[4:])
    with no_islands():
        expected = block(*args, **kwargs)
        prfl_fast.fuse(case.net)
        found = block(*args, **kwargs)
    pairs = zip(found, expected, strict=True) if isinstance(found, tuple) else [(found, expected)]
    assert all(torch.allclose(f, e, rtol=0, atol=1e-10) for f, e in pairs)


@pytest.mark.parametrize("name", SHORT)
def test_block_checkpoints_change_nothing(name: str) -> None:
    case = make_case(name)
    prfl_fast.fuse(case.net)
    expected = case.results()
    case.net.enable_gradient_checkpointing()
    assert same(case.results(), expected)


LORAS: dict[str, dict[str, Any]] = {
    "plain": {}, "dora": {"use_dora": True}, "dropout": {"lora_dropout": 0.5}, "bias": {"lora_bias": True},
    "feed-forward": {"target_modules": ["net.0.proj", "net.2"]},
}  # fmt: skip


@pytest.mark.parametrize("kind", LORAS)
@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_lora_of_every_kind(kind: str, before: bool) -> None:
    from peft import LoraConfig

    case = make_case("wan")
    if not before:
        prfl_fast.fuse(case.net)
    options = {"target_modules": ["to_q", "to_v", "to_out.0"], **LORAS[kind]}
    case.net.add_adapter(LoraConfig(r=2, init_lora_weights=False, **options))
    case.net.double()
    case.net.requires_grad_(True)
    if kind == "dropout":
        case.net.train()

    def results() -> list[Tensor | None]:
        torch.manual_seed(3)
        with no_islands():
            return case.results()

    fused = results() if not before else None
    prfl_fast.unfuse(case.net)
    expected = results()
    prfl_fast.fuse(case.net)
    assert distance(results(), expected) < 1e-10
    assert fused is None or distance(fused, expected) < 1e-10
    if kind == "plain":
        case.net.disable_adapters()
        off = results()
        prfl_fast.unfuse(case.net)
        assert distance(off, results()) < 1e-10
        assert float((off[0] - expected[0]).abs().max()) > 1e-3  # type: ignore[operator]


def test_hooks_that_would_not_run_are_refused() -> None:
    case = make_case("wan")
    handle = case.net.blocks[1].norm2.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"'blocks.1.norm2' \(FP32LayerNorm\) has a hook"):
        prfl_fast.fuse(case.net)
    assert not any(map(is_fused, blocks(case.net)))
    handle.remove()
    seen: list[int] = []
    for module in (case.net.blocks[0].attn1, case.net.blocks[0].ffn, case.net.blocks[0].attn2.to_out[0]):
        module.register_forward_hook(lambda *_: seen.append(1))
    case.net.blocks[0].register_forward_hook(lambda *_: seen.append(1))
    with no_islands():
        expected = case.results()
        count = len(seen)
        with pytest.warns(UserWarning, match=r"blocks.0.attn1 stays as it is: it has hooks"):
            prfl_fast.fuse(case.net)
        assert distance(case.results(), expected) < 1e-10
    assert len(seen) == 2 * count == 8


def test_offload_before_and_after() -> None:
    for kind in ("block_level", "leaf_level"):
        case = make_case("wan", torch.float32)
        options: dict[str, Any] = {"num_blocks_per_group": 1} if kind == "block_level" else {}
        case.net.enable_group_offload(torch.device("cpu"), offload_type=kind, **options)
        match = "has been replaced already" if kind == "block_level" else "offloaded by itself"
        with pytest.raises(ValueError, match=match):
            prfl_fast.fuse(case.net)
    case = make_case("wan", torch.float32)
    prfl_fast.fuse(case.net)
    expected = case.results()
    case.net.enable_group_offload(torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1)
    assert same(case.results(), expected)
    prfl_fast.fuse(case.net)  # its code is called: nothing to refuse
    with pytest.raises(ValueError, match=r"unfuse: 'blocks.0' was fused, and its forward has been wrapped since"):
        prfl_fast.unfuse(case.net)


@pytest.mark.parametrize("name", ["wan", "hunyuan", "ltx"])
def test_inference_mode_gives_the_same_prediction(name: str) -> None:
    case = make_case(name)
    prfl_fast.fuse(case.net)
    expected = case.run()
    with torch.inference_mode():
        assert torch.equal(case.run(), expected)
    with torch.no_grad():
        assert torch.equal(case.run(), expected)


def test_a_replaced_norm_is_an_error() -> None:
    case = make_case("wan")
    prfl_fast.fuse(case.net)
    case.net.blocks[0].norm3 = nn.Sequential(case.net.blocks[0].norm3)
    with pytest.raises(TypeError, match="expected a LayerNorm or RMSNorm and found Sequential"):
        case.run()


def test_autocast_runs_the_modules() -> None:
    case = make_case("wan", torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        expected = case.results()
        prfl_fast.fuse(case.net)
        found = case.results()
    # Products in bfloat16 (2^-8 each), a dozen in a row each way, in units of the largest element.
    assert distance(found, expected) < 24 * 2**-8


def test_torch_compile_takes_a_fused_block_whole() -> None:
    case = make_case("wan")
    prfl_fast.fuse(case.net)
    expected = case.results()
    for block in case.net.blocks:
        block.compile(fullgraph=True, backend="aot_eager")
    assert distance(case.results(), expected) < 1e-10


@pytest.mark.parametrize("name", ["wan", "ltx"])
def test_layerwise_casting_calls_the_linears(name: str) -> None:
    case = make_case(name, torch.float32)
    case.net.requires_grad_(False)  # weights at rest in another dtype have no gradients to compare
    case.net.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    expected = case.results()
    prfl_fast.fuse(case.net)
    # Some 60 roundings each way in each of 2 blocks.
    assert distance(case.results(), expected) < 2 * 2 * 60 * 16 * 2**-24


def test_a_sequence_that_diffusers_splits_is_left_to_its_dispatch(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers.models import attention_dispatch

    case = make_case("wan")
    with no_islands():
        expected = case.results()
    given: list[Any] = []
    usual = attention_dispatch.dispatch_attention_fn

    def dispatch(*args: Any, parallel_config: Any = None, **kwargs: Any) -> Tensor:
        given.append(parallel_config)
        return usual(*args, **kwargs)

    monkeypatch.setattr(attention_dispatch, "dispatch_attention_fn", dispatch)
    config = object()
    for processor in case.net.attn_processors.values():
        processor._parallel_config = config
    prfl_fast.fuse(case.net)
    with no_islands():
        assert distance(case.results(), expected) < 1e-10
    # Self-attention only: every device has the whole text.
    assert given == [config, config]


@pytest.mark.parametrize("copy", [True, False])
@pytest.mark.parametrize("name", ["wan", "cogvideox-rotary"])
def test_a_reward_reads_a_fused_trunk(name: str, copy: bool) -> None:
    twin = make(name)
    reward = prfl_fast.LatentRewardModel.from_transformer(twin.net, num_blocks=1, num_heads=2, copy=copy)
    expected = reward(twin.latents, torch.tensor(300.0), **twin.conditioning).detach()
    if copy:
        prfl_fast.fuse(reward.trunk.body)
    else:
        prfl_fast.fuse(twin.net)
    found = reward(twin.latents, torch.tensor(300.0), **twin.conditioning).detach()
    assert all(is_fused(block) for _, block in reward.trunk.blocks())
    # One block's roundings.
    assert torch.allclose(found, expected, rtol=0, atol=60 * 16 * 2**-24 * float(expected.abs().max() + 1))
