"""How the attention kernels are laid over a chip: tiles, warps, stages, and runs of queries."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    """A device as the settings see it: compute capability (major and minor in one number), multiprocessors."""

    architecture: int
    processors: int


@dataclass(frozen=True)
class AttentionLaunch:
    """``block_m`` queries and ``block_n`` keys a tile; warps of a program; stages of its copy pipeline."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# By architecture, padded head dimension and kernel. "other": 99 KB of shared memory (sm_86, sm_89, sm_120), and the
# interpreter.
_HALF: dict[tuple[int | str, int, str], AttentionLaunch] = {
    (80, 64, "forward"): AttentionLaunch(128, 64, 4, 3),
    (80, 64, "dkdv"): AttentionLaunch(64, 128, 8, 2),
    (80, 64, "dq"): AttentionLaunch(128, 64, 8, 3),
    (80, 128, "forward"): AttentionLaunch(128, 32, 8, 3),
    (80, 128, "dkdv"): AttentionLaunch(64, 64, 8, 2),
    (80, 128, "dq"): AttentionLaunch(128, 32, 8, 3),
    (80, 256, "forward"): AttentionLaunch(64, 32, 8, 2),
    (80, 256, "dkdv"): AttentionLaunch(32, 32, 8, 2),
    (80, 256, "dq"): AttentionLaunch(32, 32, 8, 2),
    (90, 64, "forward"): AttentionLaunch(128, 128, 8, 3),
    (90, 64, "dkdv"): AttentionLaunch(64, 128, 8, 3),
    (90, 64, "dq"): AttentionLaunch(128, 128, 8, 2),
    (90, 128, "forward"): AttentionLaunch(128, 128, 8, 2),
    (90, 128, "dkdv"): AttentionLaunch(32, 128, 8, 3),
    (90, 128, "dq"): AttentionLaunch(128, 64, 8, 2),
    (90, 256, "forward"): AttentionLaunch(64, 64, 8, 2),
    (90, 256, "dkdv"): AttentionLaunch(32, 32, 8, 2),
    (90, 256, "dq"): AttentionLaunch(64, 32, 8, 2),
    (100, 64, "forward"): AttentionLaunch(128, 128, 8, 3),
    (100, 64, "dkdv"): AttentionLaunch(64, 128, 8, 2),
    (100, 64, "dq"): AttentionLaunch(128, 128, 8, 2),
    (100, 128, "forward"): AttentionLaunch(128, 64, 8, 3),
    (100, 128, "dkdv"): AttentionLaunch(64, 128, 8, 2),
    (100, 128, "dq"): AttentionLaunch(128, 64, 8, 2),
    (100, 256, "forward"): AttentionLaunch(64, 64, 8, 2),
    (100, 256, "dkdv"): AttentionLaunch(64, 64, 8, 1),
    (100, 256, "dq"): AttentionLaunch(64, 64, 8, 1),
    ("other", 64, "forward"): AttentionLaunch(64, 32, 4, 2),
    ("other", 64, "dkdv"): AttentionLaunch(32, 64, 4, 2),
    ("other", 64, "dq"): AttentionLaunch(64, 32, 4, 2),
    ("other", 128, "forward"): AttentionLaunch(64, 32, 4, 2),
    ("other", 128, "dkdv"): AttentionLaunch(32, 64, 8, 2),
    ("other", 128, "dq"): AttentionLaunch(64, 32, 4, 2),
    ("other", 256, "forward"): AttentionLaunch(32, 32, 8, 1),
    ("other", 256, "dkdv"): AttentionLaunch(32, 32, 8, 1),
    ("other", 256, "dq"): AttentionLaunch(32, 32, 8, 1),
}
# Products in float32 run outside the tensor cores, from registers.
_SINGLE = {64: AttentionLaunch(32, 32, 8, 1), 128: AttentionLaunch(16, 32, 8, 1), 256: AttentionLaunch(16, 16, 4, 1)}

# Rows a program of the kernel that makes delta, elements a program of the one that adds the parts of a split.
DELTA_ROWS = 64
ADDED = 1024

_ALIKE = {80: 80, 87: 80, 90: 90, 100: 100, 103: 100}
# A run of queries of its own costs a program as much as so many queries more: its parts of dk and dv are written and
# read in float32. From operation counts (8 a query, key and column) and copy rates, not measured.
_SPLIT_QUERIES = 256
_MOST_SPLITS = 32
# Programs per multiprocessor from which on one more wave is no loss worth the memory of the parts.
_ENOUGH = 4


def settings(chip: Chip, head_dim: int, itemsize: int, kernel: str) -> AttentionLaunch:
    """Those of ``kernel`` (``forward``, ``dkdv``, ``dq``) for numbers of ``itemsize`` bytes."""
    width = next(width for width in (64, 128, 256) if head_dim <= width)
    if itemsize > 2:
        return _SINGLE[width]
    return _HALF[_ALIKE.get(chip.architecture, "other"), width, kernel]


def splits_for(chip: Chip, programs: int, queries: int) -> int:
    """Runs of queries that dk and dv are summed over apart: as many as cost least, 1 where tiles of keys fill the chip.

    Args:
        chip: the device; a multiprocessor holds one program at a time.
        programs: of one run: tiles of keys, times samples, times heads.
        queries: of a sample.
    """
    if programs >= _ENOUGH * chip.processors:
        return 1

    def cost(splits: int) -> float:
        waves = -(-programs * splits // chip.processors)
        parts = programs * splits / chip.processors if splits > 1 else 0.0
        return waves * queries / splits + _SPLIT_QUERIES * parts

    return min(range(1, _MOST_SPLITS + 1), key=cost)
