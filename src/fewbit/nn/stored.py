"""Modules whose buffers are what a file holds: codes and steps keep the dtypes that their Formats give them.

Devices follow ``module.to``; dtypes do not. ``model.half()`` would otherwise round float32 steps in silence.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

from torch import Tensor, nn


class Stored(nn.Module):
    """A module whose buffers keep their dtypes, except those named in ``follows``."""

    follows: tuple[str, ...] = ()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and name not in self.follows and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        return self
