"""Standard normal draws inside a scheduler's step: intercepted, so that they are inputs and not side effects."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from prfl_fast.solvers.base import GeneratorLike

# (shape, dtype, device) -> the draw
Supply = Callable[[torch.Size, torch.dtype, torch.device], Tensor]

_OTHER_DRAWS = {
    torch.rand,
    torch.rand_like,
    torch.randint,
    torch.randint_like,
    torch.randperm,
    torch.normal,
    torch.bernoulli,
    torch.multinomial,
    Tensor.normal_,
    Tensor.uniform_,
    Tensor.random_,
    Tensor.bernoulli_,
    Tensor.exponential_,
    Tensor.log_normal_,
    Tensor.cauchy_,
    Tensor.geometric_,
}


class Draws(TorchFunctionMode):
    """While active in this thread, ``torch.randn`` and ``torch.randn_like`` give what ``supply`` gives.

    Raises:
        ValueError: another kind of random draw.
    """

    def __init__(self, supply: Supply) -> None:
        super().__init__()
        self._supply = supply

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.randn:
            size = kwargs["size"] if "size" in kwargs else args
            if len(size) == 1 and not isinstance(size[0], int):
                size = size[0]
            dtype = kwargs.get("dtype") or torch.get_default_dtype()
            device = torch.device(kwargs.get("device") or "cpu")
            return self._supply(torch.Size(size), dtype, device)
        if func is torch.randn_like:
            like = args[0] if args else kwargs["input"]
            device = torch.device(kwargs.get("device") or like.device)
            return self._supply(like.shape, kwargs.get("dtype") or like.dtype, device)
        if func in _OTHER_DRAWS:
            raise ValueError(
                f"scheduler: its step draws by {getattr(func, '__name__', func)}; only standard normal draws "
                "(torch.randn, randn_like) can be made inputs of the step"
            )
        return func(*args, **kwargs)


def given(noise: Sequence[Tensor], step: int) -> Supply:
    """A supply that hands out ``noise`` in order."""
    left = list(noise)

    def supply(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
        if not left:
            raise ValueError(f"noise: step {step} draws more than the {len(noise)} tensors given; see draw_noise")
        draw = left.pop(0)
        if draw.shape != shape:
            raise ValueError(f"noise: expected shape {tuple(shape)} in step {step}, got {tuple(draw.shape)}")
        return draw.to(device=device, dtype=dtype)

    return supply


def draw(shape: torch.Size, dtype: torch.dtype, device: torch.device, generator: GeneratorLike) -> Tensor:
    """A standard normal draw with the random numbers that diffusers would use.

    A generator per sample draws sample by sample; a CPU generator draws on the CPU, whatever the device.
    """
    if generator is None or isinstance(generator, torch.Generator):
        where = device if generator is None else generator.device
        return torch.randn(shape, generator=generator, device=where, dtype=dtype).to(device)
    if len(generator) == 1:
        return draw(shape, dtype, device, generator[0])
    if len(generator) != shape[0]:
        raise ValueError(f"generator: expected one per sample ({shape[0]}), got {len(generator)}")
    one = torch.Size((1, *shape[1:]))
    return torch.cat([draw(one, dtype, device, g) for g in generator])
