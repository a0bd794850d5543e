"""Choosing and folding a recipe's maps in one block, before its layers are solved.

Three kinds of seams, each found, folded and verified by a module of ``fewbit.seams``: scales behind norms
and linears, scales between queries and keys, orders of hidden channels. What they share is here: statistics
of the float block over all batches, then one choice and one checked fold a seam; a note where nothing came of
it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import nn

from fewbit.nn.blocks import linears, weight_of
from fewbit.nn.experts import routers
from fewbit.seams import Seam, find_seams, fold_checked
from fewbit.seams.attention import KeySeam, find_keys, fold_keys_checked
from fewbit.seams.order import OrderSeam, find_orders, fold_order_checked
from fewbit.stream.inputs import Inputs
from fewbit.stream.planned import PlannedLayer
from fewbit.transform.chooser import SCALES, Chooser, Kind, Reader

Notes = dict[str, tuple[str, ...]]  # by layer: what was not folded, and why

FINDERS = (  # the kinds of seams that each finds
    (SCALES, find_seams),
    (frozenset({Kind.ATTENTION}), find_keys),
    (frozenset({Kind.ORDER}), find_orders),
)
INSIDE = FINDERS[0], FINDERS[2]  # those inside one expert, which has no attention
FOLDS = {Seam: fold_checked, KeySeam: fold_keys_checked, OrderSeam: fold_order_checked}


@torch.no_grad()
def fold_maps(
    block: nn.Module,
    layers: Mapping[str, PlannedLayer],
    choosers: Iterable[Chooser],
    call: Callable[[], object],
    watch: Callable[[Mapping[str, Inputs]], None],
    batches: int,
    stored: torch.dtype,
    finders: Sequence[tuple] = FINDERS,
) -> Notes:
    """Fold what each chooser chooses at the seams it serves; statistics are those of the float block.

    layers: by name relative to the block; call: runs the block on the witness; watch: runs it on every
    waiting batch (``batches`` of them) and shows each named layer's input to its ``Inputs``; stored: the
    dtype in which norms, biases and weights that stay float are written; finders: the kinds of seams that are
    looked for. Inside experts (``mixture.py``) seams are sought of each expert by itself, and not missed.
    """
    choosers = tuple(choosers)
    notes: Notes = {}
    asked = frozenset().union(*(chooser.kinds for chooser in choosers))
    seams = [seam for kinds, find in finders if kinds & asked for seam in find(block, call)]
    for chooser in choosers:
        chosen = [(s, _readers(s, layers)) for s in seams if s.kind in chooser.kinds]
        chosen = [(seam, readers) for seam, readers in chosen if readers or seam.kind is Kind.ATTENTION]
        if not chosen and finders is not FINDERS:
            continue
        if not chosen:
            _note(notes, layers, (), f"nothing for {chooser} in this block: no seam of its kind was found")
            continue
        seen = [Inputs(chooser.needs, batches) for _ in chosen]
        _watch(block, chosen, seen, watch)
        for (seam, readers), own in zip(chosen, seen, strict=True):
            parts = [_reader(block, r, layers[r]) for r in readers]
            device = next(block.parameters()).device
            index = seam.index.to(device) if isinstance(seam, Seam) and seam.index is not None else None
            choice = chooser(parts, own.stats(), index).to(device)
            said = FOLDS[type(seam)](block, call, seam, choice, stored)
            if said:
                _note(notes, layers, readers, said)
    # a fold may have changed weights that are stored as they are
    for name, module in (linears(block) | routers(block)).items():
        if name not in layers:
            module.weight.copy_(module.weight.to(stored))
    return notes


def _readers(seam: Seam | KeySeam | OrderSeam, layers: Mapping[str, PlannedLayer]) -> list[str]:
    """The layers to be quantized that a seam's map serves; none of keys that come out of a norm."""
    names = {Kind.ATTENTION: lambda: (seam.keys,), Kind.ORDER: lambda: (seam.reader,)}
    return [r for r in names.get(seam.kind, lambda: seam.readers)() if r in layers]


def _watch(block: nn.Module, chosen, seen: list[Inputs], watch) -> None:
    """Let each seam's ``Inputs`` see what its readers read, or the keys, in one run of every batch."""
    handles = []
    for (seam, _), own in zip(chosen, seen, strict=True):
        if seam.kind is Kind.ATTENTION:
            hook = lambda m, args, out, seam=seam, own=own: own.add(seam.magnitudes(out))  # noqa: E731
            handles.append(block.get_submodule(seam.keys).register_forward_hook(hook))
    pairs = zip(chosen, seen, strict=True)
    inputs = {_watched(s, r): own for (s, r), own in pairs if s.kind is not Kind.ATTENTION}
    try:
        watch(inputs)
    finally:
        for handle in handles:
            handle.remove()


def _watched(seam: Seam | OrderSeam, readers: Sequence[str]) -> str:
    """The module at which all that the seam's producer makes is seen."""
    return getattr(seam, "reads", "") or readers[0]


def _note(notes: Notes, layers: Mapping[str, PlannedLayer], readers: Iterable[str], said: str) -> None:
    """Say it of the readers, or of the block's first layer where there is none."""
    for r in tuple(readers) or tuple(layers)[:1]:
        notes[layers[r].name] = (*notes.get(layers[r].name, ()), said)


def _reader(block: nn.Module, name: str, layer: PlannedLayer) -> Reader:
    weight = weight_of(block.get_submodule(name)).detach().float()
    return Reader(weight=weight, format=layer.format, activation=layer.activation)
