"""The peak of a network call whose blocks keep what a plan says: prefix sums over its pieces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from prfl_fast.memory.call_cost import CallCost


class CallPeaks(NamedTuple):
    """Bytes above what lives when the call begins.

    Attributes:
        kept: at the end of the forward.
        forward: peak of the forward.
        backward: peak of the backward, ``kept`` included.
    """

    kept: int
    forward: int
    backward: int


def call_peaks(call: CallCost, keeps: Sequence[str], *, growing: bool, from_forward: bool) -> CallPeaks:
    """Peaks of one call.

    Args:
        call: traced.
        keeps: keep-set of each block.
        growing: the backward makes gradients that stay, where otherwise they are in place.
        from_forward: the graph is kept from the call's forward on, not made anew by a recomputation.
    """
    kept = forward = backward = 0
    for piece in call.pieces:
        cost = piece.costs[0] if piece.block is None else piece.cost(keeps[piece.block])
        forward = max(forward, kept + cost.forward_peak)
        kept += cost.kept
        transient = cost.backward_growing if growing else cost.backward
        backward = max(backward, kept + transient + (cost.stays if from_forward else 0))
    return CallPeaks(kept, max(forward, kept), max(backward, kept))
