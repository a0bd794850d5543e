"""Experts in the loop: each is solved from the tokens that were routed to it, one expert after another.

The batches wait at the experts as a whole, or their calls were kept from one run of the block, so what each
expert reads is at hand: x_e = rows of hidden_states whose top k hold e. Experts run side by side and read
nothing of each other, so one after the other is GPTQ's true-sequential order, and only one expert's Gram
matrices are alive at a time: 128 experts of 2048 inputs would hold 2 GB of them.

A Gram matrix of n tokens has rank n at most, and a solver follows its noise. For 576 inputs parted by random
directions, GPTQ from 144 or 288 of an expert's own tokens did no better than rounding, and from 576 its error
was 1.7 times that from all tokens of the block, on held-out tokens of the expert; where clusters part them,
own tokens win from 1152 on (benchmarks/results/thin_experts.md). So the block's tokens go in as a prior that
weighs as much as h of them, near the better of the two everywhere:

    H = (n H_own + h H_all) / (n + h)

The router's choice decides as n grows, and an expert that no token reached is solved from all. H_all is that
of at most ``SPREAD`` h tokens, evenly chosen over the block's. An expert with n < h is *thin*, and named.

Roads not taken: own tokens alone above a threshold and all below, which is worse on both sides of it; more
calibration text until each expert has enough, which rare experts never have; and weighting each token by its
routing probability, which makes thin experts thinner still.

Shapes: T tokens, k experts a token, E experts, h inputs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fewbit.format import Stats
from fewbit.nn.blocks import linears, weight_of
from fewbit.nn.experts import Expert, Experts
from fewbit.solve.calls import Call
from fewbit.stream.blocks import watch
from fewbit.stream.coverage import THIN
from fewbit.stream.estimate import SPREAD
from fewbit.stream.fold import INSIDE, Notes, fold_maps
from fewbit.stream.gather import gather, inputs_of
from fewbit.stream.inputs import Inputs
from fewbit.stream.planned import PlannedLayer
from fewbit.transform.chooser import Chooser


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

    def spread(self, count: int) -> Tensor:
        """At most ``count`` tokens, evenly chosen over all batches, [n, h]."""
        x = torch.cat(self.hidden)
        return x[torch.linspace(0, len(x) - 1, min(count, len(x)), device=x.device).long()]


def _width(expert: nn.Module) -> int:
    """Inputs of its widest layer."""
    return max(weight_of(m).shape[1] for m in linears(expert).values())


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
        inputs, spread = routed.inputs(e), routed.spread(SPREAD * _width(expert))
        found = watch(expert, functools.partial(expert, spread[:1]))
        groups = [[own[n] for n in group if n in own] for group in found]
        _solve_groups(expert, prefix, [g for g in groups if g], inputs, spread, in_turn, solve)


def _solve_groups(expert, prefix, groups, inputs: list[Tensor], spread: Tensor, in_turn: bool, solve) -> None:
    """Gather and solve the groups of one expert: at once, or each after those before it are in place."""
    tokens = sum(map(len, inputs))
    notes = (THIN,) if tokens < _width(expert) else ()
    for part in [[g] for g in groups] if in_turn else [groups]:
        asking = [g for g in part if any(x.rule.needs for x in g)]
        seen: list[dict[str, Inputs]] = []
        for rows in (inputs, [spread]) if asking else ():
            seen.append({g[0].module: inputs_of(g, len(rows)) for g in asking})
            inside = {m.removeprefix(prefix): own for m, own in seen[-1].items()}
            gather(expert, inside, [functools.partial(expert, x) for x in rows])
        for group in part:
            name, width = group[0].module, group[0].shape[1]
            stats = mixed(*(found[name].stats() for found in seen), width) if group in asking else Stats()
            solve(group, stats, notes if group in asking else (), tokens)


def mixed(own: Stats, rest: Stats, weight: int) -> Stats:
    """Statistics of an expert's ``own`` tokens, and of the block's, ``rest``, as ``weight`` tokens more.

    Means are mixed; extremes and samples are the expert's own, unless those are fewer than ``weight``.
    """
    if not own.tokens or not rest.tokens:
        return rest if rest.tokens else own
    share = own.tokens / (own.tokens + weight)
    means = {n: (getattr(own, n), getattr(rest, n)) for n in ("gram", "cross", "mean_abs")}
    new = {n: share * a + (1 - share) * b for n, (a, b) in means.items() if a is not None}
    if own.tokens < weight:
        both = {n: (getattr(own, n), getattr(rest, n)) for n in _JOIN}
        new |= {n: _JOIN[n](a, b) for n, (a, b) in both.items() if a is not None}
    return replace(own, **new)


_JOIN = {"low": torch.minimum, "high": torch.maximum}
_JOIN |= dict.fromkeys(("sample", "batches"), lambda a, b: torch.cat([a, b]))


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
            inputs = [*routed.inputs(e), routed.spread(_width(expert))] if calls else []
            watch_it = functools.partial(_gather, expert, [functools.partial(expert, x) for x in inputs])
            prove = functools.partial(expert, witness)
            notes |= fold_maps(expert, own, choosers, prove, watch_it, len(inputs), stored, INSIDE)
    return notes


def _gather(expert: Expert, runs: Sequence[Callable[[], object]], seen: Mapping[str, Inputs]) -> None:
    gather(expert, seen, runs)
