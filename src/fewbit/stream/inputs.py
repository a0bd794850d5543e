"""What calibration sees of the tensor that a group of layers reads, reduced as the batches pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fewbit.errors import InputError
from fewbit.format import Need, Stats
from fewbit.format.activation import Activation
from fewbit.kernel.gram import add_gram, full

SAMPLE_ROWS = 4096  # tokens kept for fitting static ranges


class Inputs:
    """Running statistics of x [..., in]: those that ``needs`` names, over ``batches`` calls of ``add``.

    activations: how each layer that reads x rounds it; ``Need.CROSS`` asks for one way, with dynamic steps,
    and raises ``InputError`` otherwise.
    """

    def __init__(
        self, needs: frozenset[Need], batches: int, activations: Sequence[Activation | None] = (None,)
    ):
        self.needs, self.tokens = needs, 0
        self._activation = _one_way(activations) if Need.CROSS in needs else None
        self._cross: Tensor | None = None
        self._rows = max(1, SAMPLE_ROWS // max(1, batches))
        self._gram: Tensor | None = None
        self._columns: list[Tensor] | None = None  # sum |x|, low, high
        self._sample: list[Tensor] = []
        self._batches: list[Tensor] = []

    def add(self, x: Tensor) -> None:
        """One batch of inputs."""
        x = x.detach().reshape(-1, x.shape[-1])
        self.tokens += len(x)
        read = x
        if self._activation is not None:
            read = self._activation(x)
            if self._cross is None:
                self._cross = torch.zeros(x.shape[1], x.shape[1], device=x.device)
            self._cross.addmm_((x.float() - read.float()).T, read.float())
        if Need.GRAM in self.needs:
            if self._gram is None:
                self._gram = torch.zeros(x.shape[1], x.shape[1], device=x.device)
            add_gram(self._gram, read)
        if Need.COLUMNS in self.needs:
            low, high = (v.float() for v in torch.aminmax(x, dim=0))
            total = x.abs().sum(0, dtype=torch.float32)
            if self._columns is None:
                self._columns = [total, low, high]
            else:
                old = self._columns
                self._columns = [old[0] + total, old[1].minimum(low), old[2].maximum(high)]
            self._batches.append(torch.stack([low.min(), high.max()]))
        if Need.SAMPLE in self.needs:
            self._sample.append(x[:: -(-len(x) // self._rows)].float())

    def stats(self) -> Stats:
        """What was seen."""
        if not self.tokens:
            return Stats()
        total, low, high = self._columns or (None, None, None)
        return Stats(
            gram=None if self._gram is None else full(self._gram).div_(self.tokens),
            cross=None if self._cross is None else self._cross / self.tokens,
            mean_abs=None if total is None else total / self.tokens,
            low=low,
            high=high,
            sample=torch.cat(self._sample) if self._sample else None,
            batches=torch.stack(self._batches) if self._batches else None,
            tokens=self.tokens,
        )


def _one_way(activations: Sequence[Activation | None]) -> Activation | None:
    """The activation of all layers of a group."""
    first = activations[0]
    if any(a != first for a in activations) or (first is not None and first.static):
        ways = ", ".join(sorted({str(a) for a in activations}))
        raise InputError(
            "weights are aimed at inputs that all layers with one input round alike, with dynamic steps, "
            f"got {ways}; give these layers one such input format, or a solver that does not aim"
        )
    return first
