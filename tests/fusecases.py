"""Tiny transformers to fuse, with one call each, and diffusers' own arithmetic without its float32 islands."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from tinyfamilies import CONFIGS, leaves
from torch import Tensor, nn

from prfl_fast.twin import make_twin

NAMES = [*CONFIGS, "wan-per-token", "wan-vace", "wan-no-cross-norm"]
# One of each block class and of each way to hand modulation in.
SHORT = ["wan", "wan-per-token", "hunyuan-replace", "hunyuan", "ltx", "cogvideox-rotary"]


@dataclass
class Case:
    """A network and one call of it: ``call(net)`` gives the prediction, ``inputs`` are its float leaves."""

    net: Any
    inputs: list[Tensor]
    call: Callable[[Any], Tensor]

    def run(self) -> Tensor:
        return self.call(self.net)

    def results(self) -> list[Tensor | None]:
        """The prediction, and the gradients of a random projection of it for parameters and inputs."""
        out = self.run()
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(out.dtype)
        wanted = [t for t in (*self.net.parameters(), *self.inputs) if t.requires_grad]
        return [out.detach(), *torch.autograd.grad((out * weights).sum(), wanted, allow_unused=True)]


def make_case(
    name: str,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    batch: int = 2,
    lora: bool = False,
    crop: tuple[int, int, int] | None = None,
) -> Case:
    """In float64 every parameter is; in another dtype those parts stay float32 that ``from_pretrained`` keeps so.

    ``crop``: frames, height and width of the latents ``[B, C, F, H, W]``.
    """
    config = CONFIGS["wan" if name.startswith("wan-") and name not in CONFIGS else name]
    if name == "wan-no-cross-norm":
        config = {**config, "cross_attn_norm": False}
    twin = make_twin(config, {"_class_name": "FlowMatchEulerDiscreteScheduler"}, batch=batch, seed=seed)
    net: Any = twin.net
    conditioning = dict(twin.conditioning)
    generator = torch.Generator().manual_seed(seed)
    if "encoder_hidden_states_image" in conditioning:
        # The image's tokens stand before 512 of text.
        text = torch.randn(batch, 512, 16, generator=generator, dtype=torch.float64)
        conditioning["encoder_hidden_states"] = text
    if name == "ltx":
        conditioning["encoder_attention_mask"][0, 3:] = 0
    keywords: dict[str, Any] = {}
    if name == "wan-vace":
        net, control = _vace(seed, generator, batch)
        conditioning["control_hidden_states"] = control
    if name.startswith("hunyuan"):
        _add_single_block(net)
    _cast(net, dtype)
    if lora:
        _add_lora(net, dtype)
        keywords["attention_kwargs"] = {"scale": 0.6}
    given = {k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in conditioning.items()}
    given = leaves(given)
    x = twin.latents.detach().to(dtype)
    if crop is not None:
        x = x[:, :, : crop[0], : crop[1], : crop[2]].contiguous()
    x.requires_grad_()
    t = torch.tensor(500.0, dtype=dtype)

    def call(net: Any) -> Tensor:
        if name == "wan-vace":
            out: Tensor = net(x, t.expand(batch), return_dict=False, **given, **keywords)[0]
            return out
        hidden = x if twin.prepare_input is None else twin.prepare_input(x, t, 0)["hidden_states"].to(dtype)
        timestep = t.expand(batch)
        if name == "wan-per-token":
            tokens = x.shape[2] * (x.shape[3] // 2) * (x.shape[4] // 2)
            timestep = torch.linspace(0, 500, tokens, dtype=dtype).expand(batch, tokens)
        out = net(hidden_states=hidden, timestep=timestep, return_dict=False, **given, **keywords)[0]
        return out

    return Case(net, [x, *(v for v in given.values() if isinstance(v, Tensor) and v.requires_grad)], call)


def _add_single_block(net: Any) -> None:
    """A twin has one block of one stream, which is its last."""
    added = copy.deepcopy(net.single_transformer_blocks[0])
    with torch.no_grad():
        for parameter in added.parameters():
            parameter.copy_(parameter.flip(0))
    net.single_transformer_blocks.append(added)


def _cast(net: Any, dtype: torch.dtype) -> None:
    kept = () if dtype == torch.float64 else (net._keep_in_fp32_modules or ())
    for key, parameter in net.named_parameters():
        wide = any(part in key.split(".") for part in kept)
        parameter.data = parameter.data.to(torch.float32 if wide else dtype)


def _vace(seed: int, generator: torch.Generator, batch: int) -> tuple[nn.Module, Tensor]:
    from diffusers import WanVACETransformer3DModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = WanVACETransformer3DModel(
            num_attention_heads=2, attention_head_dim=12, num_layers=2, ffn_dim=32, text_dim=16, freq_dim=16,
            vace_layers=[0, 1], vace_in_channels=5,
        )  # fmt: skip
        for parameter in net.parameters():
            parameter.data += 0.05 * torch.randn(parameter.shape)
    return net.eval(), torch.randn(batch, 5, 2, 4, 6, generator=generator, dtype=torch.float64)


def _add_lora(net: Any, dtype: torch.dtype) -> None:
    from peft import LoraConfig

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        targets = ["to_q", "to_k", "to_v", "to_out.0"]
        net.add_adapter(LoraConfig(r=2, lora_alpha=3, target_modules=targets, init_lora_weights=False))
    for key, parameter in net.named_parameters():
        if "lora_" in key and dtype == torch.float64:
            parameter.data = parameter.data.double()


@contextmanager
def no_islands() -> Iterator[None]:
    """diffusers' modules in float64 throughout: casts to float32 are casts to float64."""
    to_float, to = Tensor.float, Tensor.to

    def wide(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return to(self, *(torch.float64 if a is torch.float32 else a for a in args), **kwargs)

    Tensor.float, Tensor.to = Tensor.double, wide  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        Tensor.float, Tensor.to = to_float, to  # type: ignore[method-assign]


def distance(found: list[Tensor | None], expected: list[Tensor | None]) -> float:
    """The largest error of a tensor in units of its own largest element.

    A gradient that is zero but for cancellation (biases of keys, to which softmax is blind) counts in units of 1e-5 of
    the largest gradient of all.
    """
    assert [f is None for f in found] == [e is None for e in expected]
    pairs = [(f.double(), e.double()) for f, e in zip(found, expected, strict=True) if f is not None and e is not None]
    floor = 1e-5 * max(float(e.abs().max()) for _, e in pairs[1:])
    return max(float((f - e).abs().max()) / max(float(e.abs().max()), floor) for f, e in pairs if e.numel())
