"""The trunk gives what the next block would have received, bit for bit, shared with the transformer or copied."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")

from tinyfamilies import CONFIGS, TEXT, add_lora, assert_equal, gradients, leaves, make, overrides, plain_call

from prfl_fast.models import adapter_for, trunk_from_config
from prfl_fast.twin import Twin

T = torch.tensor(637.25)
TOKENS = 2 * 2 * 3


def network_input(twin: Twin) -> Tensor:
    """The latents as the network sees them: with the channels that prepare_input adds."""
    given = overrides(twin, twin.latents, T)
    return twin.latents if given is None else given["hidden_states"]


def captured(twin: Twin, index: int, x: Tensor, conditioning: dict[str, Any], t: Tensor = T) -> Tensor:
    """Video tokens that leave block ``index`` of the whole network."""
    seen: list[Any] = []
    block = adapter_for(twin.net).blocks()[index][1]
    handle = block.register_forward_hook(lambda module, inputs, output: seen.append(output))
    plain_call(twin.net, twin.latents, t, conditioning, x)
    handle.remove()
    (output,) = seen
    return output[0] if isinstance(output, tuple) else output


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_features_are_the_stream_behind_the_block(name: str, dtype: torch.dtype) -> None:
    twin = make(name, dtype)
    adapter, x = adapter_for(twin.net), network_input(twin)
    assert adapter.num_blocks == 2
    for k in (1, 2):
        expected = captured(twin, k - 1, x, twin.conditioning)
        assert expected.shape == (2, TOKENS, adapter.feature_dim)
        actual = adapter.features(k, x, T, twin.conditioning)
        assert actual.dtype == expected.dtype
        assert torch.equal(actual, expected)
    assert not torch.equal(actual, adapter.features(1, x, T, twin.conditioning))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_copy_stands_alone_and_is_rebuilt_from_its_config(name: str) -> None:
    twin = make(name)
    x = network_input(twin)
    trunk = adapter_for(twin.net).trunk(1, copy=True)
    expected = captured(twin, 0, x, twin.conditioning)

    keys = set(trunk.state_dict())
    assert keys <= {f"body.{key}" for key in twin.net.state_dict()}
    assert not {key.split(".")[1] for key in keys} & {"proj_out", "norm_out", "norm_final", "scale_shift_table"}
    assert not [key for key in keys if "blocks.1." in key]
    stream = trunk(x, T, **twin.conditioning)
    pairs = zip(trunk.named_parameters(), gradients(trunk, stream), strict=True)
    unused = {key.removeprefix("body.transformer_blocks.0.") for (key, _), gradient in pairs if gradient is None}
    # What Hunyuan's last dual-stream block does to the text tokens is for nobody; all else is used.
    text_only = ("attn.to_add_out", "ff_context.net.0.proj", "ff_context.net.2")
    expected_unused = {f"{part}.{kind}" for part in text_only for kind in ("weight", "bias")}
    assert unused == (expected_unused if name.startswith("hunyuan") else set())
    assert not {p.data_ptr() for p in trunk.parameters()} & {p.data_ptr() for p in twin.net.parameters()}

    config = json.loads(json.dumps(trunk.config))
    rebuilt = trunk_from_config(config)
    assert rebuilt.config == trunk.config
    rebuilt.load_state_dict(trunk.state_dict())
    rebuilt.train(trunk.training)
    with torch.no_grad():
        for parameter in twin.net.parameters():
            parameter.zero_()
    for one in (trunk, rebuilt):
        assert one.dim == expected.shape[2]
        assert len(one.blocks()) == 1
        assert dict(one.named_modules())[one.blocks()[0][0]] is one.blocks()[0][1]
        assert torch.equal(one(x, T, **twin.conditioning), expected)


def test_hunyuan_counts_through_both_lists_and_rebuilds_either_depth() -> None:
    import diffusers

    twin = make("hunyuan")
    config = {k: v for k, v in dict(twin.net.config).items() if not k.startswith("_")}
    twin.net.__class__.__init__(twin.net, **{**config, "num_layers": 2, "num_single_layers": 3})
    assert isinstance(twin.net, diffusers.HunyuanVideoTransformer3DModel)
    adapter = adapter_for(twin.net)
    for k in range(1, 6):
        expected = captured(twin, k - 1, twin.latents, twin.conditioning)
        trunk = adapter.trunk(k, copy=True)
        sizes = trunk.config["transformer"]
        assert (sizes["num_layers"], sizes["num_single_layers"]) == (min(k, 2), max(0, k - 2))
        rebuilt = trunk_from_config(trunk.config)
        rebuilt.load_state_dict(trunk.state_dict())
        assert [n for n, _ in rebuilt.blocks()] == [f"body.{n}" for n, _ in adapter.blocks()[:k]]
        assert torch.equal(rebuilt(twin.latents, T, **twin.conditioning), expected)
        assert torch.equal(adapter.features(k, twin.latents, T, twin.conditioning), expected)


@pytest.mark.parametrize("name", TEXT)
def test_gradients_of_a_shared_trunk_are_those_of_the_transformer(name: str) -> None:
    twin = make(name)
    trunk = adapter_for(twin.net).trunk(1, copy=False)
    results = []
    for mine in (True, False):
        x = twin.latents.detach().clone().requires_grad_()
        conditioning = leaves(twin.conditioning)
        stream = trunk(x, T, **conditioning) if mine else captured(twin, 0, x, conditioning)
        results.append(gradients(twin.net, stream, x, conditioning["encoder_hidden_states"]))
    # Unused: the later block and the head; so less than half of all parameters may have a gradient.
    mine_grads, plain_grads = ([g for g in result if g is not None] for result in results)
    assert_equal(mine_grads, plain_grads)
    assert results[0][-2] is not None and results[0][-1] is not None


@pytest.mark.parametrize("name", TEXT)
@pytest.mark.parametrize("copy", [False, True])
def test_gradient_checkpointing(name: str, copy: bool) -> None:
    twin = make(name)
    blocks: list[type] = []

    def noted(block: Any, *args: Any) -> Any:
        blocks.append(type(getattr(block, "__self__", block)))
        return torch.utils.checkpoint.checkpoint(block, *args, use_reentrant=False)

    def run() -> list[Tensor | None]:
        x = twin.latents.detach().clone().requires_grad_()
        return gradients(trunk, trunk(x, T, **twin.conditioning), x)

    trunk = adapter_for(twin.net).trunk(1, copy=copy)
    expected = run()
    # On a shared trunk it is switched at the transformer, at any time.
    (trunk.body if copy else twin.net).enable_gradient_checkpointing(noted)
    assert_equal(run(), expected)
    assert len(blocks) == 1, "the end of the trunk must not be checkpointed: the checkpoint would never be closed"
    (trunk.body if copy else twin.net).disable_gradient_checkpointing()
    assert_equal(run(), expected)
    assert len(blocks) == 1


def test_a_shared_trunk_follows_its_transformer() -> None:
    pytest.importorskip("peft")
    from peft import LoraConfig

    twin = make("wan")
    adapter = adapter_for(twin.net)
    trunk = adapter.trunk(1, copy=False)
    before = trunk(twin.latents, T, **twin.conditioning)
    # One adapter inside the blocks, one on a direct child of the network, which replaces that child.
    targets = ["to_q", "patch_embedding"]
    twin.net.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    for extra in ({}, {"attention_kwargs": {"scale": 0.25}}):
        conditioning = {**twin.conditioning, **extra}
        stream = trunk(twin.latents, T, **conditioning)
        assert torch.equal(stream, captured(twin, 0, twin.latents, conditioning))
        assert not torch.equal(stream, before)
    with pytest.raises(ValueError, match="has adapters"):
        adapter.trunk(1, copy=True)
    twin.net.disable_adapters()
    assert torch.equal(trunk(twin.latents, T, **twin.conditioning), before)


def test_the_lora_scale_is_undone_even_where_diffusers_leaves_it(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft")
    from diffusers.utils import scale_lora_layers, unscale_lora_layers

    twin = make("wan")
    add_lora(twin.net)
    undecorated = type(twin.net).forward.__wrapped__

    def older(self: Any, *args: Any, attention_kwargs: dict[str, Any], **kwargs: Any) -> Any:
        scale_lora_layers(self, attention_kwargs["scale"])
        output = undecorated(self, *args, **kwargs)
        unscale_lora_layers(self, attention_kwargs["scale"])
        return output

    monkeypatch.setattr(type(twin.net), "forward", older)
    trunk = adapter_for(twin.net).trunk(1, copy=False)
    conditioning = {**twin.conditioning, "attention_kwargs": {"scale": 0.25}}
    streams = [trunk(twin.latents, T, **conditioning) for _ in range(2)]
    assert torch.equal(*streams)


def test_hooks_of_the_transformer_do_not_run_in_the_trunk() -> None:
    twin = make("wan")
    calls: list[int] = []
    twin.net.register_forward_pre_hook(lambda *_: calls.append(1))
    trunk = adapter_for(twin.net).trunk(1, copy=False)
    trunk(twin.latents, T, **twin.conditioning)
    assert calls == []
    twin.call(twin.latents, T, twin.conditioning)
    assert calls == [1]


def test_timesteps_of_each_sample_and_other_dtypes() -> None:
    twin = make("hunyuan", torch.bfloat16)
    trunk = adapter_for(twin.net).trunk(2, copy=True)
    t = torch.tensor([966.67, 20.3])
    stream = trunk(twin.latents, t, **twin.conditioning)
    assert torch.equal(stream, captured(twin, 1, twin.latents, twin.conditioning, t))
    for row in range(2):
        alone = {k: v[row : row + 1] for k, v in twin.conditioning.items()}
        one = trunk(twin.latents[row : row + 1], t[row], **alone)
        # Another batch size may take another kernel: eight roundings of bfloat16's 2^-9 at the stream's magnitude.
        assert (one[0] - stream[row]).abs().max() <= 8 * 2.0**-9 * stream.abs().max()


def test_a_compiled_trunk_gives_the_same_bits() -> None:
    twin = make("wan")
    trunk = adapter_for(twin.net).trunk(1, copy=True)
    with torch.no_grad():
        expected = trunk(twin.latents, T, **twin.conditioning)
        assert torch.equal(torch.compile(trunk, backend="eager")(twin.latents, T, **twin.conditioning), expected)


def test_the_mode_of_training_is_kept() -> None:
    twin = make("wan")
    twin.net.train()
    assert adapter_for(twin.net).trunk(1, copy=True).body.training
    twin.net.eval()
    trunk = adapter_for(twin.net).trunk(1, copy=True)
    assert not trunk.body.training
    trunk.train()
    assert all(m.training for m in trunk.modules())
    assert not any(m.training for m in twin.net.modules())


@pytest.mark.parametrize("bad", [0, 3, -1, 1.0, True, None])
def test_depths_out_of_range(bad: Any) -> None:
    with pytest.raises(ValueError, match=r"num_blocks: expected a whole number in 1\.\.2"):
        adapter_for(make("wan").net).trunk(bad, copy=False)


def test_networks_without_a_trunk() -> None:
    adapter = adapter_for(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="features are known for Wan"):
        adapter.trunk(1, copy=False)
    with pytest.raises(ValueError, match="features are known for Wan"):
        _ = adapter.feature_dim
    with pytest.raises(ValueError, match="class_name: expected one of .*'UNet2DConditionModel'"):
        trunk_from_config({"class_name": "UNet2DConditionModel", "transformer": {}})
    with pytest.raises(ValueError, match="class_name: .*got None"):
        trunk_from_config({})


def test_sharding_comes_after_the_trunk() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist = torch.distributed
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        twin = make("wan")
        trunk = adapter_for(twin.net).trunk(1, copy=True)
        expected = trunk(twin.latents, T, **twin.conditioning).detach()
        grads = gradients(trunk, trunk(twin.latents, T, **twin.conditioning))
        for _, block in trunk.blocks():
            fully_shard(block, mesh=mesh)
        fully_shard(trunk, mesh=mesh)
        stream = trunk(twin.latents, T, **twin.conditioning)
        assert torch.equal(stream, expected)
        weights = torch.randn(stream.shape, generator=torch.Generator().manual_seed(7))
        (stream * weights).sum().backward()
        assert_equal([p.grad.full_tensor() if p.grad is not None else None for p in trunk.parameters()], grads)

        trunk = adapter_for(twin.net).trunk(1, copy=True)
        fully_shard(trunk.body, mesh=mesh)
        with pytest.raises(ValueError, match="shard the trunk and its blocks"):
            trunk(twin.latents, T, **twin.conditioning)
        fully_shard(twin.net, mesh=mesh)
        for copy in (False, True):
            with pytest.raises(ValueError, match="before sharding"):
                adapter_for(twin.net).trunk(1, copy=copy)
    finally:
        dist.destroy_process_group()
