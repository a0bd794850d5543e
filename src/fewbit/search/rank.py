"""How well each score orders what the measured KL orders: Spearman's rank correlation.

    rho = corr(rank(score), rank(KL))        1: the same order; 0: no relation

Layers are ranked under one choice: that is what a budget decides between. Ranking all choices together says
whether a score tells formats from each other too. Ties share their mean rank (`scipy.stats.spearmanr`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from fewbit.search.measure import Row, Score


def rank_correlation(rows: Iterable[Row], score: Score) -> float | None:
    """Spearman's rho between ``score`` and the measured KL of ``rows``; None where one of them is missing or
    constant, or for fewer than 3 rows.
    """
    from scipy.stats import spearmanr

    pairs = [(r.value(score), r.kl) for r in rows]
    pairs = [(a, b) for a, b in pairs if a is not None and b is not None]
    if len(pairs) < 3 or any(len(set(side)) == 1 for side in zip(*pairs, strict=True)):
        return None
    rho = float(spearmanr(*zip(*pairs, strict=True)).statistic)
    return None if math.isnan(rho) else rho


def rank_correlations(
    rows: Mapping[str, Sequence[Row]], scores: Iterable[Score]
) -> dict[str, dict[str, float | None]]:
    """Rho by choice and score; under "all", that of all choices together."""
    by_choice: dict[str, list[Row]] = {}
    for own in rows.values():
        for row in own:
            by_choice.setdefault(row.choice, []).append(row)
    by_choice |= {"all": [row for own in rows.values() for row in own]} if len(by_choice) > 1 else {}
    return {name: {s.value: rank_correlation(own, s) for s in scores} for name, own in by_choice.items()}
