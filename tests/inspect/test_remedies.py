"""Remedies on a small layer: each deals with the outliers it is made for, none changes the float layer."""

import pytest
import torch

from fewbit.inspect.remedies import ALPHA, Case, Norm, Remedy


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def case(outliers=0.0, norm=True, bias=False):
    """64 tokens of 128 channels, four of them made ``outliers`` times as large by the gain of a norm, which
    the weights undo.
    """
    gain, shift = torch.rand(128, generator=torch.Generator().manual_seed(1)) + 0.5, 0.1 * draw(128, seed=2)
    weights = {"a": draw(48, 128, seed=3), "b": draw(32, 128, seed=4)}
    if outliers:
        at = torch.tensor([3, 40, 77, 120])
        gain[at] *= outliers
        weights = {n: w.index_copy(1, at, w[:, at] / outliers) for n, w in weights.items()}
    x = draw(64, 128) * gain + (shift if bias else 0)
    made = Norm(gain=gain, bias=shift if bias else None) if norm else None
    return Case(x=x, weights=weights, largest=x.abs().amax(0), norm=made)


def mean(made, remedy, bits=8):
    errors = made.errors(remedy, bits)
    return sum(errors.values()) / len(errors)


@pytest.mark.parametrize("remedy", Remedy)
@pytest.mark.parametrize("bias", [False, True])
def test_remedies_keep_the_product(remedy, bias):
    made = case(50, bias=bias)
    x, weights = made.prepared(remedy)
    for name, w in made.weights.items():
        y, after = made.x @ w.T, x @ weights[name].T
        if bias and remedy is Remedy.ROTATION:  # W b, which the linear's own bias takes
            after = after + made.norm.bias @ w.T
        assert torch.allclose(after, y, rtol=1e-4, atol=1e-4 * float(y.abs().max()))


def test_without_outliers_steps_per_channel_are_enough():
    plain = mean(case(), Remedy.CHANNEL)
    assert plain < 1e-3
    assert all(mean(case(), r) > 0.3 * plain for r in Remedy)


@pytest.mark.parametrize("remedy", [Remedy.SMOOTH, Remedy.SMOOTH_MORE, Remedy.ROTATION, Remedy.SPLIT])
def test_outliers_of_a_norm_are_dealt_with(remedy):
    made = case(50)
    assert mean(made, Remedy.CHANNEL) > 30 * mean(case(), Remedy.CHANNEL)
    assert mean(made, remedy) < 0.1 * mean(made, Remedy.CHANNEL)
    assert mean(made, remedy) < 4 * mean(case(), Remedy.CHANNEL)


def test_smoothing_needs_a_norm():
    made = case(50, norm=False)
    for remedy in ALPHA:
        assert mean(made, remedy) == mean(made, Remedy.CHANNEL)


def test_groups_confine_outliers():
    made = case(50)
    assert mean(made, Remedy.CHANNEL) <= mean(made, Remedy.TENSOR)
    wide = Case(
        x=torch.cat([made.x, draw(64, 128, seed=7)], 1),
        weights={"a": draw(48, 256, seed=8)},
        largest=torch.cat([made.largest, torch.full((128,), 4.0)]),
        norm=None,
    )
    assert mean(wide, Remedy.GROUPS) < mean(wide, Remedy.CHANNEL)


def test_four_bits_cost_what_their_steps_do():
    """Steps are 127 / 7 times as large."""
    for remedy in (Remedy.CHANNEL, Remedy.ROTATION):
        assert mean(case(), remedy, 4) / mean(case(), remedy, 8) == pytest.approx((127 / 7) ** 2, rel=0.25)


@pytest.mark.parametrize("norm", [False, True])
def test_what_does_not_apply_is_not_tried_twice_and_says_the_same(norm):
    made = case(50, norm=norm)
    assert made.all_errors(8) == {r: made.errors(r, 8) for r in Remedy}
