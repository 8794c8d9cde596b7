"""Tolerances: a result may be as far from float64 as the same formulas in plain torch, in its own dtype, times K.

The plain run rounds where the result rounds and at more places besides, so its error is one draw from the same
distribution or a wider one. Over all elements (root mean square) two such draws agree closely; the largest of a few
thousand errors varies more. To both is added one rounding of the result to its dtype, which no result can avoid and
which a plain run may escape by luck.
"""

from __future__ import annotations

import torch
from torch import Tensor

K = 2.0
K_LARGEST = 4.0


def errors(actual: Tensor, exact: Tensor) -> tuple[float, float]:
    """Root mean square and largest."""
    apart = (actual.double() - exact.double()).abs()
    return (float(apart.square().mean().sqrt()), float(apart.max())) if apart.numel() else (0.0, 0.0)


def assert_as_exact(actual: Tensor, plain: Tensor, exact: Tensor, label: str = "") -> None:
    """``actual`` against ``exact`` (float64), measured by what ``plain`` (dtype of ``actual``) misses."""
    assert actual.shape == plain.shape == exact.shape, label
    assert actual.dtype == plain.dtype, label
    assert exact.dtype == torch.float64, label
    assert torch.isfinite(actual).all(), f"{label}: not finite"
    mean, largest = errors(actual, exact)
    plain_mean, plain_largest = errors(plain, exact)
    rounding = torch.finfo(actual.dtype).eps / 2
    size, most = errors(torch.zeros_like(exact), exact)
    assert mean <= K * (plain_mean + rounding * size), (label, mean, plain_mean, rounding * size)
    assert largest <= K_LARGEST * (plain_largest + rounding * most), (label, largest, plain_largest, rounding * most)


def assert_same_formula(actual: Tensor, expected: Tensor, label: str = "") -> None:
    """Two ways through one formula in float64: each rounds some tens of times, 100 roundings of the largest apart."""
    assert actual.dtype == expected.dtype == torch.float64, label
    assert actual.shape == expected.shape, label
    if expected.numel():
        bound = 100 * torch.finfo(torch.float64).eps * max(1.0, float(expected.abs().max()))
        assert errors(actual, expected)[1] <= bound, (label, errors(actual, expected), bound)
