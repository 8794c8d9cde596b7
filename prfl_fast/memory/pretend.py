"""Running a network without its bytes: fake tensors in place of weights and inputs, so that memory can be counted.

Fake tensors (``torch._subclasses``) know shape, strides, dtype and device and compute nothing. No fake mode is active
here: an operation that touches a fake tensor is fake, others stay real. So a lookup in a scheduler's timesteps, or a
text mask that decides an attention's length, is the same as in the real run, and only large results are made fake.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from prfl_fast.memory.trace import tensors_in

# Real results up to this many elements are computed: enough for timesteps, masks of text and tables of positions.
REAL_ELEMENTS = 2**20

_UNTRACEABLE = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
    NotImplementedError,
)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class UntraceableError(ValueError):
    """The network can't be run on fake tensors, so its memory can't be predicted."""

    def __init__(self, why: str) -> None:
        super().__init__(
            f"memory_budget: expected a network that can be traced without running it: {why}. Leave memory_budget "
            "out, or pass plan=MemoryPlan('blocks') for the least memory"
        )


class Pretence(TorchDispatchMode):
    """While active, operations on the twins that it makes cost no memory and no arithmetic.

    Attributes:
        twins: ``twin(tensor)`` is always the same one for the same tensor.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._twins: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not any(isinstance(t, FakeTensor) for t in tensors_in((args, kwargs))):
            fake = self._large(func, args, kwargs)
            if fake is not None:
                return fake
        return func(*args, **kwargs)

    def _large(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The fake result of an operation on real tensors, if it is large."""
        try:
            with self._fake:
                result = func(*args, **kwargs)
        except _UNTRACEABLE:
            return None  # it depends on values; so it has to be real
        return result if any(t.numel() > REAL_ELEMENTS for t in tensors_in(result)) else None

    def twin(self, tensor: Tensor) -> Tensor:
        """A fake leaf with the tensor's shape, strides, dtype, device, ``requires_grad`` and ``.grad``; on the CPU for
        one on the meta device, whose attention would be traced as a matrix of all scores."""
        if id(tensor) not in self._twins:
            if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout is not torch.strided:
                raise UntraceableError(f"it holds a {type(tensor).__name__} (sharded or quantised weights)")
            device = torch.device("cpu") if tensor.is_meta else tensor.device
            with self._fake:
                twin = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
            twin.requires_grad_(tensor.requires_grad)
            if tensor.is_leaf and tensor.grad is not None:
                twin.grad = self.twin(tensor.grad)
            self._twins[id(tensor)] = (tensor, twin)
        return self._twins[id(tensor)][1]

    def twins(self, tree: Any) -> Any:
        """The same structure with twins for its float tensors; integers and masks stay real, for they decide shapes."""
        return tree_map(lambda v: self.twin(v) if isinstance(v, Tensor) and v.is_floating_point() else v, tree)

    @contextmanager
    def inside(self, *modules: nn.Module) -> Iterator[None]:
        """Parameters and buffers of the modules are twins, hooks and compiled calls rest, and everything is put back
        at the end: what the modules keep from call to call too."""
        parts = {id(m): m for module in modules for m in module.modules()}.values()
        with ExitStack() as stack:
            for part in parts:
                attributes = vars(part)
                containers = [v for v in attributes.values() if type(v) in (dict, list)]
                for container in (attributes, *containers):
                    stack.callback(_put_back, container, container.copy())
                for name in _HOOKS:
                    attributes[name] = type(attributes[name])()
                attributes["_compiled_call_impl"] = None  # of a module compiled in place
                for name in ("_parameters", "_buffers"):
                    own = attributes[name]
                    for key, value in own.items():
                        if value is not None:
                            own[key] = self.twin(value)
            yield


def _put_back(container: Any, content: Any) -> None:
    container.clear()
    if isinstance(container, dict):
        container.update(content)
    else:
        container.extend(content)


def real_leaf(nodes: Iterable[Any], own: Iterable[Tensor] = ()) -> Tensor | None:
    """A leaf of these nodes' graph that is neither a twin nor of ``own``: it would be left with a fake gradient."""
    known = {id(t) for t in own}
    seen: set[Any] = set()
    stack: list[Any] = list(nodes)
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if isinstance(variable, Tensor) and not isinstance(variable, FakeTensor) and id(variable) not in known:
            return variable
        stack.extend(following for following, _ in node.next_functions)
    return None


def refuse_hidden(totals: Iterable[Tensor], own: Iterable[Tensor]) -> None:
    """Raises UntraceableError where the graph has a leaf that is neither fake nor one of ``own``."""
    if real_leaf([t.grad_fn for t in totals], own) is not None:
        raise UntraceableError("it has trainable tensors that are none of its parameters")


@contextmanager
def tracing() -> Iterator[None]:
    """What fake tensors can't do, as UntraceableError."""
    try:
        yield
    except UntraceableError:
        raise
    except _UNTRACEABLE as error:
        raise UntraceableError(f"its values decide what it does ({type(error).__name__}: {error})") from error
    except (RuntimeError, TypeError) as error:
        raise UntraceableError(f"{type(error).__name__}: {error}") from error
