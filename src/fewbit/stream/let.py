"""Tuning in the loop: a block and its seams offered to a tuner, and the maps it learned folded there.

The tuner learns on simulated folds (``fewbit.solve.let``); here the same maps are folded for good, by the
same functions that fold every other map, and the block must still compute what it did. Where it does not, the
block is put back and tuned without maps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from fewbit.format import QTensor
from fewbit.seams import Seam, find_seams, fold_checked
from fewbit.seams.diagonal import gain_shift
from fewbit.seams.shift import fold_shift, takes_shift
from fewbit.seams.trial import checked, kept
from fewbit.solve.calls import Call, Target
from fewbit.solve.let import Joint, Learned
from fewbit.solve.tune import Tuner
from fewbit.stream.planned import PlannedLayer
from fewbit.transform.chooser import Kind


def tune_layers(
    block: nn.Module,
    name: str,
    layers: Mapping[str, PlannedLayer],
    tuner: Tuner,
    calls: Sequence[Call],
    outputs: Sequence[Tensor],
    call: Callable[[], object],
    stored: torch.dtype,
) -> tuple[dict[str, QTensor], tuple[str, ...]]:
    """Weights of ``layers`` (by module name) of block ``name``, learned from the float ``outputs``, and what
    is to be said of it. With ``tuner.let`` the maps that belong to them are folded in the block.
    """
    own = {m.removeprefix(f"{name}."): x for m, x in layers.items()}
    targets = {
        n: Target(format=x.format, activation=x.activation, transposed=x.transposed) for n, x in own.items()
    }
    found = find_joints(block, call, own, stored) if tuner.let is not None else []
    notes = () if found or tuner.let is None else ("no scales were learned: no seam was found in this block",)
    tuned = tuner.tune(block, targets, calls, outputs, joints=[joint for _, joint in found])
    learned = next(iter(tuned.values())).learned
    if learned and (said := fold_learned(block, call, [seam for seam, _ in found], learned, stored)):
        tuned, notes = tuner.tune(block, targets, calls, outputs), (said,)
    return {m: tuned[n].q for m, n in zip(layers, own, strict=True)}, notes


@torch.no_grad()
def find_joints(
    block: nn.Module, call: Callable[[], object], layers: Iterable[str], stored: torch.dtype
) -> list[tuple[Seam, Joint]]:
    """Seams of ``block`` between its named layers, and between norms and those.

    call: runs the block once on a few tokens; stored: dtype of gains and biases in the checkpoint.
    """
    inside, found = set(layers), []
    for seam in find_seams(block, call):
        norm = seam.kind is Kind.NORM
        if inside >= {*seam.readers, *(() if norm else (seam.producer,))}:
            producer = block.get_submodule(seam.producer)
            index = None if seam.index is None else seam.index.to(producer.weight.device)
            joint = Joint(
                producer=seam.producer, readers=seam.readers, norm=norm, index=index, stored=stored,
                one=gain_shift(producer) if norm else 0.0, shift=takes_shift(block, call, seam),
            )  # fmt: skip
            found.append((replace(seam, index=index), joint))
    return found


@torch.no_grad()
def fold_learned(
    block: nn.Module,
    call: Callable[[], object],
    seams: Sequence[Seam],
    learned: Sequence[Learned],
    stored: torch.dtype,
) -> str:
    """Fold one learned map at each seam, in order; or leave the block as it was and say why.

    Raises nothing: "" where all were folded and the block's output stayed.
    """
    undo = kept(block.parameters())
    for seam, own in zip(seams, learned, strict=True):
        said = ""
        if own.delta is not None:
            shift = lambda to, seam=seam, own=own: fold_shift(block, seam, own.delta, to)  # noqa: E731
            said = checked(call, lambda: shift(None), lambda: shift(stored), f"the shift at {seam.producer}")  # noqa: B023
        said = said or fold_checked(block, call, seam, own.s, stored)
        if said:
            undo()
            return said
    return ""
