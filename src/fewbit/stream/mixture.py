"""Experts in the loop: each is solved from the tokens that were routed to it, one expert after another.

The batches wait at the experts as a whole, or their calls were kept from one run of the block, so what each
expert reads is at hand: x_e = rows of hidden_states whose top k hold e. Experts run side by side and read
nothing of each other, so one after the other is GPTQ's true-sequential order, and only one expert's Gram
matrices are alive at a time: 128 experts of 2048 inputs would hold 2 GB of them.

A Gram matrix of n tokens has rank n at most. An expert that saw fewer than a quarter of the inputs of its
widest layer is *thin*: a solver would follow the noise of a few tokens, and damping would decide the rest. It
gets all tokens of the block instead, as if the router had sent them to it. Those are not the inputs it was
trained on, but of the same norm's making, and span what its own few do not.

Roads not taken: more calibration text until each expert has enough, which rare experts never have; and
weighting each token by its routing probability, which makes thin experts thinner still.

Shapes: T tokens, k experts a token, E experts, h inputs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fewbit.format import Stats
from fewbit.nn.blocks import linears, weight_of
from fewbit.nn.experts import Expert, Experts
from fewbit.solve.calls import Call
from fewbit.stream.blocks import watch
from fewbit.stream.fold import INSIDE, Notes, fold_maps
from fewbit.stream.gather import gather, inputs_of
from fewbit.stream.inputs import Inputs
from fewbit.stream.planned import PlannedLayer
from fewbit.transform.chooser import Chooser

THIN = "too few tokens were routed to this expert: solved with all tokens of its block"
ENOUGH = 4  # one token for so many inputs of the widest layer, or the expert is thin


@dataclass(frozen=True, kw_only=True)
class Routed:
    """What the batches call experts with. hidden: [T, h] of each batch; index: [T, k] of each."""

    hidden: tuple[Tensor, ...]
    index: tuple[Tensor, ...]

    @staticmethod
    def of(calls: Sequence[Call]) -> Routed:
        """From the calls of `Experts`, one a batch."""
        given = [dict(zip(("hidden_states", "top_k_index"), a, strict=False)) | kw for a, kw in calls]
        hidden, index = (tuple(g[n] for g in given) for n in ("hidden_states", "top_k_index"))
        return Routed(hidden=hidden, index=index)

    def inputs(self, e: int) -> list[Tensor]:
        """The tokens of expert ``e`` in each batch that has some, [n, h]."""
        found = [x[(i == e).any(-1)] for x, i in zip(self.hidden, self.index, strict=True)]
        return [x for x in found if len(x)]

    def enough(self, e: int, expert: nn.Module) -> tuple[list[Tensor], int, tuple[str, ...]]:
        """What ``expert``, the one at ``e``, is solved from; how many tokens are its own; a note if all."""
        inputs = self.inputs(e)
        tokens = sum(map(len, inputs))
        if tokens * ENOUGH >= max(weight_of(m).shape[1] for m in linears(expert).values()):
            return inputs, tokens, ()
        return list(self.hidden), tokens, (THIN,)


def solve_experts(
    experts: Experts,
    name: str,
    layers: Mapping[str, PlannedLayer],
    calls: Sequence[Call],
    in_turn: bool,
    solve: Callable[[list[PlannedLayer], Stats, tuple[str, ...], int | None], None],
) -> None:
    """Solve every layer of ``experts`` that is in ``layers``, by the full name of the module.

    name: of the experts in the model; calls: of the experts, one a batch, none without calibration; in_turn:
    layers read what comes through those of the same expert that were solved before, else through the float
    ones; solve: puts the solved layers in place, given their statistics, notes and how many tokens were
    routed to them.
    """
    routed = Routed.of(calls) if calls else None
    for e in range(len(experts)):
        expert, prefix = experts[e], f"{name}.{e}."
        own = {n: layers[prefix + n] for n in linears(expert) if prefix + n in layers}
        if not own:
            continue
        if routed is None:
            solve(list(own.values()), Stats(), (), None)
            continue
        inputs, tokens, notes = routed.enough(e, expert)
        found = watch(expert, functools.partial(expert, inputs[0][:1]))
        groups = [[own[n] for n in group if n in own] for group in found]
        _solve_groups(expert, prefix, [g for g in groups if g], inputs, in_turn, solve, notes, tokens)


def _solve_groups(expert, prefix, groups, inputs: list[Tensor], in_turn: bool, solve, notes, tokens) -> None:
    """Gather and solve the groups of one expert: at once, or each after those before it are in place."""
    for part in [[g] for g in groups] if in_turn else [groups]:
        seen = {g[0].module: inputs_of(g, len(inputs)) for g in part if any(x.rule.needs for x in g)}
        if seen:
            inside = {m.removeprefix(prefix): own for m, own in seen.items()}
            gather(expert, inside, [functools.partial(expert, x) for x in inputs])
        for group in part:
            own = seen.get(group[0].module)
            solve(group, own.stats() if own else Stats(), notes if own else (), tokens)


def fold_experts(
    experts: Experts,
    layers: Mapping[str, PlannedLayer],
    choosers: Iterable[Chooser],
    guide: Call,
    calls: Sequence[Call],
    stored: torch.dtype,
) -> Notes:
    """Fold the maps that ``choosers`` choose at the seams inside each expert, such as up -> down.

    layers: by name relative to the experts; guide, calls: of the experts, on the witness and one a batch. The
    proof of a fold is the expert's output on all of the guide's tokens: of the block's output, an expert to
    which none of them goes is no part.
    """
    routed, notes = Routed.of(calls), {}
    witness = Routed.of([guide]).hidden[0]
    for e in range(len(experts)):
        expert = experts[e]
        own = {n: layers[f"{e}.{n}"] for n in linears(expert) if f"{e}.{n}" in layers}
        if own:
            inputs = routed.enough(e, expert)[0] if calls else []
            watch_it = functools.partial(_gather, expert, [functools.partial(expert, x) for x in inputs])
            prove = functools.partial(expert, witness)
            notes |= fold_maps(expert, own, choosers, prove, watch_it, len(inputs), stored, INSIDE)
    return notes


def _gather(expert: Expert, runs: Sequence[Callable[[], object]], seen: Mapping[str, Inputs]) -> None:
    gather(expert, seen, runs)
