"""SmoothQuant's claims on small matrices."""

import pytest
import torch

from fewbit.errors import InputError
from fewbit.format import FP32, AbsMax, Channel, Format, Need, Stats, Token
from fewbit.format.activation import Activation
from fewbit.grid import by_name
from fewbit.transform import Kind, Reader, Smooth

TOKENS, N = 512, 96
INT8 = by_name("int8")
W8 = Format(grid=INT8, block=Channel(), range=AbsMax(), scale=FP32)
A8 = Activation(format=Format(grid=INT8, block=Token(), range=AbsMax(), scale=FP32))


@pytest.fixture
def x():
    """Inputs with three outlier channels, 60 times as large as the others."""
    x = torch.randn(TOKENS, N, generator=torch.Generator().manual_seed(0))
    x[:, [5, 40, 77]] *= 60
    return x


@pytest.fixture
def readers():
    g = torch.Generator().manual_seed(1)
    weights = [torch.randn(rows, N, generator=g) / N**0.5 for rows in (64, 32)]
    return [Reader(weight=w, format=W8, activation=A8) for w in weights]


def stats_of(x):
    return Stats(
        mean_abs=x.abs().mean(0), low=x.amin(0), high=x.amax(0), gram=x.t() @ x / len(x), tokens=len(x)
    )


def largest(readers, s):
    return torch.stack([(r.weight * s).abs().amax(0) for r in readers]).amax(0)


def error(x, readers, s):
    """Relative output error of W8A8 at scale s."""
    wrong = sum(
        (A8(x / s) @ W8.quantize(r.weight * s).dequantize().t() - x @ r.weight.t()).square().sum()
        for r in readers
    )
    return float(wrong / sum((x @ r.weight.t()).square().sum() for r in readers))


def test_outliers_cost_w8a8_half_as_much_at_alpha_one_half(x, readers):
    smooth, none = error(x, readers, Smooth()(readers, stats_of(x))), error(x, readers, torch.ones(N))
    for_weights = error(x, readers, Smooth(alpha=0.0)(readers, stats_of(x)))
    assert 4 * smooth < none
    assert 4 * smooth < for_weights


def test_alpha_levels_inputs_weights_or_makes_them_equal(x, readers):
    stats = stats_of(x)
    for alpha, level in ((0.0, lambda s: largest(readers, s)), (1.0, lambda s: x.div(s).abs().amax(0))):
        got = level(Smooth(alpha=alpha)(readers, stats))
        torch.testing.assert_close(got, torch.ones(N))
    s = Smooth()(readers, stats)
    torch.testing.assert_close(x.div(s).abs().amax(0), largest(readers, s))


def test_all_readers_share_one_scale_from_the_largest_weight_of_any(x, readers):
    wide = [readers[0], Reader(weight=readers[1].weight * 100, format=W8)]
    both, alone = Smooth()(wide, stats_of(x)), Smooth()(wide[1:], stats_of(x))
    torch.testing.assert_close(both, alone)
    assert not torch.allclose(both, Smooth()(readers, stats_of(x)))


def test_a_second_smoothing_finds_nothing_to_do(x, readers):
    s = Smooth()(readers, stats_of(x))
    again = Smooth()([Reader(weight=r.weight * s, format=W8) for r in readers], stats_of(x).divided(s))
    torch.testing.assert_close(again, torch.ones(N), atol=1e-3, rtol=0)


def test_scale_grows_with_the_inputs_to_the_power_alpha(x, readers):
    for alpha in (0.25, 0.8):
        s, s10 = (Smooth(alpha=alpha)(readers, stats_of(x * c)) for c in (1, 10))
        torch.testing.assert_close(s10, s * 10**alpha)


def test_beta_frees_the_exponent_of_the_weights(x, readers):
    stats = stats_of(x)
    torch.testing.assert_close(Smooth(alpha=0.5, beta=0.0)(readers, stats), x.abs().amax(0).sqrt())
    same = Smooth(alpha=0.3, beta=0.7)(readers, stats)
    torch.testing.assert_close(same, Smooth(alpha=0.3)(readers, stats))


def test_dead_channels_keep_a_finite_positive_scale(x, readers):
    x[:, 3] = 0
    for r in readers:
        r.weight[:, 9] = 0
    for alpha in (0.0, 0.5, 1.0):
        s = Smooth(alpha=alpha)(readers, stats_of(x))
        assert torch.isfinite(s).all()
        assert (s > 0).all()
        assert torch.isfinite(1 / s).all()


def test_tied_columns_share_the_geometric_mean(x, readers):
    tie = torch.arange(N) // 2
    free, tied = Smooth()(readers, stats_of(x)), Smooth()(readers, stats_of(x), tie)
    assert torch.equal(tied[::2], tied[1::2])
    torch.testing.assert_close(tied[::2], (free[::2] * free[1::2]).sqrt())


def test_serves_norms_and_linears_on_request_and_asks_for_columns_alone():
    assert Smooth().kinds == {Kind.NORM}
    assert Smooth(linear=True).kinds == {Kind.NORM, Kind.LINEAR}
    assert Smooth().needs == {Need.COLUMNS}


@pytest.mark.parametrize("wrong", [{"alpha": -0.1}, {"alpha": 1.5}, {"beta": 2.0}])
def test_refuses_exponents_outside_0_to_1(wrong):
    with pytest.raises(InputError, match=r"outside \[0, 1\]"):
        Smooth(**wrong)
