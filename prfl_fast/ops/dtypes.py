"""Numbers by which compiled ops know dtypes; csrc/common/scalar.h holds the other half."""

from __future__ import annotations

import torch

DTYPES: tuple[torch.dtype, ...] = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
NUMBERS: dict[torch.dtype, int] = {dtype: number for number, dtype in enumerate(DTYPES)}
