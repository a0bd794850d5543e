"""LDLQ is GPTQ, and gives what its paper claims, on matrices small enough to check by hand."""

import itertools
import warnings

import pytest
import torch

from fewbit.errors import InputError
from fewbit.format import (
    FP32,
    MSE,
    Channel,
    Format,
    Gaussian,
    Group,
    MinMax,
    PerTensor,
    Zero,
    format_by_name,
    value_of,
)
from fewbit.grid import by_name
from fewbit.solve import Ldlq, Rtn, SolverWarning, Stats
from fewbit.solve.ldlq import unit_factor


def layer(seed=0, out=48, n=128, tokens=1000):
    """A random weight and the Gram matrix of correlated inputs, float64."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(out, n, generator=g, dtype=torch.float64)
    mix = torch.randn(n, n, generator=g, dtype=torch.float64) * torch.rand(
        n, generator=g, dtype=torch.float64
    )
    x = torch.randn(tokens, n, generator=g, dtype=torch.float64) @ mix
    return w, x.t() @ x / tokens


def ldlq(w, h, fmt, how):
    return how(w, Stats(gram=h), fmt)


def literal_gptq(w, h, fmt, damp=0.01, order=None):
    """Column by column as the paper's algorithm 1 writes it, with H inverted, no blocks; static
    parameters.
    """
    n = len(h)
    order = torch.arange(n) if order is None else order
    h = h + damp * h.diagonal().mean() * torch.eye(n, dtype=h.dtype)
    u = torch.linalg.cholesky(torch.linalg.inv(h[order][:, order]), upper=True)
    params = fmt.fit(w, None)
    s, z = fmt.columns(params, w.shape, order)
    s = s.expand(w.shape)
    work, codes = w[:, order].clone(), torch.empty(w.shape, dtype=fmt.grid.code_dtype)
    for i in range(n):
        zi = None if z is None else z[:, i]
        codes[:, order[i]] = fmt.code(work[:, i], s[:, i], zi)
        q = fmt.decode(codes[:, order[i]], s[:, i], zi)
        error = (work[:, i] - q) / u[i, i]
        work[:, i:] -= torch.outer(error, u[i, i:])
    return codes


def output_error(w, q, h):
    e = q.dequantize(torch.float64) - w
    return float(((e @ h) * e).sum())


FORMATS = {
    "int4-g32": Format(grid=by_name("int4"), block=Group(32), scale=FP32),
    "int3-asym": Format(grid=by_name("int3"), block=Group(32), scale=FP32, zero=Zero.INTEGER, range=MinMax()),
    "int2-offset": Format(
        grid=by_name("int2"), block=Group(16), scale=FP32, zero=Zero.OFFSET, range=MinMax()
    ),
    "int4-row": Format(grid=by_name("int4"), block=Channel(), scale=FP32),
    "nf4": Format(grid=by_name("nf4"), block=Group(64), scale=FP32),
    "e2m1": Format(grid=by_name("e2m1"), block=Group(32), scale=FP32),
}


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("act_order", [False, True])
def test_equals_literal_gptq_code_for_code(fmt, act_order):
    w, h = layer()
    order = h.diagonal().argsort(descending=True, stable=True) if act_order else None
    got = ldlq(w, h, fmt, Ldlq(act_order=act_order))
    assert torch.equal(got.codes, literal_gptq(w, h, fmt, order=order))


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
def test_block_length_changes_nothing(fmt):
    w, h = layer(1)
    codes = [ldlq(w, h, fmt, Ldlq(lazy=lazy)).codes for lazy in (1, 32, 100, 128)]
    assert all(torch.equal(codes[0], c) for c in codes)


@pytest.mark.parametrize(("fmt", "act_order"), itertools.product(FORMATS.values(), [False, True]))
def test_lowers_the_output_error_of_rounding_and_raises_the_weight_error(fmt, act_order):
    w, h = layer(2)
    rounded, solved = Rtn()(w, Stats(), fmt), ldlq(w, h, fmt, Ldlq(act_order=act_order))
    assert output_error(w, solved, h) < 0.8 * output_error(w, rounded, h)
    weight_error = lambda q: float((q.dequantize(torch.float64) - w).square().sum())  # noqa: E731
    assert weight_error(solved) > weight_error(rounded)


def test_white_inputs_make_it_plain_rounding():
    w, _ = layer(3)
    fmt = FORMATS["int4-g32"]
    h = 3.0 * torch.eye(w.shape[1], dtype=w.dtype)
    assert torch.equal(ldlq(w, h, fmt, Ldlq()).codes, Rtn()(w, Stats(), fmt).codes)


def test_the_loss_is_the_sum_of_the_factors_squares():
    """tr(E H E^T) = sum_i D_ii ||(E M)_i||^2: the identity the method stands on."""
    w, h = layer(4)
    damp = 0.01
    m = unit_factor(h, damp)
    hd = h + damp * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype)
    d = torch.linalg.solve(m, hd).mul(torch.linalg.inv(m)).sum(1)  # diag(M^-1 H M^-T)
    e = ldlq(w, h, FORMATS["int3-asym"], Ldlq()).dequantize(torch.float64) - w
    left = ((e @ hd) * e).sum()
    right = (d * (e @ m).square().sum(0)).sum()
    torch.testing.assert_close(left, right, rtol=1e-8, atol=0)


def test_block_factor_rebuilds_h():
    _, h = layer(5, n=64)
    for width in (1, 4, 16):
        m = unit_factor(h, 0.0, width)
        tiles = m.unflatten(0, (-1, width)).unflatten(2, (-1, width))
        eye = torch.eye(width, dtype=h.dtype)
        for i in range(64 // width):
            torch.testing.assert_close(tiles[i, :, i], eye)
            assert not tiles[i, :, :i].any()
        d = torch.linalg.solve(m, torch.linalg.solve(m, h).t())
        mask = torch.block_diag(*[torch.ones(width, width)] * (64 // width)).bool()
        assert d[~mask].abs().max() < 1e-8 * d.abs().max()


def test_dynamic_groups_equal_static_ones_when_one_group_is_the_row():
    w, h = layer(6)
    fmt = FORMATS["int4-row"]
    static = ldlq(w, h, fmt, Ldlq(act_order=False))
    dynamic = ldlq(w, h, fmt, Ldlq(act_order=False, static_groups=False))
    assert torch.equal(static.codes, dynamic.codes)


def test_dynamic_groups_refit_on_the_weights_they_reach():
    w, h = layer(7)
    fmt = FORMATS["int3-asym"]
    static = ldlq(w, h, fmt, Ldlq(act_order=False))
    dynamic = ldlq(w, h, fmt, Ldlq(act_order=False, static_groups=False))
    assert torch.equal(static.scale[:, 0], dynamic.scale[:, 0])
    assert not torch.equal(static.scale[:, 1:], dynamic.scale[:, 1:])
    assert output_error(w, dynamic, h) < output_error(w, Rtn()(w, Stats(), fmt), h)


def test_importance_weighted_range_lowers_the_output_error():
    w, h = layer(8)
    errors = [
        output_error(
            w, ldlq(w, h, Format(grid=by_name("int3"), block=Group(32), scale=FP32, range=r), Ldlq()), h
        )
        for r in (MinMax(), MSE())
    ]
    assert errors[1] < errors[0]


def test_dead_channel_is_rounded_and_gives_no_feedback():
    w, h = layer(9)
    h[5] = 0
    h[:, 5] = 0
    fmt = FORMATS["int4-g32"]
    q = ldlq(w, h, fmt, Ldlq(act_order=False))
    assert torch.isfinite(q.dequantize()).all()
    assert torch.equal(q.codes[:, 5], Rtn()(w, Stats(), fmt).codes[:, 5])


def test_singular_gram_raises_damping_and_says_so():
    w, _ = layer(10)
    g = torch.Generator().manual_seed(0)
    x = torch.randn(8, w.shape[1], generator=g, dtype=torch.float64)
    h = x.t() @ x / 8
    with pytest.warns(SolverWarning, match=r"damping 0; raised to"):
        q = ldlq(w, h, FORMATS["int4-g32"], Ldlq(damp=0.0))
    assert torch.isfinite(q.dequantize()).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ldlq(w, h, FORMATS["int4-g32"], Ldlq(damp=0.01))


def test_float32_gram_that_is_barely_definite_falls_back_to_float64_in_silence():
    """Rounding makes a float32 factorisation fail where the float64 one of the same matrix succeeds."""
    _, h = layer(11)
    values, vectors = torch.linalg.eigh(h)
    values = torch.logspace(0, -7.5, len(values), dtype=torch.float64)
    h = (vectors * values) @ vectors.t()
    h = (h + h.t()) / 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        m = unit_factor(h.float(), 2e-8)
    assert m.dtype == torch.float32
    assert torch.isfinite(m).all()


def test_nan_in_the_gram_matrix_is_refused():
    w, h = layer(12)
    h[3, 3] = torch.nan
    with pytest.raises(InputError, match="NaN"):
        ldlq(w, h, FORMATS["int4-g32"], Ldlq())


def test_act_order_with_dynamic_groups_is_refused():
    with pytest.raises(InputError, match="g_idx"):
        Ldlq(act_order=True, static_groups=False)


@pytest.mark.parametrize("name", ["higgs-p2-n16", "higgs-p2-n256", "higgs-p3-n64", "higgs-p4-n256"])
@pytest.mark.parametrize("block", [Group(48), Channel()], ids=str)
def test_vectors_take_feedback_too(name, block):
    """Points of R^p: the loss falls below rounding's, no block length matters, white inputs give rounding."""
    w, h = layer(13, n=144)
    fmt = Format(grid=by_name(name), block=block, range=Gaussian(), scale=FP32)
    rounded = Rtn()(w, Stats(), fmt)
    for act_order in (False, True):
        solved = [ldlq(w, h, fmt, Ldlq(act_order=act_order, lazy=lazy)) for lazy in (1, 36, 128)]
        assert output_error(w, solved[0], h) < 0.8 * output_error(w, rounded, h)
        assert all(torch.equal(q.codes, solved[0].codes) for q in solved[1:])
        assert torch.equal(solved[0].scale, rounded.scale)
    white = ldlq(w, torch.eye(len(h), dtype=h.dtype), fmt, Ldlq())
    assert torch.equal(white.codes, rounded.codes)


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4-even", "mx6", "nf4-dq", "qoq-g64", "msfp12"])
def test_nested_steps_serve_the_solver_as_they_are_stored(name):
    w, h = layer(14)
    fmt = format_by_name(name)
    rounded, solved = Rtn()(w, Stats(), fmt), ldlq(w, h, fmt, Ldlq())
    assert torch.equal(value_of(solved.scale), value_of(rounded.scale))
    assert output_error(w, solved, h) < 0.7 * output_error(w, rounded, h)
    white = ldlq(w, torch.eye(len(h), dtype=h.dtype), fmt, Ldlq())
    assert torch.equal(white.codes, rounded.codes)


@pytest.mark.parametrize("name", ["int4-g32", "int3-asym"])
@pytest.mark.parametrize("how", [Ldlq(), Ldlq(act_order=False, static_groups=False)])
def test_matrices_that_read_one_input_are_solved_together_as_they_are_alone(name, how):
    w, h = layer()
    parts = w.split([16, 7, 25])
    together = how.together(parts, Stats(gram=h), FORMATS[name])
    for part, q in zip(parts, together, strict=True):
        alone = how(part, Stats(gram=h), FORMATS[name])
        assert torch.equal(q.codes, alone.codes)
        assert torch.equal(q.dequantize(), alone.dequantize())


def test_a_step_per_tensor_stays_within_its_matrix():
    w, h = layer()
    parts = [w[:16], 10 * w[16:]]
    fmt = Format(grid=by_name("int4"), block=PerTensor(), scale=FP32)
    small, large = Ldlq().together(parts, Stats(gram=h), fmt)
    assert torch.equal(small.dequantize(), ldlq(parts[0], h, fmt, Ldlq()).dequantize())
    assert value_of(large.scale) > 5 * value_of(small.scale)
