"""Tuning between groups in the loop: a block's waiting calls, and what in it is still float.

The batches wait at the block while it is solved: gains that are tuned change the inputs of layers that were
solved before, so every group's inputs come from the block's own inputs once more.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from fewbit.solve.blocktune import BlockTuning, Outcome, Soft, tune_rest
from fewbit.solve.calls import Call, Calls


def make_up(
    block: nn.Module,
    solved: Collection[str],
    stored: Collection[str],
    dtype: torch.dtype,
    calls: Sequence[Call],
    outputs: Sequence[Tensor],
    tuning: BlockTuning,
    soft: Mapping[str, Soft],
) -> Outcome:
    """Tune the parameters of ``block`` that are not among ``solved``, towards ``outputs``, in place.

    solved, stored: parameters by name relative to the block, those that stay as they are and those that the
    checkpoint keeps as ``dtype``; calls: of the block, on the inputs that reach it; soft: those of ``solved``
    that are learned through their tables.
    """
    leaves = {n: p for n, p in block.named_parameters() if n not in solved and p.is_floating_point()}
    cut = tuning.split(len(calls))
    train, held = (Calls(block, {}, calls[part], outputs[part]) for part in (slice(cut), slice(cut, None)))
    found = tune_rest(train, held, leaves, tuning, dict.fromkeys(stored, dtype), soft)
    if found.error < found.start:
        with torch.no_grad():
            for n, value in found.values.items():
                own = soft[n].weight(value) if n in soft else value
                block.get_parameter(n).copy_(own)
    return found
