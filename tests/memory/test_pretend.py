"""Running a network on fake tensors: nothing is computed, nothing is left behind, and what decides stays real."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from prfl_fast.memory.pretend import REAL_ELEMENTS, Pretence, UntraceableError, real_leaf, tracing
from prfl_fast.memory.trace import LiveBytes


class Net(nn.Module):
    """Keeps things from call to call, as networks do that cache tables."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.norm = nn.BatchNorm1d(6)
        self.drop = nn.Dropout(0.5)
        self.cache: dict[int, Tensor] = {}
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.last = x
        self.cache[x.shape[0]] = x * 2
        return self.drop(self.norm(self.linear(x)))


def state(net: nn.Module) -> list[Any]:
    """Every attribute of every part by identity, every value of every tensor."""
    parts = list(net.modules())
    attributes = [{k: id(v) for k, v in vars(m).items()} for m in parts]
    tensors = [(id(t), t._version, t.detach().clone(), t.grad) for t in (*net.parameters(), *net.buffers())]
    return [attributes, [(a, b, c.tolist(), d) for a, b, c, d in tensors]]


def test_modules_and_random_state_are_as_they_were() -> None:
    net = Net()
    hooked = []
    handle = net.linear.register_forward_hook(lambda *_: hooked.append(1))
    before, pretence = state(net), Pretence()
    x = torch.randn(4, 6)
    random = torch.get_rng_state()
    with pretence.inside(net), pretence:
        assert all(isinstance(t, FakeTensor) for t in (*net.parameters(), *net.buffers()))
        y = net(pretence.twin(x))
        assert isinstance(y, FakeTensor) and y.shape == (4, 6)
        y.backward(torch.empty_like(y))
        assert all(isinstance(p.grad, FakeTensor) for p in net.parameters())
    assert state(net) == before
    assert net.cache == {} and net.last is None and hooked == []
    assert torch.equal(torch.get_rng_state(), random)
    net(x)
    assert hooked == [1]
    handle.remove()


def test_an_exception_puts_everything_back() -> None:
    net = Net()
    before, pretence = state(net), Pretence()
    with pytest.raises(KeyboardInterrupt), pretence.inside(net), pretence:
        net(pretence.twin(torch.randn(3, 6)))
        raise KeyboardInterrupt
    assert state(net) == before


def test_no_memory_is_used_and_the_count_is_that_of_a_real_run() -> None:
    net, x = nn.Sequential(nn.Linear(6, 50), nn.GELU(), nn.Linear(50, 6)), torch.randn(7, 6)

    def work(given: Tensor) -> int:
        with LiveBytes() as live:
            net(given).square().sum().backward()
        return live.peak

    real = work(x)
    net.zero_grad()
    pretence = Pretence()
    with pretence.inside(net), pretence:
        fake = work(pretence.twin(x))
    assert fake == real


def test_a_twin_has_everything_but_bytes() -> None:
    pretence = Pretence()
    base = torch.randn(4, 10, dtype=torch.bfloat16)
    strided = base.t()[::2]
    leaf = nn.Parameter(torch.randn(3))
    leaf.grad = torch.ones(3)
    twin, leaf_twin = pretence.twin(strided), pretence.twin(leaf)
    assert (twin.shape, twin.stride(), twin.dtype, twin.device) == (
        strided.shape, strided.stride(), strided.dtype, strided.device
    )  # fmt: skip
    assert pretence.twin(strided) is twin
    assert leaf_twin.requires_grad and leaf_twin.is_leaf and isinstance(leaf_twin.grad, FakeTensor)
    assert not twin.requires_grad
    assert pretence.twin(torch.randn(0, 3)).shape == (0, 3)
    tree = {"text": torch.randn(2, 3), "mask": torch.ones(2, dtype=torch.bool), "pair": (leaf, None), "size": 4}
    twins = pretence.twins(tree)
    assert isinstance(twins["text"], FakeTensor) and twins["pair"][0] is leaf_twin
    assert twins["mask"] is tree["mask"] and twins["size"] == 4
    with pytest.raises(UntraceableError, match=r"^memory_budget: expected a network that can be traced"):
        pretence.twin(torch.eye(3).to_sparse())


def test_what_decides_is_computed_and_what_is_large_is_not() -> None:
    pretence = Pretence()
    times = torch.tensor([9.0, 5.0, 1.0])
    with pretence:
        assert int((times == 5).nonzero()) == 1
        assert float(torch.arange(5).sum()) == 10
        assert not isinstance(torch.zeros(REAL_ELEMENTS), FakeTensor)
        assert isinstance(torch.zeros(REAL_ELEMENTS + 1), FakeTensor)
        # A mask of all pairs from a table that is small itself.
        positions = torch.arange(2000)
        assert isinstance(positions[:, None] <= positions, FakeTensor)
        mixed = pretence.twin(torch.randn(3)) + times
        assert isinstance(mixed, FakeTensor)
    assert not isinstance(torch.zeros(REAL_ELEMENTS + 1), FakeTensor)


@pytest.mark.parametrize(
    "decides",
    [
        lambda x: x if bool(x.sum() > 0) else -x,
        lambda x: x[x > 0],
        lambda x: torch.from_numpy(x.detach().numpy()),
        lambda x: x * float(x.max()),
    ],
)
def test_values_that_decide_are_refused(decides: Any) -> None:
    pretence = Pretence()
    with pytest.raises(UntraceableError, match=r"^memory_budget: .*plan=MemoryPlan"), tracing(), pretence:
        decides(pretence.twin(torch.randn(3)))


def test_leaves_that_are_no_twins_are_found() -> None:
    pretence, hidden = Pretence(), torch.ones(3, requires_grad=True)
    weight = pretence.twin(nn.Parameter(torch.ones(3)))
    with pretence:
        clean = (weight * 2).exp()
        assert real_leaf([clean.grad_fn, None]) is None
        assert real_leaf([clean.grad_fn, (clean + hidden.exp()).sum().grad_fn]) is hidden
    assert hidden.grad is None
