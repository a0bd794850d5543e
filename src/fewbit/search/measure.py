"""Sensitivity: what each choice of a format does to each layer, by four scores, in one walk over the layers.

    weight   |E|^2 / |W|^2                  t^2, the relative squared error of the weight
    output   tr(E H E^T) / tr(W H W^T)      the relative squared error of the layer's output
    fisher   sum_o r_o e_o M e_o^T          by squared gradients of rows and tokens: its expected cost
    noise    a_l t_eff^2                    HIGGS's coefficient times the effective error: the same
    kl       KL(model || model with this layer alone changed), measured (`fewbit.search.judge`)

The last three are nats per token and may be added over layers; r, M, a and t_eff are those of
`fewbit.search.linearity` and `fewbit.search.errors`. Two texts are used: solvers see the Gram matrix of one,
and errors are judged under that of the other. On its own text feedback looks better than it is, the more so
the wider the layer and the fewer the tokens.

Scores: HIGGS, https://arxiv.org/abs/2411.17525; squared gradients as in HAWQ-V2, https://arxiv.org/abs/1911.03852.
Shapes: tokens [w, l]; W, E [out, in]; H [in, in]; r [out].
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor, nn

from fewbit.errors import InputError
from fewbit.nn.blocks import is_transposed, weight_of
from fewbit.search.errors import Choice, cost, error, gram_matrices
from fewbit.search.judge import Judge, Tick, block_linears, replaced
from fewbit.search.kept import Kept
from fewbit.search.linearity import fisher_inputs, fisher_rows, response
from fewbit.solve import Stats

NOISE_LEVELS = (0.1, 0.3)
GRAM_BYTES = 2**31  # of Gram matrices held at once; more layers take another pass over the text
Phase = Callable[[str, str], Tick | None]


class Score(StrEnum):
    """How much a choice harms. Sums over layers of the last three are nats per token."""

    WEIGHT = "weight"
    OUTPUT = "output"
    FISHER = "fisher"
    NOISE = "noise"
    KL = "kl"


@dataclass(frozen=True, kw_only=True)
class Texts:
    """Token windows [w, l]: ``solve`` gives solvers their statistics, errors are judged under ``judge``, and
    KL is measured on ``kl``, which costs a forward for each layer and choice.
    """

    solve: Tensor
    judge: Tensor
    kl: Tensor

    @classmethod
    def split(cls, tokens: Tensor, kl: Tensor | None = None) -> Texts:
        """The last quarter of the windows judges; ``kl``: otherwise all of that.

        Raises ``InputError`` for fewer than two windows.
        """
        if len(tokens) < 2:
            raise InputError(
                f"{len(tokens)} window cannot be split into those that solvers see and those that judge; "
                "give 2 or more"
            )
        count = max(1, len(tokens) // 4)
        return cls(solve=tokens[:-count], judge=tokens[-count:], kl=tokens[-count:] if kl is None else kl)


@dataclass(frozen=True, kw_only=True)
class Row:
    """What one choice does to one layer; None where it was not asked.

    weight: t^2 = |E|^2 / |W|^2; output, fisher, noise, kl: as above; effective: t_eff^2.
    """

    layer: str
    choice: str
    weight: float
    output: float | None = None
    effective: float | None = None
    fisher: float | None = None
    noise: float | None = None
    kl: float | None = None

    def value(self, score: Score) -> float | None:
        """A score by its name."""
        return getattr(self, score.value)


@torch.no_grad()
def measure(
    model: nn.Module,
    choices: Mapping[str, Sequence[Choice]],
    texts: Texts,
    scores: Collection[Score],
    *,
    kept: Kept | None = None,
    seed: int = 0,
    phase: Phase = lambda *_: None,
) -> dict[str, tuple[Row, ...]]:
    """The rows of every layer named in ``choices``, in the order of its choices.

    model: float, in evaluation mode, as before when this returns; kept: where rows come from and go to as
    they are found; phase: told what begins and what is counted, gives what to call with (done, total).
    Raises ``InputError`` for formats that do not fit a layer.
    """
    kept, modules = kept or Kept(), block_linears(model)
    for name, own in choices.items():
        for choice in own:
            choice.check(tuple(weight_of(modules[name]).shape), f"layer {name}")
    wanted = {"weight", *(s.value for s in scores)}
    todo = [n for n in modules if any(wanted - kept.get(n, c).keys() for c in choices.get(n, ()))]
    if todo:
        with Judge(model, texts.kl) if {Score.KL, Score.NOISE} & set(scores) else nullcontext() as judge:
            measured = judge if Score.KL in scores else None
            for i, near in enumerate(_near(model, choices, todo, texts, scores, judge, seed, phase), 1):
                for choice in choices[near.layer]:
                    if not wanted <= kept.get(near.layer, choice).keys():
                        value = choice.solve(near.w, Stats(gram=near.seen))
                        kept.put(near.layer, choice, near.scores(value, measured))
                near.tick(i, len(todo))
    return {
        n: tuple(Row(layer=n, choice=c.name, **_figures(kept.get(n, c))) for c in own)
        for n, own in choices.items()
    }


def _figures(scores: Mapping[str, float | None]) -> dict[str, float | None]:
    return {name: value for name, value in scores.items() if name in Row.__dataclass_fields__}


@dataclass(frozen=True, kw_only=True)
class _Near:
    """A layer and what is known around it: ``w`` [out, in], H of solvers (``seen``) and that judges,
    r and M of squared gradients, HIGGS's coefficient; None where no score asks.
    """

    layer: str
    module: nn.Module
    w: Tensor
    seen: Tensor | None
    h: Tensor | None
    r: Tensor | None
    m: Tensor | None
    coefficient: float | None
    tick: Tick

    def scores(self, value: Tensor, judge: Judge | None) -> dict[str, float | None]:
        """All of ``value`` [out, in] in place of the weight; KL where there is a judge."""
        found = error(self.w, value, self.h)
        said = {"weight": found.weight, "output": found.output, "effective": found.effective}
        if self.r is not None:
            said["fisher"] = cost(self.w - value, self.r, self.m)
        if self.coefficient is not None:
            said["noise"] = self.coefficient * found.best
        if judge is not None:
            with replaced(self.module.weight, value.t() if is_transposed(self.module) else value):
                said["kl"] = judge.kl()
        return said


def _near(
    model: nn.Module,
    choices: Mapping[str, Sequence[Choice]],
    todo: Sequence[str],
    texts: Texts,
    scores: Collection[Score],
    judge: Judge | None,
    seed: int,
    phase: Phase,
) -> Iterator[_Near]:
    """What is known around each layer of ``todo``, for as many at a time as Gram matrices fit; the judge is
    told where forwards may start.
    """
    modules, rows, left = block_linears(model), {}, list(todo)
    if Score.FISHER in scores:
        tick = phase("how much each layer matters, by gradients", "window")
        rows = fisher_rows(model, texts.solve, seed=seed, progress=tick)
    while left:
        part, held = [], 0
        while left and (not part or held < GRAM_BYTES):
            part.append(left.pop(0))
            held += 12 * weight_of(modules[part[-1]]).shape[1] ** 2
        if judge is not None:
            judge.close()  # whole forwards for the inputs
        seen, weighted = {}, {}
        asked = [n for n in part if any(c.wants_inputs for c in choices[n])]
        if asked:
            seen = gram_matrices(model, asked, texts.solve, phase("inputs that solvers see", "window"))
        judging = gram_matrices(model, part, texts.judge, phase("inputs that judge", "window"))
        if rows:
            tick = phase("how much each token matters, by gradients", "window")
            weighted = fisher_inputs(model, part, texts.judge, seed=seed, progress=tick)
        tick = phase("what each choice does to each layer", "layer") or (lambda *_: None)
        for name in part:
            module, a = modules[name], None
            if judge is not None:
                judge.start_at(name)
            if Score.NOISE in scores:
                a = response(judge, name, module.weight, NOISE_LEVELS, seed).coefficient
            yield _Near(
                layer=name, module=module, w=weight_of(module).detach().float(), seen=seen.get(name),
                h=judging.get(name), r=rows.get(name), m=weighted.get(name), coefficient=a, tick=tick,
            )  # fmt: skip
