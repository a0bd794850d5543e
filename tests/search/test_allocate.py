"""The exact choice under a budget, against every way there is."""

import itertools

import numpy as np
import pytest

from fewbit.errors import InputError
from fewbit.search import allocate


def brute_force(costs, losses, budget, together=()):
    best = None
    for index in itertools.product(range(costs.shape[1]), repeat=len(costs)):
        if any(len({index[i] for i in g}) > 1 for g in together):
            continue
        rows = np.arange(len(costs))
        if costs[rows, index].sum() <= budget and (best is None or losses[rows, index].sum() < best):
            best = losses[rows, index].sum()
    return best


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_it_is_the_best_of_all(seed, scale):
    rng = np.random.default_rng(seed)
    costs = rng.integers(100, 1000, (6, 3)).astype(float)
    losses = rng.lognormal(0, 3, (6, 3)) * scale
    together = ((0, 3), (1, 2)) if seed % 2 else ()
    least = sum(costs[list(g)].sum(0).min() for g in [*together, *([i] for i in range(6))][: len(together)])
    least += sum(costs[i].min() for i in range(6) if not any(i in g for g in together))
    budget = least + rng.uniform(0, 1500)
    chosen = allocate(costs, losses, budget, together)
    rows = np.arange(6)
    assert costs[rows, chosen].sum() <= budget
    assert losses[rows, chosen].sum() == pytest.approx(brute_force(costs, losses, budget, together), rel=1e-7)
    assert all(len({chosen[i] for i in g}) == 1 for g in together)


def test_more_budget_never_costs_more_and_the_ends_are_all_small_and_all_large():
    rng = np.random.default_rng(0)
    weights = rng.integers(1, 50, 40)[:, None] * 1000
    costs = weights * np.array([2.0, 3.0, 4.0])
    losses = rng.lognormal(0, 2, (40, 1)) * np.array([0.1, 0.03, 0.008])
    found = [allocate(costs, losses, b * weights.sum()) for b in (2, 2.1, 2.5, 3, 3.7, 4)]
    totals = [losses[np.arange(40), c].sum() for c in found]
    assert totals == sorted(totals, reverse=True)
    assert set(found[0]) == {0}
    assert set(found[-1]) == {2}


def test_a_loss_of_infinity_is_never_chosen():
    chosen = allocate([[1, 2], [1, 2]], [[np.inf, 5.0], [1.0, 0.5]], 3)
    assert list(chosen) == [1, 0]


@pytest.mark.parametrize(
    ("costs", "losses", "budget", "together", "said"),
    [
        ([[2, 3]], [[1, 0]], 1.9, (), "smallest choices cost 2 and the budget is 1.9"),
        ([[2, 3]], [[1]], 5, (), "must both be"),
        ([[2, 3]], [[1, np.nan]], 5, (), "NaN"),
        ([[2, 3]], [[np.inf, np.inf]], 5, (), "finite loss"),
        ([[2, 3], [2, 3]], [[1, 0], [1, 0]], 9, ((0, 2),), "cannot choose alike"),
        ([[2, 3], [2, 3]], [[1, 0], [1, 0]], 9, ((0, 1), (1,)), "cannot choose alike"),
    ],
)
def test_what_cannot_be_is_refused(costs, losses, budget, together, said):
    with pytest.raises(InputError, match=said):
        allocate(np.array(costs), np.array(losses), budget, together)
