"""QueryAttentionPool against the published formulation: torch's attention, one sample, residual of the query."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from prfl_fast import QueryAttentionPool
from prfl_fast.reward.pool import RewardHead

# Two formulations in float64, some 1e2 roundings of 1.1e-16 at a condition of 10.
TOLERANCE = 1e-13


def make(dim: int, queries: int, heads: int) -> QueryAttentionPool:
    pool = QueryAttentionPool(dim, queries, heads).double()
    for parameter in pool.parameters():  # biases start at zero, which would hide them
        nn.init.normal_(parameter, std=0.5)
    return pool


@pytest.mark.parametrize("queries", [1, 3])
def test_one_sample_is_the_published_formulation(queries: int) -> None:
    pool = make(24, queries, 8)
    attention = nn.MultiheadAttention(24, 8, batch_first=True).double()
    state = pool.state_dict()
    own = {name.removeprefix("multihead_attn."): value for name, value in state.items() if name != "queries"}
    attention.load_state_dict(own)
    x = torch.randn(1, 11, 24, dtype=torch.float64)
    found, _ = attention(state["queries"][None], x, x)
    assert (pool(x) - (found + state["queries"])).abs().max() < TOLERANCE


def test_a_batch_is_its_samples() -> None:
    pool = make(24, 2, 8)
    x = torch.randn(4, 11, 24, dtype=torch.float64)
    together = pool(x)
    assert together.shape == (4, 2, 24)
    for index in range(4):
        assert (together[index] - pool(x[index : index + 1])[0]).abs().max() < TOLERANCE
    assert (together[0] - together[1]).abs().max() > 1e-2


def test_lengths_cut_the_padding() -> None:
    pool = make(24, 2, 8)
    x = torch.randn(2, 11, 24, dtype=torch.float64)
    cut = pool(x, lengths=[11, 4])
    assert (cut[1] - pool(x[1:, :4])[0]).abs().max() < TOLERANCE
    assert (cut[1] - pool(x)[1]).abs().max() > 1e-2


def test_every_parameter_is_trained() -> None:
    pool = make(24, 2, 8)
    pool(torch.randn(2, 5, 24, dtype=torch.float64)).square().sum().backward()
    for name, parameter in pool.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name
    # The query's gradient by differences along one direction: both its paths, attention and residual.
    x, step = torch.randn(2, 5, 24, dtype=torch.float64), 1e-6
    direction = torch.randn_like(pool.queries)
    (gradient,) = torch.autograd.grad(pool(x).square().sum(), pool.queries)
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            pool.queries.add_(sign * step * direction)
            values.append(float(pool(x).square().sum()))
            pool.queries.sub_(sign * step * direction)
    expected = (values[0] - values[1]) / (2 * step)
    # Central differences: truncation of step^2 = 1e-12, cancellation of 1e-16 * |loss| / step = 1e-8.
    assert abs(float((gradient * direction).sum()) - expected) < 1e-6 * abs(expected) + 1e-6


def test_published_names_and_counts() -> None:
    with torch.device("meta"):
        pool, head = QueryAttentionPool(5120), RewardHead(5120)
    assert {name: tuple(value.shape) for name, value in pool.state_dict().items()} == {
        "queries": (1, 5120),
        "multihead_attn.in_proj_weight": (15360, 5120),
        "multihead_attn.in_proj_bias": (15360,),
        "multihead_attn.out_proj.weight": (5120, 5120),
        "multihead_attn.out_proj.bias": (5120,),
    }
    assert {name: tuple(value.shape) for name, value in head.state_dict().items()} == {
        "fc1.weight": (1024, 5120),
        "fc1.bias": (1024,),
        "fc2.weight": (512, 1024),
        "fc2.bias": (512,),
        "fc3.weight": (1, 512),
        "fc3.bias": (1,),
    }
    assert sum(p.numel() for p in pool.parameters()) == 104_883_200
    assert sum(p.numel() for p in head.parameters()) == 5_769_217


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((0, 1, 1), "dim: expected at least 1, got 0"),
        ((8, 0, 1), "num_queries: expected at least 1, got 0"),
        ((8, 1, 0), "num_heads: expected at least 1, got 0"),
        ((10, 1, 4), "num_heads: expected a divisor of dim 10, got 4"),
    ],
)
def test_wrong_sizes(sizes: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QueryAttentionPool(*sizes)
