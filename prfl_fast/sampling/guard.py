"""The guard: a chain is recomputed in the backward, so the model must still be the one that sampled.

Without it a changed weight, adapter or mode would give a wrong gradient in silence.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from prfl_fast.sampling.recovery import is_sharded


class ModelChangedError(RuntimeError):
    """The model changed between sampling and backward; the recomputed chain would not be the sampled one."""


def _adapter_layers(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """LoRA-like layers, recognised by peft's own convention: a ``scaling`` dictionary per adapter name."""
    return [(name, m) for name, m in module.named_modules() if isinstance(getattr(m, "scaling", None), dict)]


def _adapter_state(layer: Any) -> tuple[Any, ...]:
    return (
        tuple(sorted(layer.scaling.items())),
        tuple(getattr(layer, "active_adapters", ())),
        bool(getattr(layer, "disable_adapters", False)),
        tuple(getattr(layer, "merged_adapters", ())),
    )


class ModelGuard:
    """Remembers what decides a network's output: its parts and parameters, their versions, train or eval mode, LoRA
    state. What is written through ``parameter.data`` goes unseen: torch itself does not count such writes.

    Args:
        modules: the networks of the chain (two for two experts); plain callables have nothing to remember.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._roots = list(modules)
        self._tensors = [
            (name, tensor)
            for module in self._roots
            for name, tensor in (*module.named_parameters(), *module.named_buffers())
        ]
        self._modules = [(name, m) for module in self._roots for name, m in module.named_modules()]
        # FSDP2 puts other tensors in place of its parameters while a block runs.
        self._swapped = any(is_sharded(m) for _, m in self._modules)
        self._parameters = self._read_parameters()
        self._layers = [pair for module in self._roots for pair in _adapter_layers(module)]
        self._scaled: list[Any] = [layer for _, layer in self._layers]
        self._versions = self._read_versions()
        self._training = [m.training for _, m in self._modules]
        self._adapters = [_adapter_state(layer) for _, layer in self._layers]

    def _read_versions(self) -> list[tuple[int, bool, torch.dtype]]:
        return [(tensor._version, tensor.requires_grad, tensor.dtype) for _, tensor in self._tensors]

    def _read_parameters(self) -> list[tuple[str, int]]:
        named = (pair for module in self._roots for pair in module.named_parameters())
        return [] if self._swapped else [(name, id(parameter)) for name, parameter in named]

    @contextmanager
    def same_scales(self) -> Iterator[None]:
        """LoRA scalings after a call as before it. diffusers multiplies them for the call and divides them after it,
        which is not always the same number again (3 * 0.1 / 0.1), and forgets them for a scale of 0."""
        before = [dict(layer.scaling) for layer in self._scaled]
        try:
            yield
        finally:
            for layer, scaling in zip(self._scaled, before, strict=True):
                layer.scaling.update(scaling)

    def check(self) -> None:
        """Raises ModelChangedError, naming the first thing that differs."""
        versions = self._read_versions()
        if versions != self._versions:
            pairs = zip(self._tensors, versions, self._versions, strict=True)
            name, now, then = next((n, now, then) for (n, _), now, then in pairs if now != then)
            if now[2] != then[2]:
                self._fail(f"tensor {name!r} was {then[2]} and is {now[2]}")
            self._fail(f"tensor {name!r} {'was written to' if now[0] != then[0] else 'was frozen or unfrozen'}")
        parts = [(name, id(m)) for module in self._roots for name, m in module.named_modules()]
        self._compare("module", parts, [(name, id(m)) for name, m in self._modules])
        self._compare("parameter", self._read_parameters(), self._parameters)
        training = [m.training for _, m in self._modules]
        if training != self._training:
            index = next(i for i, (a, b) in enumerate(zip(training, self._training, strict=True)) if a != b)
            name, mode = self._modules[index][0], "train" if training[index] else "eval"
            self._fail(f"module {name or '(root)'!r} is now in {mode} mode")
        adapters = [_adapter_state(layer) for _, layer in self._layers]
        if adapters != self._adapters:
            index = next(i for i, (a, b) in enumerate(zip(adapters, self._adapters, strict=True)) if a != b)
            self._fail(f"LoRA scaling or active adapters of {self._layers[index][0]!r} differ")

    def _compare(self, kind: str, now: list[tuple[str, int]], then: list[tuple[str, int]]) -> None:
        if now != then:
            name = sorted(set(now) ^ set(then))[0][0] if set(now) != set(then) else now[0][0]
            self._fail(f"{kind} {name or '(root)'!r} was added, removed or replaced")

    @staticmethod
    def _fail(what: str) -> None:
        raise ModelChangedError(
            f"the model changed between sampling and backward: {what}. Call backward before the optimizer step, and "
            "before switching adapters or modes; or sample again."
        )
