"""GPTVQ and AQLM lower the layer's error by each of their parts; their feedback is exact."""

import warnings
from dataclasses import replace

import pytest
import torch

from fewbit.errors import InputError
from fewbit.format import FP16, FP32, Channel, Clusters, Codebook, Format, PerTensor, QTensor, Tiles
from fewbit.grid import Int, Learned, by_name
from fewbit.solve import Aqlm, Gptvq, Ldlq, Rtn, SolverWarning, Stats
from fewbit.solve.columns import round_columns
from fewbit.solve.gptvq import _Reached
from fewbit.solve.ldlq import factor, feed_back, ldlq
from fewbit.solve.refine import refine
from fewbit.solve.tables import error, update

ONES = torch.ones(96, 1, dtype=torch.float64)
INT8 = Format(grid=Int(8, narrow=True), block=Channel(), scale=FP16)


def tiles(d, size=2304, most=48, bits=2):
    book = Codebook(block=Tiles(size, most), store=INT8)
    return Format(grid=Learned(d, bits * d), range=Clusters(), codebook=book)


SUMS = Format(
    grid=Learned(8, 5, 2),
    block=Channel(),
    scale=FP16,
    range=Clusters(iterations=10),
    codebook=Codebook(block=PerTensor(), store=FP32),
)


@pytest.fixture(scope="module")
def layer():
    """A weight [96, 96] and the Gram matrix of correlated inputs, float64."""
    g = torch.Generator().manual_seed(0)
    w = torch.randn(96, 96, generator=g, dtype=torch.float64)
    mix = torch.randn(96, 96, generator=g, dtype=torch.float64)
    mix *= torch.rand(96, generator=g, dtype=torch.float64)
    x = torch.randn(800, 96, generator=g, dtype=torch.float64) @ mix
    return w, x.t() @ x / 800


def fast(layer):
    """The same in float32."""
    return [part.float() for part in layer]


@pytest.mark.parametrize("d", [1, 2, 4])
def test_gptvq_beats_a_table_fitted_before_and_plain_rounding(layer, d):
    w, h = fast(layer)
    fmt, stats = tiles(d), Stats(gram=h)
    plain = error(w, h, Rtn()(w, stats, fmt))
    looped = error(w, h, Gptvq(updates=0)(w, stats, fmt))
    updated = error(w, h, Gptvq()(w, stats, fmt))
    again = error(w, h, Gptvq(passes=2)(w, stats, fmt))
    assert again < updated <= looped < 0.75 * plain
    fixed = error(w, h, Ldlq(act_order=False)(w, stats, fmt))
    assert updated < fixed < plain


def test_pairs_err_less_than_scalars_at_the_same_size(layer):
    w, h = fast(layer)
    one, two = (Gptvq()(w, Stats(gram=h), tiles(d, size)) for d, size in ((1, 384), (2, 2304)))
    assert two.bits_per_weight <= one.bits_per_weight == 2.125
    assert error(w, h, two) < 0.9 * error(w, h, one)


def test_a_step_for_each_row_pays_where_rows_differ_in_size(layer):
    w, h = fast(layer)
    w = w * torch.logspace(-1, 1, 96)[torch.randperm(96, generator=torch.Generator().manual_seed(1)), None]
    fmt = tiles(2)
    stepped = replace(fmt, block=Channel(), scale=FP16)
    loss = [error(w, h, Gptvq()(w, Stats(gram=h), f)) for f in (fmt, stepped)]
    assert loss[1] < 0.8 * loss[0]


