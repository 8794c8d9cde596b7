"""``fuse``: a diffusers transformer whose blocks run on the ops, one small file per family."""

from __future__ import annotations

from prfl_fast.models.fused.door import fuse, unfuse

__all__ = ["fuse", "unfuse"]
