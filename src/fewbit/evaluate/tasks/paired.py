"""Two models on the same questions: which answers turned, and is that more than chance?

    p = P( |B - m/2| >= |b - m/2| ),   B ~ Binomial(m, 1/2),   m = b + c

b answers were right and are wrong now, c the other way round. If the bits change nothing on average, each of
the m turned answers fell to either side like a coin: McNemar's test in its exact form (Q. McNemar, Note on
the Sampling Error of the Difference Between Correlated Proportions, 1947). It sees differences that the
standard errors of two accuracies hide: they count what both models get right or wrong together, which says
nothing of their difference. A p below 0.05 in one of twenty rows is what chance does.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from fewbit.errors import InputError

if TYPE_CHECKING:
    from fewbit.evaluate.tasks.harness import Score


@dataclass(frozen=True, kw_only=True)
class Paired:
    """Numbers, from 1, of the questions whose answer was right and is wrong (``lost``), and the other way
    round (``gained``); ``p``: McNemar's exact two-sided p, 1 where no answer turned.
    """

    lost: tuple[int, ...]
    gained: tuple[int, ...]
    p: float


def paired(result: Score, original: Score) -> Paired:
    """Compare the outcomes of two models on the same questions.

    Raises InputError when one of them has no right and wrong, or they were asked other questions.
    """
    from scipy.stats import binomtest

    if result.outcomes is None or original.outcomes is None:
        raise InputError(f"{result.task} has no right and wrong answers under {result.metric} to compare")
    if result.key != original.key or result.questions != original.questions:
        raise InputError(
            f"{result.questions} answers to {result.task} cannot be compared with {original.questions} to "
            f"{original.task}; ask both models the same questions"
        )
    turned = list(enumerate(zip(original.outcomes, result.outcomes, strict=True), 1))
    lost = tuple(n for n, pair in turned if pair == ("1", "0"))
    gained = tuple(n for n, pair in turned if pair == ("0", "1"))
    m = len(lost) + len(gained)
    return Paired(lost=lost, gained=gained, p=float(binomtest(len(lost), m, 0.5).pvalue) if m else 1.0)


def beside(result: Score, original: Score | None) -> dict[str, Any]:
    """A score as plain data, with the original's and what turned; None where there is nothing to compare."""
    row = result.as_dict() | dict.fromkeys(("original", "original_error", "lost", "gained", "p"))
    if original is None:
        return row
    row |= {"original": original.value, "original_error": original.error}
    return row if result.outcomes is None else row | asdict(paired(result, original))