def test_the_error_that_is_fed_forward_is_the_whole_error(layer):
    """tr((W - Q) H (W - Q)^T) is the sum of what each vector leaves, weighed by its D: for any tables."""
    w, h = layer
    fmt = tiles(2)
    m, r = factor(h, 0.0, 2)
    reached = _Reached(fmt, w.shape, r @ r.mT, ONES)
    left = []

    def watch(i, rest):
        code, value = reached(i, rest)
        e = (rest[:2] - value).t() @ r[i // 2]
        left.append(float(e.square().sum()))
        return code, value

    watch.span = reached.span
    codes = feed_back(w.t().contiguous(), m, watch, 2, 48)
    table = torch.stack(reached.tables, 1).flatten(0, 1)
    codes, kept = codes.t().to(torch.uint8), fmt.codebook.keep(table)
    whole = QTensor(codes=codes, scale=None, zero=None, format=fmt, shape=w.shape, table=kept)
    assert error(w, h, whole) == pytest.approx(sum(left), rel=1e-5)


def test_a_table_that_is_a_uniform_grid_gives_gptq(layer):
    w, h = layer
    uniform = Format(grid=by_name("int4"), block=PerTensor(), scale=FP32)
    fmt = Format(grid=Learned(1, 4), range=Clusters(), codebook=Codebook(block=PerTensor(), store=FP32))
    want = Ldlq(act_order=False)(w, Stats(gram=h), uniform)
    levels = uniform.grid.codes().double() * want.scale.double()
    m, _ = factor(h, 0.01)

    class Fixed:
        span = 1

        def __call__(self, i, rest):
            return round_columns(fmt, rest[:1], torch.ones(1, 1), None, levels.view(1, 1, 16, 1))

    codes = feed_back(w.t().contiguous(), m, Fixed(), 1, 32)
    assert torch.equal(codes.t().long() - 8, want.codes.long())


def test_costs_of_whole_blocks_beat_their_diagonal(layer):
    """Feeding (w - q) forward through the block factor, not through its diagonal, on correlated inputs."""
    w, h = layer
    fmt = tiles(4)
    m, r = factor(h, 0.0, 4)
    exact = feed_back(w.t().contiguous(), m, _Reached(fmt, w.shape, r @ r.mT, ONES), 4, 48)
    assert exact.shape == (24, 96)
    single = factor(h, 0.0, 1)[0]
    loss = {}
    for name, by in (("block", m), ("diagonal", single)):
        reached = _Reached(fmt, w.shape, r @ r.mT, ONES)
        values = []

        def watch(i, rest, reached=reached, values=values):
            code, value = reached(i, rest)
            values.append(value)
            return code, value

        watch.span = reached.span
        feed_back(w.t().contiguous(), by, watch, 4, 48)
        e = w - torch.cat(values).t()
        loss[name] = float(((e @ h) * e).sum())
    assert loss["block"] < loss["diagonal"]


@pytest.mark.parametrize("fmt", [tiles(2), SUMS], ids=["tiles", "sums"])
def test_an_update_of_the_tables_never_raises_the_error_and_finds_the_least(layer, fmt):
    w, h = layer
    q = Rtn()(w, Stats(gram=h), fmt)
    errors = [error(w, h, update(w, h, q, steps)) for steps in (0, 1, 2, 200)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.98 * error(w, h, q)
    settled = update(w, h, update(w, h, q, 200), 200)
    assert error(w, h, settled) > 0.99 * errors[-1]
    assert torch.equal(settled.codes, q.codes)


def test_a_pass_of_the_beam_over_sums_never_raises_the_error(layer):
    w, h = layer
    (q,) = ldlq([w], h, SUMS, Ldlq(act_order=False))
    for _ in range(3):
        before, q = error(w, h, q), refine(w, h, q, 1)
        assert error(w, h, q) <= before


def test_aqlm_beats_what_it_starts_from_epoch_by_epoch(layer):
    w, h = fast(layer)
    stats = Stats(gram=h)
    plain = error(w, h, Rtn()(w, stats, SUMS))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SolverWarning)
        errors = [error(w, h, Aqlm(epochs=e, tolerance=0)(w, stats, SUMS)) for e in (0, 1, 3)]
    assert errors[0] < plain
    assert errors[0] > errors[1] > errors[2]


def test_tables_that_outweigh_the_codes_are_reported(layer):
    w, h = fast(layer)
    with pytest.warns(SolverWarning, match="tables alone take 1.78 bits"):
        Aqlm(epochs=0)(w, Stats(gram=h), SUMS)


def test_formats_that_the_solvers_cannot_serve_are_refused():
    scalar = Format(grid=by_name("int4"), block=Channel(), scale=FP16)
    with pytest.raises(InputError, match="cannot serve int4"):
        Aqlm().check(scalar)
    for fmt in (scalar, SUMS):
        with pytest.raises(InputError, match="codebook over Tiles"):
            Gptvq().check(fmt)
    for wrong in (lambda: Gptvq(damp=2), lambda: Gptvq(passes=-1), lambda: Aqlm(tolerance=1)):
        with pytest.raises(InputError, match="impossible"):
            wrong()
