"""Learned tables: EM never loses, codes are the best there are, tables and codes are adjoint."""

import itertools

import pytest
import torch

from fewbit.errors import InputError
from fewbit.grid import Learned, by_name
from fewbit.grid.learned import choose, collect, decode, em, learn


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def costs(n, w, seed=1):
    a = normal(1, n, w, w, seed=seed)
    return a @ a.mT


def test_a_learned_grid_is_found_by_its_name_and_says_that_its_points_are_elsewhere():
    for grid in (Learned(2, 4), Learned(8, 8, 2), Learned(8, 16)):
        assert by_name(grid.name) == grid
    assert Learned(8, 8, 2).name == "learned-p8-b8-x2"
    assert (Learned(8, 8, 2).bits, Learned(8, 8, 2).entries) == (16, 2 * 256 * 8)
    for act in (lambda g: g.round(torch.zeros(2)), lambda g: g.value(torch.zeros(1)), lambda g: g.describe()):
        with pytest.raises(InputError, match="learned-p2-b4"):
            act(Learned(2, 4))
    for wrong in ((0, 4), (2, 17), (2, 4, 0), (8, 16, 4)):
        with pytest.raises(InputError):
            Learned(*wrong)


@pytest.mark.parametrize("cost", [None, costs(600, 3)], ids=["plain", "weighted"])
def test_the_cost_of_em_never_rises(cost):
    _, seen = em(normal(1, 600, 3), 32, cost, 60)
    assert len(seen) > 5
    assert all(after <= before * (1 + 1e-12) for before, after in itertools.pairwise(seen))


def test_em_under_equal_costs_is_kmeans():
    """At the end every entry is the mean of the vectors that are nearest to it."""
    x = normal(2, 500, 2)
    c, _ = em(x, 8, None, 500)
    codes = choose(x, c.unsqueeze(1))
    distance = (x.unsqueeze(2) - c.unsqueeze(1)).square().sum(-1)
    assert torch.equal(codes, distance.argmin(-1))
    for t in range(2):
        means = torch.stack([x[t][codes[t] == k].mean(0) for k in range(8)])
        torch.testing.assert_close(c[t], means, rtol=1e-4, atol=1e-5)


def test_few_distinct_vectors_are_held_exactly():
    x = normal(1, 5, 2)[:, torch.arange(40) % 5]
    c, _ = em(x, 8, None, 20)
    torch.testing.assert_close(decode(choose(x, c.unsqueeze(1)), c.unsqueeze(1)), x, rtol=0, atol=1e-5)


def test_wider_vectors_err_less_on_normal_data_at_two_bits():
    """Lloyd-Max 0.1175; 0.1071 for pairs; tables that are fitted to what they code lie a little lower."""
    x = normal(1, 2**15, dtype=torch.float32)
    error = []
    for w in (1, 2, 4):
        v = x.view(1, -1, w)
        table = learn(v, Learned(w, 2 * w), iterations=25)
        error.append(float((v - decode(choose(v, table), table)).square().mean()))
    assert error[0] == pytest.approx(0.1175, rel=0.02)
    assert error[1] == pytest.approx(0.1071, rel=0.03)
    assert error[2] < 0.1


@pytest.mark.parametrize("books", [1, 2, 3])
def test_a_sum_is_the_sum_of_its_entries_and_its_adjoint_collects(books):
    tables, bits = normal(3, books, 8, 2), 3
    codes = torch.randint(0, 8**books, (3, 50), generator=torch.Generator().manual_seed(0))
    explicit = torch.stack(
        [sum(tables[t, m, (codes[t] >> m * bits) & 7] for m in range(books)) for t in range(3)]
    )
    value = decode(codes, tables)
    torch.testing.assert_close(value, explicit)
    x = normal(3, 50, 2, seed=4)
    torch.testing.assert_close((value * x).sum(), (tables * collect(codes, x, tables)).sum())


def test_a_wide_beam_finds_the_best_sum_under_a_matrix_of_costs():
    x, tables = normal(1, 40, 4), normal(1, 2, 8, 4, seed=2) / 2
    a = costs(1, 4)[0, 0]
    every = torch.arange(64).view(1, -1)
    e = x[0, :, None] - decode(every, tables)[0]
    best = ((e @ a) * e).sum(-1).amin(-1)

    def cost(beam):
        e = (x - decode(choose(x, tables, a, beam), tables))[0]
        return ((e @ a) * e).sum(-1)

    torch.testing.assert_close(cost(8), best)
    assert cost(1).sum() > cost(2).sum() >= best.sum()


def test_two_books_of_256_vectors_of_eight_beat_scalars_at_two_bits():
    x = normal(1, 8192, 8, dtype=torch.float32)
    table = learn(x, Learned(8, 8, 2), iterations=8)
    assert (x - decode(choose(x, table), table)).square().mean() < 0.1
