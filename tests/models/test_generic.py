"""Networks without a family of their own: other diffusers transformers, modules, functions."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prfl_fast.models import adapter_for

T = torch.tensor(250.5)


def mochi() -> tuple[Any, Tensor, dict[str, Any]]:
    diffusers = pytest.importorskip("diffusers")
    net = diffusers.MochiTransformer3DModel(
        num_attention_heads=2, attention_head_dim=8, num_layers=2, pooled_projection_dim=16, in_channels=4,
        text_embed_dim=16, time_embed_dim=4, max_sequence_length=5,
    )  # fmt: skip
    keywords = {"encoder_hidden_states": torch.randn(2, 5, 16), "encoder_attention_mask": torch.ones(2, 5).bool()}
    return net, torch.randn(2, 4, 2, 4, 6), keywords


def kandinsky() -> tuple[Any, Tensor, dict[str, Any]]:
    diffusers = pytest.importorskip("diffusers")
    net = diffusers.Kandinsky5Transformer3DModel(
        in_visual_dim=4, in_text_dim=16, in_text_dim2=8, time_dim=8, out_visual_dim=4, model_dim=24, ff_dim=16,
        num_text_blocks=1, num_visual_blocks=2, axes_dims=(4, 4, 4),
    )  # fmt: skip
    keywords = {
        "encoder_hidden_states": torch.randn(2, 5, 16), "pooled_projections": torch.randn(2, 8),
        "visual_rope_pos": [torch.arange(2), torch.arange(2), torch.arange(3)], "text_rope_pos": torch.arange(5),
    }  # fmt: skip
    return net, torch.randn(2, 2, 4, 6, 4), keywords


BLOCKS = {
    mochi: ["transformer_blocks.0", "transformer_blocks.1"],
    kandinsky: ["text_transformer_blocks.0", "visual_transformer_blocks.0", "visual_transformer_blocks.1"],
}


@pytest.mark.parametrize("make", BLOCKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_other_transformers(make: Any, dtype: torch.dtype) -> None:
    net, x, conditioning = make()
    adapter = adapter_for(net)
    adapter.validate(x, conditioning, prepared=False)
    assert [name for name, _ in adapter.blocks()] == BLOCKS[make]
    assert adapter.module() is net
    x = x.to(dtype).requires_grad_()
    output = adapter(x, T, conditioning, None)
    expected = net(hidden_states=x.float(), timestep=T.expand(2), **conditioning).sample
    assert torch.equal(output, expected)
    (gradient,) = torch.autograd.grad(output.sum(), x)
    assert torch.equal(gradient, torch.autograd.grad(expected.sum(), x)[0])
    with pytest.raises(ValueError, match="takes no keyword 'pooled'"):
        adapter.validate(x, {**conditioning, "pooled": 1}, prepared=False)
    with pytest.raises(ValueError, match="needs 'encoder_hidden_states'"):
        adapter.validate(x, {k: v for k, v in conditioning.items() if k != "encoder_hidden_states"}, prepared=False)
    with pytest.raises(ValueError, match="batch of 2"):
        adapter.validate(x, {**conditioning, "encoder_hidden_states": torch.randn(1, 5, 16)}, prepared=False)


@dataclass
class Output:
    sample: Tensor


class Written(nn.Module):
    """A user's own transformer: diffusers' keywords, no parameters, every form of output, no return_dict."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form

    def forward(self, hidden_states: Tensor, timestep: Tensor, gain: Tensor | None = None) -> Any:
        assert timestep.shape == hidden_states.shape[:1]
        value = hidden_states * timestep[:, None] * (1 if gain is None else gain)
        return {"tensor": value, "tuple": (value, None), "list": [value], "output": Output(value), "none": None}[
            self.form
        ]


@pytest.mark.parametrize("form", ["tensor", "tuple", "list", "output"])
def test_every_form_of_output(form: str) -> None:
    x, gain = torch.randn(3, 2, dtype=torch.float64), torch.randn(2)
    adapter = adapter_for(Written(form))
    assert torch.equal(adapter(x, T, {"gain": gain}, None), x * T * gain)
    assert torch.equal(adapter(x, T, {"gain": gain}, {"hidden_states": 2 * x, "gain": None}), 2 * x * T)


