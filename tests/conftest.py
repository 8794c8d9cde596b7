"""What every test starts from: a fixed seed, no network, and nothing left changed for the next one."""

from __future__ import annotations

import os
import signal
import zlib
from collections.abc import Iterator

# Before diffusers or transformers are imported by any test: nothing here may reach for a model hub.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"

import pytest
import torch


@pytest.fixture(autouse=True)
def _same_start_same_end(request: pytest.FixtureRequest) -> Iterator[None]:
    """Seed by the test's name (another order, the same inputs) and catch global state that a test leaves behind."""
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))
    yield
    left = []
    if not torch.is_grad_enabled():
        torch.set_grad_enabled(True)
        left.append("gradients switched off")
    if torch.get_default_dtype() is not torch.float32:
        torch.set_default_dtype(torch.float32)
        left.append("another default dtype")
    if left:
        pytest.fail(f"the test leaves {' and '.join(left)}")


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Python's own handler: a shell starts what it puts in the background with the signal ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.environ.get("TRITON_INTERPRET") != "1":
        for item in items:
            if item.get_closest_marker("interpreter"):
                item.add_marker(pytest.mark.skip(reason="runs in the child of test_triton_interpreter.py"))
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="more random cases where a test knows how; for runs by hand")
