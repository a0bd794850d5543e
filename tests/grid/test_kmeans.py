"""k-means: the sum only falls, the ends it reaches, and the rows that break naive ones."""

import itertools

import pytest
import torch

from fewbit.errors import InputError
from fewbit.grid.kmeans import Start, kmeans, kmeans_vectors

STARTS = pytest.mark.parametrize("start", list(Start))


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def sensitivities(*shape, seed=1):
    """Weights over ten orders of magnitude, a tenth of them zero, as Fisher diagonals are."""
    s = (randn(*shape, seed=seed) * 4).exp()
    return s * (torch.rand(shape, generator=torch.Generator().manual_seed(seed)) > 0.1)


def objective(x, centroids, codes, s=None):
    error = (x.double() - centroids.double().gather(-1, codes.long())).square()
    return (error if s is None else s.double() * error).sum(-1)


def best(x, s, k):
    """The least weighted sum for one row, by dynamic programming over the sorted values, O(k n^2)."""
    x, order = x.double().sort()
    s = s.double()[order]
    a, b, c = (torch.cat([x.new_zeros(1), (s * x**i).cumsum(0)]) for i in range(3))
    mass, moment, energy = (t[None, :] - t[:, None] for t in (a, b, c))
    cost = torch.where(mass > 0, energy - moment**2 / mass.clamp(min=1e-300), 0.0)
    cost = torch.where(torch.ones_like(cost).triu().bool(), cost, torch.inf)
    least = cost[0]
    for _ in range(k - 1):
        least = (least[:, None] + cost).amin(0)
    return least[-1].item()


@STARTS
@pytest.mark.parametrize("weighted", [False, True])
def test_the_sum_never_rises(start, weighted):
    x = randn(40, 300) ** 3  # heavy tails leave the linear start with many empty clusters
    s = sensitivities(40, 300) if weighted else None
    last = None
    for iterations in range(30):
        now = objective(x, *kmeans(x, 32, weights=s, iterations=iterations, start=start), s)
        if last is not None:
            assert bool((now <= last * (1 + 1e-5) + 1e-12).all())  # the table is rounded to float32
        last = now


@STARTS
def test_each_value_is_the_weighted_mean_of_its_members(start):
    x, s = randn(6, 500), sensitivities(6, 500)
    c, codes = kmeans(x, 8, weights=s, iterations=300, start=start)
    for row in range(6):
        for i in range(8):
            mine = codes[row] == i
            mean = (s[row, mine].double() * x[row, mine].double()).sum() / s[row, mine].double().sum()
            assert c[row, i].item() == pytest.approx(mean.item(), rel=1e-4, abs=1e-6)


def test_codes_name_the_nearest_value_whatever_its_weight():
    x, s = randn(5, 400).double(), sensitivities(5, 400)
    c, codes = kmeans(x, 16, weights=s)
    assert torch.equal(c, c.sort(-1)[0])
    distance = (x[..., None] - c[:, None].double()).abs()
    assert torch.equal(distance.gather(-1, codes.long()[..., None])[..., 0], distance.amin(-1))


def test_large_gaussian_rows_reach_lloyd_max():
    x = randn(4, 2**17)
    for bits, published in ((2, 0.1175), (3, 0.03454), (4, 0.009497)):
        mse = objective(x, *kmeans(x, 2**bits)).mean().item() / x.shape[1]
        assert mse == pytest.approx(published, rel=0.01)


@STARTS
def test_it_ends_near_the_optimum(start):
    """Lloyd's iteration alone, from the linear start, ends at 5.8 times the least weighted sum."""
    x, s = randn(12, 160, seed=2), sensitivities(12, 160, seed=3)
    for weights in (torch.ones_like(s), s):
        got = objective(x, *kmeans(x, 8, weights=weights, start=start), weights)
        least = torch.tensor([best(*row, 8) for row in zip(x, weights, strict=True)])
        assert bool((got >= least * (1 - 1e-6)).all())
        assert (got / least).log().mean().exp().item() < 1.15


def test_weights_win_on_their_own_sum_and_lose_on_the_plain_one():
    x, s = randn(30, 1000), sensitivities(30, 1000)
    plain, weighted = kmeans(x, 8), kmeans(x, 8, weights=s)
    assert bool((objective(x, *weighted, s) < objective(x, *plain, s)).all())
    assert bool((objective(x, *weighted) > objective(x, *plain)).all())


def test_the_scale_of_weights_and_a_row_of_zeros_do_not_matter():
    x, s = randn(3, 200), sensitivities(3, 200)
    c, codes = kmeans(x, 4, weights=s)
    for factor in (2.0**-100, 2.0**40):
        assert all(map(torch.equal, kmeans(x, 4, weights=s * factor), (c, codes)))
    assert all(map(torch.equal, kmeans(x, 4, weights=torch.zeros(200)), kmeans(x, 4)))


