"""Roundings inside a scheduler's step, left out: the probe reads the map that the scheduler means.

Several schedulers cast latents to float32 inside, to gain precision over bfloat16. From float64 that is a rounding, and
what follows it is float32 arithmetic, good to seven digits only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_CASTS = {Tensor.to, Tensor.type, Tensor.type_as, Tensor.float, Tensor.half, Tensor.bfloat16}


class KeepFloat64(TorchFunctionMode):
    """While active in this thread, float64 tensors of at least ``numel`` elements are not cast to a lower precision.

    Smaller ones are the scheduler's own numbers (sigmas, times), whose precision is part of the scheduler.

    Attributes:
        count: casts left out so far.
    """

    def __init__(self, numel: int) -> None:
        super().__init__()
        self._numel = numel
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func not in _CASTS:
            return result
        tensor = args[0]
        if tensor.dtype != torch.float64 or tensor.numel() < self._numel:
            return result
        if not isinstance(result, Tensor) or not result.is_floating_point() or result.dtype == torch.float64:
            return result
        self.count += 1
        return tensor
