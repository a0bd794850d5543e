"""Shifts at a seam: what the producer's bias loses, the biases of the readers take.

    X W^T + B = (X - delta) W^T + (B + delta W^T)

Uneven channels, all of whose values lie on one side of zero, are centred this way: Outlier Suppression+ (Wei
et al. 2023, https://arxiv.org/abs/2304.09145), and the shift of OmniQuant (https://arxiv.org/abs/2308.13137,
eq. 3). Producer and readers must have biases, and between them nothing but what passes a constant on: a
norm's readers, or v -> o (softmax rows add up to 1), not the activation function of an FFN. That is tried,
not tabled. Shapes: delta [rows of the producer]; weights [out, in].
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fewbit.nn.blocks import weight_of
from fewbit.seams.diagonal import Seam
from fewbit.seams.trial import changed_by, kept, tolerance


def takes_shift(block: nn.Module, call: Callable[[], object], seam: Seam) -> bool:
    """Whether ``seam`` has the biases, and the block's output stays when a shift is folded there."""
    producer = block.get_submodule(seam.producer)
    modules = (producer, *(block.get_submodule(r) for r in seam.readers))
    if any(getattr(m, "bias", None) is None for m in modules):
        return False
    delta = torch.randn(len(producer.bias), generator=torch.Generator().manual_seed(0)).to(producer.bias)
    return changed_by(call, lambda: fold_shift(block, seam, delta, None)) < tolerance(delta.dtype)


@torch.no_grad()
def fold_shift(block: nn.Module, seam: Seam, delta: Tensor, stored: torch.dtype | None) -> Callable[[], None]:
    """Subtract ``delta`` from the producer's output; returns what undoes it exactly.

    ``stored``: the dtype to which the readers' new biases are rounded. The producer's is left to the fold of
    a scale that follows.
    """
    producer, readers = block.get_submodule(seam.producer), [block.get_submodule(r) for r in seam.readers]
    undo = kept([producer.bias, *(r.bias for r in readers)])
    producer.bias.sub_(delta)
    columns = delta if seam.index is None else delta[seam.index.to(delta.device)]
    for r in readers:
        bias = r.bias + weight_of(r) @ columns.to(r.bias)
        r.bias.copy_(bias if stored is None else bias.to(stored))
    return undo
