"""Choosing and folding a recipe's maps in one block, before its layers are solved."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import nn

from fewbit.nn.blocks import weight_of
from fewbit.seams import find_seams, fold_checked
from fewbit.stream.inputs import Inputs
from fewbit.stream.plan import PlannedLayer
from fewbit.transform.chooser import Chooser, Reader

Notes = dict[str, tuple[str, ...]]  # by layer: what was not folded, and why


def fold_maps(
    block: nn.Module,
    layers: Mapping[str, PlannedLayer],
    choosers: Iterable[Chooser],
    call: Callable[[], object],
    watch: Callable[[Mapping[str, Inputs]], None],
    batches: int,
    stored: torch.dtype,
) -> Notes:
    """Fold what each chooser chooses at the seams it serves; statistics are those of the float block.

    layers: by name relative to the block; call: runs the block on the witness; watch: runs it on every
    waiting batch (``batches`` of them) and shows each named layer's input to its ``Inputs``; stored: the
    dtype in which norms are written.
    """
    notes: Notes = {}
    seams = find_seams(block, call)
    for chooser in choosers:
        chosen = [
            (seam, readers)
            for seam in seams
            if seam.kind in chooser.kinds and (readers := [r for r in seam.readers if r in layers])
        ]
        seen = {readers[0]: Inputs(chooser.needs, batches) for _, readers in chosen}
        watch(seen)
        for seam, readers in chosen:
            parts = [_reader(block, r, layers[r]) for r in readers]
            device = parts[0].weight.device
            index = None if seam.index is None else seam.index.to(device)
            s = chooser(parts, seen[readers[0]].stats(), index).to(parts[0].weight)
            said = fold_checked(block, call, seam, s, stored)
            for r in readers if said else ():
                notes[layers[r].name] = (*notes.get(layers[r].name, ()), said)
    return notes


def _reader(block: nn.Module, name: str, layer: PlannedLayer) -> Reader:
    weight = weight_of(block.get_submodule(name)).detach().float()
    return Reader(weight=weight, format=layer.format, activation=layer.activation)
