"""Distributions: variance 1, moments, entropies and bounds against numerical integrals; samples."""

import math

import numpy as np
import pytest
import torch

from fewbit.analyze import distribution
from fewbit.analyze.distribution import Distribution

GAUSS, LAPLACE, UNIFORM = Distribution.GAUSS, Distribution.LAPLACE, Distribution.UNIFORM


@pytest.mark.parametrize("law", Distribution)
def test_every_distribution_has_mean_0_and_variance_1(law):
    at = distribution.partial_moments(law, np.array([-np.inf, np.inf]))
    m0, m1, m2 = (np.diff(m).item() for m in at)
    assert (m0, m1, m2) == pytest.approx((1, 0, 1), abs=1e-12)


@pytest.mark.parametrize("law", Distribution)
def test_partial_moments_are_those_of_the_quantiles(law):
    n = 200_000
    x = distribution.quantile(law, (np.arange(n // 2) + 0.5) / n)
    x = np.concatenate([x, -x[::-1]])
    for edge in (-1.5, -0.2, 0.0, 0.7, 1.6):
        low = distribution.partial_moments(law, np.array([-1.7, edge]))
        inside = x[(x > -1.7) & (x <= edge)]
        for power, m in enumerate(low):
            assert np.diff(m).item() == pytest.approx((inside**power).sum() / n, abs=3e-5)


def test_entropy_is_the_integral_of_the_log_density():
    for law in Distribution:
        x = np.linspace(-60, 60, 400_001)
        density = np.diff(distribution.partial_moments(law, x)[0]) / np.diff(x)
        density = density[density > 0]
        h = -(density * np.log(density)).sum() * (x[1] - x[0])
        assert distribution.entropy(law) == pytest.approx(h, abs=2e-3)


def test_the_bound_of_gauss_is_6_decibels_a_bit_and_panter_dite_is_4_35_above():
    assert distribution.lower_bound(GAUSS, 3) == pytest.approx(4.0**-3)
    gap = 10 * math.log10(distribution.panter_dite(GAUSS, 5) / distribution.lower_bound(GAUSS, 5))
    assert gap == pytest.approx(4.35, abs=0.01)
    assert distribution.panter_dite(LAPLACE, 0) == pytest.approx(4.5)


def test_panter_dite_of_uniform_data_is_the_textbook_error():
    assert distribution.panter_dite(UNIFORM, 3) == pytest.approx(4.0**-3)


def test_samples_are_the_same_for_the_same_seed_and_shuffled():
    a, b = distribution.random_samples(GAUSS, 1, 64), distribution.random_samples(GAUSS, 2, 64)
    assert torch.equal(a, distribution.random_samples(GAUSS, 1, 64))
    assert not torch.equal(a, b)
    assert abs(float((a[:, 1:] * a[:, :-1]).mean())) < 0.05
    assert float(a.double().square().mean()) == pytest.approx(1, abs=1e-2)
