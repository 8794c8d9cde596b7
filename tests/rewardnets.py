"""Tiny transformers of each family for the tests of the reward, and the reward written out beside the package."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from prfl_fast.reward import LatentRewardModel
from prfl_fast.twin import Twin, make_twin

WAN = {"_class_name": "WanTransformer3DModel"}
FAMILIES: dict[str, dict[str, Any]] = {
    "wan": WAN,
    "hunyuan": {"_class_name": "HunyuanVideoTransformer3DModel"},
    "ltx": {"_class_name": "LTXVideoTransformer3DModel"},
    "cogvideox": {"_class_name": "CogVideoXTransformer3DModel"},
}
HEADS = 2


def twin(family: str = "wan", dtype: torch.dtype = torch.float64) -> Twin:
    return make_twin(FAMILIES[family], {"_class_name": "FlowMatchEulerDiscreteScheduler"}, dtype=dtype)


def wake(model: LatentRewardModel) -> LatentRewardModel:
    """Random biases, and a score that depends on the input strongly."""
    with torch.no_grad():
        for parameter in [*model.query_attention.parameters(), *model.mlp.parameters()]:
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def block_list(net: nn.Module) -> list[nn.Module]:
    lists = [getattr(net, name, []) for name in ("blocks", "transformer_blocks", "single_transformer_blocks")]
    return [block for blocks in lists for block in blocks]


def written_out(model: LatentRewardModel, source: Twin, x: Tensor, t: Tensor, conditioning: dict[str, Any]) -> Tensor:
    """Logits from the whole transformer, a hook on the last block that counts, and torch's own attention module."""
    seen: list[Tensor] = []
    block = block_list(source.net)[model.num_blocks - 1]
    handle = block.register_forward_hook(
        lambda _m, _i, output: seen.append(output[0] if isinstance(output, tuple) else output)
    )
    source.call(x, t, conditioning)
    handle.remove()
    features = seen[0]
    pool, mlp = model.query_attention, model.mlp
    dtype = pool.queries.dtype
    attention = nn.MultiheadAttention(features.shape[2], HEADS, batch_first=True, dtype=dtype)
    logits = []
    for sample in features.to(dtype):  # one by one: the published code is right for one sample
        state = dict(pool.multihead_attn.named_parameters())
        call = (pool.queries[None], sample[None], sample[None])
        pooled = torch.func.functional_call(attention, state, call, {"need_weights": False})[0] + pool.queries
        hidden = (pooled @ mlp.fc1.weight.T + mlp.fc1.bias).clamp(min=0)
        hidden = (hidden @ mlp.fc2.weight.T + mlp.fc2.bias).clamp(min=0)
        logits.append((hidden @ mlp.fc3.weight.T + mlp.fc3.bias).reshape(()))
    return torch.stack(logits)


def assert_same_model(one: LatentRewardModel, other: LatentRewardModel, **arguments: Any) -> None:
    """Same parameters and tables to the bit; same scores as far as the memory's alignment lets products agree."""
    for kind in ("state_dict", "named_buffers"):
        first, second = dict(getattr(one, kind)()), dict(getattr(other, kind)())
        assert first.keys() == second.keys()
        for name, value in first.items():
            assert value.dtype == second[name].dtype and torch.equal(value, second[name]), name
    with torch.no_grad():
        expected, found = one(**arguments), other(**arguments)
    # Tensors from a file lie at other addresses, where the same sums may be added in another order; Wan has float32
    # inside: 1e2 roundings of 6e-8.
    assert float((found - expected).norm()) <= 1e-5 * float(expected.norm())
