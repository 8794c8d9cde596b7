"""The guard: a chain is recomputed in the backward, so the model must still be the one that sampled.

Without it a changed weight, adapter or mode would give a wrong gradient in silence.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


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
    """Remembers what decides a network's output: parameter and buffer versions, train or eval mode, LoRA state.

    Args:
        modules: the networks of the chain (two for two experts); plain callables have nothing to remember.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._tensors = [
            (name, tensor)
            for module in modules
            for name, tensor in (*module.named_parameters(), *module.named_buffers())
        ]
        self._modules = [(name, m) for module in modules for name, m in module.named_modules()]
        self._layers = [pair for module in modules for pair in _adapter_layers(module)]
        self._scaled: list[Any] = [layer for _, layer in self._layers]
        self._versions = self._read_versions()
        self._training = [m.training for _, m in self._modules]
        self._adapters = [_adapter_state(layer) for _, layer in self._layers]

    def _read_versions(self) -> list[tuple[int, bool]]:
        return [(tensor._version, tensor.requires_grad) for _, tensor in self._tensors]

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
            what = "was written to" if now[0] != then[0] else "was frozen or unfrozen"
            self._fail(f"tensor {name!r} {what}")
        training = [m.training for _, m in self._modules]
        if training != self._training:
            index = next(i for i, (a, b) in enumerate(zip(training, self._training, strict=True)) if a != b)
            name, mode = self._modules[index][0], "train" if training[index] else "eval"
            self._fail(f"module {name or '(root)'!r} is now in {mode} mode")
        adapters = [_adapter_state(layer) for _, layer in self._layers]
        if adapters != self._adapters:
            index = next(i for i, (a, b) in enumerate(zip(adapters, self._adapters, strict=True)) if a != b)
            self._fail(f"LoRA scaling or active adapters of {self._layers[index][0]!r} differ")

    @staticmethod
    def _fail(what: str) -> None:
        raise ModelChangedError(
            f"the model changed between sampling and backward: {what}. Call backward before the optimizer step, and "
            "before switching adapters or modes; or sample again."
        )
