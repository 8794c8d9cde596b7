"""Which kernels an attention runs on."""

from __future__ import annotations

from prfl_fast.ops import backends
from prfl_fast.ops.attention.aten import CpuFlash, Cudnn, Efficient, Flash
from prfl_fast.ops.attention.provider import Problem, Provider
from prfl_fast.ops.attention.reference import Reference
from prfl_fast.ops.attention.triton_provider import Triton

# In the order in which they are taken where nothing was measured.
PROVIDERS: dict[str, Provider] = {
    provider.name: provider for provider in (Cudnn(), Flash(), Efficient(), CpuFlash(), Triton(), Reference())
}


def candidates(problem: Problem, *, backward: bool) -> list[Provider]:
    """Those that can run the problem, best guess first."""
    if backends.chosen() == "reference":
        return [PROVIDERS["reference"]]
    return [p for p in PROVIDERS.values() if p.why_not(problem, backward=backward) is None]


def choose(problem: Problem, *, backward: bool) -> str:
    """Name of the provider for the problem."""
    return candidates(problem, backward=backward)[0].name