def test_an_output_without_a_tensor_is_named() -> None:
    with pytest.raises(TypeError, match="Written: expected a tensor, a tuple or an output with .sample, got NoneType"):
        adapter_for(Written("none"))(torch.ones(1, 1), T, {}, None)


def plain(x: Tensor, t: Tensor, c: Tensor, *, bias: float = 0.0) -> Tensor:
    return x * t + c + bias


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Identity(), nn.Identity()])

    def forward(self, x: Tensor, t: Tensor, c: Tensor, *, bias: float = 0.0) -> Tensor:
        return plain(x, t, c, bias=bias)


class Callable:
    def __call__(self, x: Tensor, t: Tensor, c: Tensor, *, bias: float = 0.0) -> Tensor:
        return plain(x, t, c, bias=bias)


@pytest.mark.parametrize("net", [plain, partial(plain, bias=0.0), Net(), Callable(), Callable().__call__])
def test_any_callable(net: Any) -> None:
    x, c = torch.randn(3, 2, dtype=torch.float16), torch.randn(2, dtype=torch.float16)
    adapter = adapter_for(net)
    assert adapter.module() is (net if isinstance(net, nn.Module) else None)
    assert [name for name, _ in adapter.blocks()] == (["blocks.0", "blocks.1"] if isinstance(net, nn.Module) else [])
    assert adapter.num_blocks == len(adapter.blocks())
    adapter.validate(x, {"c": c, "bias": 1.0}, prepared=False)
    adapter.validate(x, {}, prepared=True)
    seen = adapter(x, T, {"c": c}, {"bias": 1.0, "timestep": torch.tensor(2.0), "hidden_states": x + 1})
    assert torch.equal(seen, (x + 1) * 2 + c + 1)
    assert adapter(x, T, {"c": c}, None).dtype == torch.float16  # neither x nor t is cast or expanded
    for wrong, match in (
        ({"c": c, "bais": 1.0}, "takes no keyword 'bais'; did you mean 'bias'"),
        ({"c": c, "x": x}, "takes no keyword 'x'"),
        ({"bias": 1.0}, "needs 'c'"),
        ({"c": c * float("nan")}, "'c' holds NaN"),
        ({"c": c, "timestep": T}, "'timestep' is given by the chain itself"),
    ):
        with pytest.raises(ValueError, match=match):
            adapter.validate(x, wrong, prepared=False)


def test_callables_that_take_anything() -> None:
    x = torch.ones(2)
    for net in (lambda x, t, **kwargs: x * kwargs["k"], lambda *args, **kwargs: args[0] * kwargs["k"]):
        adapter = adapter_for(net)
        adapter.validate(x, {"k": 3, "whatever": None}, prepared=False)
        assert torch.equal(adapter(x, T, {"k": 3}, None), 3 * x)
    assert torch.equal(adapter_for(torch.mul)(x, T, {}, None), x * T)  # built in: tells no signature
    adapter_for(torch.mul).validate(x, {"out": None}, prepared=False)


def test_a_compiled_function() -> None:
    adapter = adapter_for(torch.compile(plain, backend="eager"))
    x = torch.randn(3)
    assert torch.equal(adapter(x, T, {"c": x}, None), plain(x, T, x))
    with pytest.raises(ValueError, match="did you mean 'bias'"):
        adapter.validate(x, {"c": x, "bais": 1.0}, prepared=False)


def test_one_element_and_empty_conditioning() -> None:
    x = torch.randn(1, 1)
    adapter = adapter_for(lambda x, t: x)
    adapter.validate(x, {}, prepared=False)
    assert adapter(x, T, {}, {}) is x
    with pytest.raises(ValueError, match="takes no keyword 'c'; it takes none"):
        adapter.validate(x, {"c": x}, prepared=False)
