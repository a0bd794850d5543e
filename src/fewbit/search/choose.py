"""From scores to the best choice of every layer under a budget.

    minimize  sum_l L[l, c_l]     subject to     sum_l C[l, c_l]  <=  B            at most so many bits
    minimize  sum_l C[l, c_l]     subject to     sum_l L[l, c_l]  <=  KL           at most so much harm

with L the scores of `fewbit.search.measure` and C the stored bits: one program, its two sides exchanged,
solved exactly by `fewbit.search.allocate`. HIGGS, https://arxiv.org/abs/2411.17525. Other methods are
constrained cases of it: MoFQ (https://arxiv.org/abs/2305.12356) has two choices of equal bits, so that no
budget binds; mixed precision (https://arxiv.org/abs/2109.12948) has 8 bits and 16, and a budget near 8.

The minimum is also the expected KL. It holds while it is small (`RANGE`); above, layers make each other's
errors worse and the sum promises too much, but still tells better from worse.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fewbit.errors import InputError
from fewbit.search.allocate import allocate
from fewbit.search.errors import Choice
from fewbit.search.measure import Row, Score

RANGE = 0.3  # nats per token up to which the sum over layers was seen to hold (docs/search.md)


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Either ``bits`` that the layers may take in all, or ``kl``, nats per token expected at most."""

    bits: float | None = None
    kl: float | None = None

    def __post_init__(self) -> None:
        given = [b for b in (self.bits, self.kl) if b is not None]
        if len(given) != 1 or not given[0] > 0:
            raise InputError(f"a budget is a positive number of bits or a positive KL, not both; got {self}")


@dataclass(frozen=True, kw_only=True)
class Picked:
    """The choice of one layer: its index, stored bits in all, and what it is expected to cost."""

    layer: str
    weights: int
    choice: int
    bits: float
    loss: float
    row: Row


@dataclass(frozen=True, kw_only=True)
class Found:
    """A choice for every layer."""

    layers: tuple[Picked, ...]

    @property
    def bits(self) -> float:
        """Stored bits of these layers, everything counted."""
        return sum(p.bits for p in self.layers)

    @property
    def bits_per_weight(self) -> float:
        """The same per weight."""
        return self.bits / sum(p.weights for p in self.layers)

    @property
    def expected_kl(self) -> float:
        """The sum of what the layers cost, nats per token where the score is."""
        return sum(p.loss for p in self.layers)


def choose(
    choices: Mapping[str, Sequence[Choice]],
    shapes: Mapping[str, tuple[int, int]],
    rows: Mapping[str, Sequence[Row]],
    budget: Budget,
    score: Score = Score.FISHER,
    *,
    together: Sequence[Sequence[str]] = (),
    kept: float = 16,
) -> Found:
    """The best choice of each layer under ``budget``.

    choices: of each layer, equally many; shapes [out, in]; rows: of `fewbit.search.measure` for the same
    choices and with the ``score``; together: layers that choose alike; kept: bits of a weight that stays as
    it is.

    Raises ``InputError`` for a budget that cannot be met.
    """
    names = list(choices)
    costs = np.array([[c.bits(shapes[n], kept) for c in choices[n]] for n in names])
    losses = np.array([[_loss(r, score) for r in rows[n]] for n in names])
    weights = np.array([shapes[n][0] * shapes[n][1] for n in names])
    groups = [[names.index(n) for n in g] for g in together]
    if budget.kl is None:
        _check(costs, weights.sum(), budget.bits)
        index = allocate(costs, losses, budget.bits, groups)
    else:
        least = losses.min(1).sum()
        if least > budget.kl:
            raise InputError(
                f"an expected KL of {budget.kl:g} is below the {least:.3g} of the most exact choices; allow "
                "more, or add a choice of more bits, such as keep"
            )
        index = allocate(losses, costs, budget.kl, groups)
    return Found(
        layers=tuple(
            Picked(
                layer=n, weights=int(weights[i]), choice=int(c), bits=float(costs[i, c]),
                loss=float(losses[i, c]), row=rows[n][c],
            )
            for i, (n, c) in enumerate(zip(names, index, strict=True))
        )
    )  # fmt: skip


def _loss(row: Row, score: Score) -> float:
    """The score; where the text never reached the layer there is none of its output: that of its weight."""
    value = row.value(Score.WEIGHT if score is Score.OUTPUT and row.output is None else score)
    assert value is not None, f"{score} of {row.layer} was not measured"
    return value


def _check(costs: np.ndarray, weights: int, bits: float) -> None:
    least, most = costs.min(1).sum() / weights, costs.max(1).sum() / weights
    if least * weights > bits * (1 + 1e-12):
        raise InputError(
            f"{bits / weights:.4g} bits per weight are fewer than the {least:.4g} of the smallest choices, "
            f"scales counted; give {np.ceil(100 * least) / 100:g} or more (the largest take {most:.4g}), or "
            "smaller choices"
        )
