"""One call of every family: values and gradients equal those of the call written out, through wrappers and LoRA."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("diffusers")

from tinyfamilies import CONFIGS, TEXT, add_lora, assert_equal, gradients, leaves, make, overrides, plain_call

from prfl_fast.models import adapter_for
from prfl_fast.twin import Twin

T = torch.tensor(637.25)


def both(twin: Twin, network: Any, net: Any, **extra: Any) -> None:
    """Adapter and plain call on the same leaves: equal values, equal gradients for everything."""
    results = []
    for mine in (True, False):
        x = twin.latents.detach().clone().requires_grad_()
        conditioning = leaves({**twin.conditioning, **extra})
        given = overrides(twin, x, T)
        if mine:
            output = adapter_for(network)(x, T, conditioning, given)
        else:
            output = plain_call(net, x, T, conditioning, None if given is None else given["hidden_states"])
        wanted = [x, *(v for v in conditioning.values() if isinstance(v, Tensor) and v.requires_grad)]
        results.append((output.detach(), gradients(net, output, *wanted)))
    (mine_out, mine_grad), (plain_out, plain_grad) = results
    assert mine_out.dtype == plain_out.dtype
    assert torch.equal(mine_out, plain_out)
    assert_equal(mine_grad, plain_grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_values_and_gradients_are_those_of_the_call_written_out(name: str, dtype: torch.dtype) -> None:
    twin = make(name, dtype)
    both(twin, twin.net, twin.net)


@pytest.mark.parametrize("name", TEXT)
def test_lora_with_a_scale(name: str) -> None:
    pytest.importorskip("peft")
    twin = make(name)
    add_lora(twin.net)
    both(twin, twin.net, twin.net, attention_kwargs={"scale": 0.5})
    adapter = adapter_for(twin.net)
    halved = adapter(twin.latents, T, {**twin.conditioning, "attention_kwargs": {"scale": 0.5}}, None)
    assert not torch.equal(halved, adapter(twin.latents, T, twin.conditioning, None))


@pytest.mark.parametrize("name", TEXT)
def test_odd_batches_and_strides(name: str) -> None:
    twin = make(name, batch=3)
    x = torch.randn(*reversed(twin.latents.shape)).permute(*reversed(range(twin.latents.ndim)))
    assert not x.is_contiguous()
    adapter = adapter_for(twin.net)
    adapter.validate(x, twin.conditioning, prepared=False)
    actual = adapter(x, T, twin.conditioning, None)
    assert actual.shape == x.shape
    assert torch.equal(actual, plain_call(twin.net, x, T, twin.conditioning))
    # A timestep of each sample's own
    t = torch.tensor([900.0, 500.0, 20.5])
    assert torch.equal(adapter(x, t, twin.conditioning, None), plain_call(twin.net, x, t, twin.conditioning))
    assert not torch.equal(adapter(x, t, twin.conditioning, None), actual)


def test_overrides_replace_input_timestep_and_keywords() -> None:
    twin = make("wan")
    adapter, x, text = adapter_for(twin.net), twin.latents, torch.randn(2, 4, 16)
    tokens = torch.rand(2, 12) * 1000
    got = adapter(x, T, twin.conditioning, {"hidden_states": 2 * x.double(), "timestep": tokens})
    assert torch.equal(got, plain_call(twin.net, 2 * x, tokens, twin.conditioning))
    got = adapter(x, T, twin.conditioning, {"encoder_hidden_states": text, "timestep": torch.tensor(3)})
    assert torch.equal(got, plain_call(twin.net, x, torch.tensor(3), {"encoder_hidden_states": text}))


@pytest.fixture
def process_group() -> Iterator[None]:
    dist = torch.distributed
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("no gloo")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def compiled(net: nn.Module) -> Any:
    return torch.compile(net, backend="eager")


def with_peft(net: nn.Module) -> Any:
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(net, peft.LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))


def distributed(net: nn.Module) -> Any:
    return nn.parallel.DistributedDataParallel(net)


def sharded(net: nn.Module) -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (1,))
    for block in net.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(net, mesh=mesh)


@pytest.mark.parametrize("wrap", [compiled, with_peft, distributed, sharded])
def test_wrapped_networks_are_seen_through(wrap: Any, process_group: None) -> None:
    twin = make("wan")
    expected = None if wrap is with_peft else twin.call(twin.latents, T, twin.conditioning).detach()
    network = wrap(twin.net)
    adapter = adapter_for(network)
    assert type(adapter).__name__ == "WanAdapter"
    assert adapter.module() is twin.net
    assert [name for name, _ in adapter.blocks()] == ["blocks.0", "blocks.1"]
    assert adapter.blocks()[1][1] is twin.net.blocks[1]
    assert (adapter.num_blocks, adapter.feature_dim) == (2, 24)
    adapter.validate(twin.latents, twin.conditioning, prepared=False)
    with pytest.raises(ValueError, match="did you mean 'encoder_hidden_states'"):
        adapter.validate(twin.latents, {"encoder_hidden_state": 1}, prepared=False)
    calls = []
    network.register_forward_pre_hook(lambda *_: calls.append(1))
    actual = adapter(twin.latents, T, twin.conditioning, None)
    # Through the wrapper: a call of the inner module would not reduce or gather gradients.
    assert len(calls) == 1
    if expected is None:
        expected = twin.call(twin.latents, T, twin.conditioning)
    assert torch.equal(actual, expected)
    actual.sum().backward()
    assert all(p.grad is not None for p in twin.net.parameters() if p.requires_grad)