@STARTS
def test_what_has_no_weight_pulls_no_value(start):
    """An outlier that a sparse part took out, as SqueezeLLM does, must not cost a centroid."""
    x = randn(2, 400)
    far = torch.cat([x, torch.tensor([[1e6, -1e6], [3e4, 0.0]])], dim=1)
    s = torch.cat([torch.ones(2, 400), torch.zeros(2, 2)], dim=1)
    c, codes = kmeans(far, 8, weights=s, start=start)
    without, _ = kmeans(x, 8, start=start)
    torch.testing.assert_close(c, without, rtol=1e-6, atol=1e-6)
    assert codes[0, 400:].tolist() == [7, 0]


@STARTS
def test_rows_of_few_distinct_values_are_exact(start):
    x = torch.tensor([[3.0, -1e-3, 3.0, 7.0, -1e-3], [5.0] * 5, [0.0, -0.0, 1e30, -1e30, 1e-30]])
    s = torch.tensor([[1e-12, 1.0, 1.0, 1e-20, 1.0]])
    for k in (4, 5, 300):
        c, codes = kmeans(x, k, weights=s, start=start)
        assert torch.equal(c.gather(1, codes.long()), x)
        assert c.shape == (3, k)
        assert codes.dtype == (torch.uint8 if k <= 256 else torch.int32)
    one, codes = kmeans(torch.tensor([2.5]), 16)
    assert one[codes.long()].tolist() == [2.5]


def test_every_shape_dtype_and_part_gives_the_rows_their_own_table(monkeypatch):
    x = randn(2, 3, 64)
    c, codes = kmeans(x, 4)
    assert (c.shape, codes.shape, c.dtype) == ((2, 3, 4), (2, 3, 64), torch.float32)
    assert all(map(torch.equal, kmeans(x[1, 2], 4), (c[1, 2], codes[1, 2])))
    assert all(map(torch.equal, kmeans(x.double(), 4), (c, codes)))
    strided = x.transpose(0, 2).contiguous().transpose(0, 2)
    assert all(map(torch.equal, kmeans(strided, 4), (c, codes)))
    half = x.half()
    assert all(map(torch.equal, kmeans(half, 4), kmeans(half.float(), 4)))
    monkeypatch.setattr("fewbit.grid.kmeans._ELEMENTS", 100)
    assert all(map(torch.equal, kmeans(x, 4), (c, codes)))
    mean, zeros = kmeans(x, 1)
    torch.testing.assert_close(mean[..., 0], x.mean(-1))
    assert not zeros.any()


def test_bad_input_is_refused_in_a_sentence():
    x = randn(2, 8)
    for bad in (torch.nan, torch.inf):
        with pytest.raises(InputError, match="NaN or Inf"):
            kmeans(torch.tensor([1.0, bad]), 2)
    with pytest.raises(InputError, match="at least one centroid"):
        kmeans(x, 0)
    with pytest.raises(InputError, match="at least one number"):
        kmeans(x[:, :0], 2)
    with pytest.raises(InputError, match="broadcast"):
        kmeans(x, 2, weights=torch.ones(3))
    with pytest.raises(InputError, match="broadcast"):
        kmeans(x[0], 2, weights=torch.ones(5, 8))
    for bad in (-1.0, torch.nan):
        with pytest.raises(InputError, match="not negative"):
            kmeans(x, 2, weights=torch.full((8,), bad))
    with pytest.raises(InputError, match="rows"):
        kmeans_vectors(x, 3)
    with pytest.raises(InputError, match="broadcast"):
        kmeans_vectors(x, 2, weights=torch.ones(8))


def test_vectors_find_their_clusters_and_the_sum_never_rises():
    centres = 10 * torch.tensor([[0.0, 0], [1, 0], [0, 1], [1, 1], [3, 3]])
    x = centres.repeat(200, 1) + 0.1 * randn(1000, 2)
    s = sensitivities(1000)

    def total(iterations, weights):
        c, codes = kmeans_vectors(x, 16, weights=weights, iterations=iterations)
        error = (x - c[codes]).square().sum(1)
        return (error if weights is None else error * weights).double().sum().item()

    for weights in (None, s):
        sums = [total(i, weights) for i in range(12)]
        assert all(b <= a * (1 + 1e-5) for a, b in itertools.pairwise(sums))
    assert total(50, None) / 1000 < 2 * 0.01  # every cluster of standard deviation 0.1 has a point of its own
    exact, codes = kmeans_vectors(centres, 5)
    assert torch.equal(exact[codes], centres)


def test_vectors_follow_their_generator():
    x = randn(500, 4)
    a, b, c = (kmeans_vectors(x, 8, generator=torch.Generator().manual_seed(i))[0] for i in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
