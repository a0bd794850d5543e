"""Priors: exact errors of real grids, their best clips, and the Gaussian fit."""

import math

import pytest
import torch
from clips import stratified, uniform

from fewbit.errors import InputError
from fewbit.format import FP32, Channel, Divisor, Format, Group, Zero
from fewbit.format.prior import Gaussian, Prior, best_clip, expected_error
from fewbit.grid import GRIDS, Int, Table, by_name

# Points of N(0, 1) with the least error, Max 1960 and Lloyd 1982: half of the points, and the error.
LLOYD = {
    2: ((0.4527800398, 1.5104176087), 0.1174818),
    3: ((0.2450941789, 0.7560052812, 1.3439092613, 2.1519457916), 0.0345477),
}


@pytest.mark.parametrize("bits", LLOYD)
def test_expected_error_of_lloyd_max_points(bits):
    half, error = LLOYD[bits]
    points = torch.tensor([*(-v for v in half[::-1]), *half], dtype=torch.float64)
    assert expected_error(points, Prior.GAUSS) == pytest.approx(error, rel=1e-5)
    assert best_clip(points, Prior.GAUSS) == pytest.approx(1, rel=1e-6)  # optimal points are at their scale


@pytest.mark.parametrize("prior", Prior)
@pytest.mark.parametrize("name", ["int2", "int4", "uint3", "e2m1", "nf4", "e4m3fn", "int8-narrow"])
def test_expected_error_is_what_samples_show(prior, name):
    grid, x = by_name(name), stratified(prior)
    points = grid.value(grid.codes(), torch.float64).unique() / grid.max * 3
    points = points[points.isfinite()]
    for one_sided in (False, True):
        y = x.abs() if one_sided else x
        nearest = points[torch.bucketize(y, (points[1:] + points[:-1]) / 2)]
        measured = (y - nearest).square().mean().item()
        assert expected_error(points, prior, one_sided) == pytest.approx(measured, rel=5e-3)


@pytest.mark.parametrize("prior", Prior)
@pytest.mark.parametrize("one_sided", [False, True])
@pytest.mark.parametrize("k", [2, 3, 4, 15, 16, 256])
def test_best_clip_is_a_minimum(prior, one_sided, k):
    u = uniform(k)
    a = best_clip(u, prior, one_sided)
    least = expected_error(a * u, prior, one_sided)
    for factor in (0.5, 0.9, 0.999, 1.001, 1.1, 2):
        assert expected_error(factor * a * u, prior, one_sided) > least


def test_best_clips_that_are_published():
    """QuEST's mid-rise grids of 2^b levels and the ternary grid; 1 bit in closed form."""
    quest = {2: 0.79788, 3: 1.2240, 4: 1.49353, 8: 2.05107, 16: 2.5140}
    for levels, clip in quest.items():
        assert best_clip(uniform(levels), Prior.GAUSS) == pytest.approx(clip, rel=1e-4)
    assert best_clip(uniform(2), Prior.GAUSS) == pytest.approx(math.sqrt(2 / math.pi), rel=1e-8)
    assert best_clip(uniform(2), Prior.LAPLACE) == pytest.approx(1, rel=1e-8)  # E|x|
    e2m1 = by_name("e2m1")
    points = e2m1.value(e2m1.codes(), torch.float64).unique() / 6
    assert best_clip(points, Prior.GAUSS) == pytest.approx(2.92247856, rel=1e-5)


def test_best_clip_scales_and_ignores_mirror_images():
    u = torch.tensor([-1, -0.2, 0.1, 0.7], dtype=torch.float64)
    a = best_clip(u, Prior.LAPLACE)
    assert best_clip(2 * u, Prior.LAPLACE) == pytest.approx(a / 2, rel=1e-8)
    assert best_clip(-u.flip(0), Prior.LAPLACE) == pytest.approx(a, rel=1e-8)


def test_a_grid_of_zero_alone_is_refused():
    with pytest.raises(InputError, match="only point is 0"):
        best_clip(torch.zeros(1), Prior.GAUSS)


def test_every_scalar_grid_has_a_best_clip():
    for grid in GRIDS:
        if grid.width > 1 or grid.bits > 8 or grid.max <= 0:
            continue
        fmt = Format(grid=grid, scale=FP32, divisor=Divisor.FULL)
        for prior in Prior:
            assert 0.1 < best_clip(fmt.unit_points(), prior) < 64, grid


@pytest.mark.parametrize("zero", [Zero.NONE, Zero.OFFSET])
@pytest.mark.parametrize("name", ["int2", "int4", "nf4", "e2m1"])
def test_gaussian_rule_has_the_least_error_on_normal_data(zero, name):
    x = torch.randn(8, 1 << 14, generator=torch.Generator().manual_seed(0)) * 0.3
    if zero is Zero.OFFSET:
        x += 5
    fmt = Format(grid=by_name(name), block=Channel(), range=Gaussian(), zero=zero, scale=FP32)
    lo, hi = Gaussian()(x, fmt, None)
    measured = (fmt.quantize(x).dequantize() - x).square().mean().item()
    for factor in (0.9, 1.1):
        centre, half = (lo + hi) / 2, (hi - lo) / 2 * factor
        assert (fmt.round_trip(x, centre - half, centre + half) - x).square().mean().item() > measured
    u = fmt.unit_points()
    predicted = 0.09 * expected_error(best_clip(u, Prior.GAUSS) * u, Prior.GAUSS)
    assert measured == pytest.approx(predicted, rel=0.02)


def test_gaussian_rule_puts_lloyd_max_points_at_the_rms():
    half, _ = LLOYD[2]
    grid = Table("lloyd", (-half[1], -half[0], half[0], half[1]))
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(1))
    scale = Format(grid=grid, block=Group(32), range=Gaussian(), scale=FP32).fit(x).scale
    rms = x.unflatten(-1, (-1, 32)).square().mean(-1).sqrt()
    torch.testing.assert_close(scale, rms, rtol=1e-6, atol=0)


def test_gaussian_rule_on_edges():
    fmt = Format(grid=Int(4), scale=FP32)
    assert all(v.item() == 0 for v in Gaussian()(torch.zeros(8), fmt, None))
    assert all(math.isfinite(v) for v in Gaussian()(torch.full((8,), 1e30), fmt, None))
    assert Gaussian()(torch.ones(3, 5, dtype=torch.float64), fmt, None)[0].dtype == torch.float64
