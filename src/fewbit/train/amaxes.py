"""Delayed scaling: steps come from the amaxes of earlier iterations, so that a cast reads its tensor once.

    s = 2^margin max(history) / F_max        history: the last H amaxes of x, of W and of G, one vector each

as in NVIDIA's TransformerEngine (https://github.com/NVIDIA/TransformerEngine; margin: ``AbsMax.headroom``).
Until a history holds something, steps are fitted in time, to the tensor at hand. An amax of 0, NaN or Inf
changes no step.

Whoever runs the loop says when histories move on: `advance` after ``optimizer.step()``. In between amaxes
are gathered by their maximum, which is the same however often it is taken. So a forward that is computed
again (activation checkpointing) sees the steps that the first one saw, and micro-batches share theirs.
Histories are buffers: they are in ``state_dict``, and a resumed run has the same bits.

Road not taken: to move on at every forward, as TransformerEngine does. Recomputation, pipelines and layers
that are called twice then need to be told apart.

Shapes: history [3, H], pending [3], in the order x, W, G; float32 whatever the dtype of the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

from fewbit.errors import InputError

INPUT, WEIGHT, GRADIENT = range(3)


class Amaxes(nn.Module):
    """Histories of the largest magnitudes of x, W and G of one layer, and those of the step under way."""

    def __init__(self, length: int, device: torch.device | str | None = None):
        super().__init__()
        self.register_buffer("history", torch.zeros(3, length, device=device))
        self.register_buffer("pending", torch.zeros(3, device=device))

    def reset_parameters(self) -> None:
        """Empty histories: what a model made on the meta device starts from."""
        self.history.zero_()
        self.pending.zero_()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in before.items():
            if self._buffers[name].dtype != old.dtype:
                self._buffers[name] = old.to(self._buffers[name].device)
        return self

    def forward(self) -> Tensor:
        """The largest of each history, [3]; 0 where it is empty."""
        return self.history.amax(-1)


def observe(x: Tensor, seen: Tensor, pending: Tensor | None) -> Tensor:
    """The amax [] that steps of x are made of: ``seen`` [], or x's own where that is 0; NaN where x has one,
    or Inf. ``pending`` [], where given, takes x's own in.
    """
    now = x.detach().abs().amax().float()
    if pending is not None:
        pending.copy_(torch.maximum(pending, now.nan_to_num(0.0, posinf=0.0)))
    return torch.where(now.isfinite(), torch.where(seen > 0, seen, now), math.nan)


@torch.no_grad()
def advance(model: nn.Module, group: torch.distributed.ProcessGroup | None = None) -> None:
    """Put the amaxes of the step under way into the histories of every layer of ``model``, in place.

    Call it after every ``optimizer.step()``. group: processes that share the steps; the largest of their
    amaxes count, found in one collective of 12 bytes a layer. Raises ``InputError`` where no layer has a
    history.
    """
    found = [m for m in model.modules() if isinstance(m, Amaxes)]
    if not found:
        raise InputError(f"{type(model).__name__} has no delayed scaling; lower it with delayed() first")
    latest = torch.stack([m.pending for m in found])
    if group is not None:
        torch.distributed.all_reduce(latest, torch.distributed.ReduceOp.MAX, group)
    for amaxes, newest in zip(found, latest, strict=True):
        amaxes.history.copy_(torch.cat([newest[:, None], amaxes.history[:, :-1]], 1))
        amaxes.pending.zero_()
