"""The three losses against their equations written out, their gradients, and what they refuse."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from prfl_fast import bradley_terry_loss, reward_bce_loss, reward_feedback_loss

# float64: a handful of roundings of 1.1e-16 each.
TOLERANCE = 1e-14


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def close(actual: Tensor, expected: float, tolerance: float = TOLERANCE) -> bool:
    return abs(float(actual.detach()) - expected) <= tolerance * max(1.0, abs(expected))


def test_published_reward_feedback() -> None:
    logits = torch.randn(5, dtype=torch.float64, requires_grad=True)
    loss = reward_feedback_loss(logits)
    assert close(loss, sum(0.1 * (2 - sigmoid(s)) for s in logits.tolist()) / 5)
    (gradient,) = torch.autograd.grad(loss, logits)
    for s, slope in zip(logits.tolist(), gradient, strict=True):
        assert close(slope, -0.1 * sigmoid(s) * (1 - sigmoid(s)) / 5)


def test_reward_feedback_stops_at_the_margin() -> None:
    logits = torch.tensor([-1.0, 0.5, 4.0], dtype=torch.float64, requires_grad=True)
    loss = reward_feedback_loss(logits, margin=0.7, weight=3.0)
    assert close(loss, 3 * ((0.7 - sigmoid(-1)) + (0.7 - sigmoid(0.5))) / 3)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert (gradient[:2] < 0).all() and gradient[2] == 0
    loss = reward_feedback_loss(logits, margin=1.0, weight=3.0, on="logits")
    assert close(loss, 2.0 + 0.5)
    assert torch.equal(torch.autograd.grad(loss, logits)[0], torch.tensor([-1.0, -1.0, 0.0], dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.bool])
def test_bce(dtype: torch.dtype) -> None:
    logits = torch.randn(6, dtype=torch.float64)
    labels = torch.tensor([1, 0, 0, 1, 1, 0]).to(dtype)
    if dtype == torch.float64:
        labels = labels * 0.6 + 0.2  # soft labels
    expected = [
        -y * math.log(sigmoid(s)) - (1 - y) * math.log(1 - sigmoid(s))
        for s, y in zip(logits.tolist(), labels.double().tolist(), strict=True)
    ]
    assert close(reward_bce_loss(logits, labels), sum(expected) / 6)


def test_bradley_terry() -> None:
    better, worse = torch.randn(4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    differences = (better - worse).tolist()
    assert close(bradley_terry_loss(better, worse), sum(-math.log(sigmoid(d)) for d in differences) / 4)
    assert bradley_terry_loss(better + 9, worse) < 1e-2 < 1 < bradley_terry_loss(better, worse + 9)


def test_gradcheck() -> None:
    a, b = (torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    labels = torch.rand(3, dtype=torch.float64)
    assert torch.autograd.gradcheck(reward_feedback_loss, (a,))
    assert torch.autograd.gradcheck(lambda s: reward_bce_loss(s, labels), (a,))
    assert torch.autograd.gradcheck(bradley_terry_loss, (a, b))


def test_scores_of_thousands_stay_finite() -> None:
    logits = torch.tensor([1e4, -1e4], requires_grad=True)
    for loss in (
        reward_feedback_loss(logits),
        reward_bce_loss(logits, torch.tensor([0.0, 1.0])),
        bradley_terry_loss(logits, -logits.detach()),
    ):
        (gradient,) = torch.autograd.grad(loss, logits)
        assert loss.isfinite() and gradient.isfinite().all()
    assert float(reward_bce_loss(logits.detach(), torch.tensor([0.0, 1.0]))) == 1e4


def test_narrow_logits_are_computed_in_float32() -> None:
    logits = torch.randn(7).bfloat16().requires_grad_()
    for loss in (
        reward_feedback_loss,
        lambda s: reward_bce_loss(s, torch.ones(7)),
        lambda s: bradley_terry_loss(s, -s),
    ):
        value, exact = loss(logits), loss(logits.detach().double())
        assert value.dtype == torch.float32
        assert close(value, float(exact), 1e-6)  # a dozen roundings of 6e-8
        assert torch.autograd.grad(value, logits)[0].dtype == torch.bfloat16


GOOD = torch.zeros(3)
WRONG: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "two axes": (lambda: reward_feedback_loss(torch.zeros(3, 1)), ValueError, r"logits: expected \[B\].*\(3, 1\)"),
    "empty": (lambda: reward_bce_loss(torch.zeros(0), torch.zeros(0)), ValueError, "logits: expected .* B >= 1"),
    "integers": (lambda: reward_feedback_loss(torch.zeros(3).long()), TypeError, "logits: .* got torch.int64"),
    "margin": (lambda: reward_feedback_loss(GOOD, margin=math.inf), ValueError, "margin: .* got inf"),
    "weight": (lambda: reward_feedback_loss(GOOD, weight=-1), ValueError, "weight: .* got -1"),
    "on": (lambda: reward_feedback_loss(GOOD, on="r"), ValueError, "on: .* got 'r'"),  # type: ignore[arg-type]
    "labels' shape": (lambda: reward_bce_loss(GOOD, torch.zeros(3, 1)), ValueError, r"labels: .*\(3,\), got \(3, 1\)"),
    "NaN label": (lambda: reward_bce_loss(GOOD, torch.tensor([0, 1, math.nan])), ValueError, r"labels: .*\[nan\]"),
    "label of 2": (lambda: reward_bce_loss(GOOD, torch.tensor([0, 2, 1])), ValueError, r"labels: .* got \[2.0\]"),
    "negative label": (lambda: reward_bce_loss(GOOD, torch.tensor([-0.1, 0, 1])), ValueError, "labels: .* 0..1"),
    "unpaired": (lambda: bradley_terry_loss(GOOD, torch.zeros(2)), ValueError, "rejected_logits: expected the shape"),
    "rejected": (lambda: bradley_terry_loss(GOOD, GOOD[:, None]), ValueError, r"rejected_logits: expected \[B\]"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments(case: str) -> None:
    call, error, message = WRONG[case]
    with pytest.raises(error, match=message):
        call()
