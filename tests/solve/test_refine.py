"""Refinement: no pass raises a layer's error, for any grid, and seeing all codes it finds better ones."""

import itertools

import pytest
import torch

from fewbit.errors import InputError
from fewbit.format import FP32, Channel, Format, Gaussian, Group, MinMax, PerTensor, Zero
from fewbit.grid import by_name
from fewbit.solve import Ldlq, Rtn, Stats
from fewbit.solve.refine import refine


def layer(seed=0, out=24, n=64, tokens=400):
    """A random weight and the Gram matrix of correlated inputs, float64."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(n, n, generator=g, dtype=torch.float64) * torch.rand(
        n, generator=g, dtype=torch.float64
    )
    x = torch.randn(tokens, n, generator=g, dtype=torch.float64) @ mix
    return torch.randn(out, n, generator=g, dtype=torch.float64), x.t() @ x / tokens


def row_errors(w, q, h):
    e = q.dequantize(torch.float64) - w
    return ((e @ h) * e).sum(1)


def over(name, block=None, **more):
    return Format(grid=by_name(name), block=block or PerTensor(), scale=FP32, **{"range": Gaussian(), **more})


FORMATS = {
    "int2": over("int2", Channel()),
    "int3-zero": over("int3", Group(16), zero=Zero.INTEGER, range=MinMax()),
    "nf4-offset": over("nf4", Group(32), zero=Zero.OFFSET, range=MinMax()),
    "higgs": over("higgs-p2-n16", Channel()),
    "e8p": over("e8p"),
    "e8p-3b": over("e8p-3b"),
}


def ldlq(w, h, fmt, how):
    return how(w, Stats(gram=h), fmt)


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
def test_no_pass_raises_the_error_of_any_row(fmt):
    for seed in range(3):
        w, h = layer(seed)
        for q in (Ldlq()(w, Stats(gram=h), fmt), Rtn()(w, Stats(gram=h), fmt)):
            errors = [row_errors(w, q, h)]
            for _ in range(3):
                q = refine(w, h, q, 1)
                errors.append(row_errors(w, q, h))
            for before, after in itertools.pairwise(errors):
                assert bool((after <= before * (1 + 1e-6)).all())
            assert errors[1].sum() < 0.97 * errors[0].sum()


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
def test_passes_add_up_and_stop_where_nothing_changes(fmt):
    w, h = layer(5)
    q = ldlq(w, h, fmt, Ldlq(damp=0))
    twice = refine(w, h, refine(w, h, q, 1), 1)
    assert torch.equal(refine(w, h, q, 2).codes, twice.codes)
    assert torch.equal(ldlq(w, h, fmt, Ldlq(damp=0, passes=2)).codes, twice.codes)
    damped = h + 0.1 * h.diagonal().mean() * torch.eye(64)
    want = refine(w, damped, ldlq(w, h, fmt, Ldlq(damp=0.1)), 2)
    assert torch.equal(ldlq(w, h, fmt, Ldlq(damp=0.1, passes=2)).codes, want.codes)
    done = refine(w, h, q, 200)
    assert torch.equal(refine(w, h, done, 1).codes, done.codes)
    assert torch.equal(refine(w, h, q, 0).codes, q.codes)


def test_at_the_end_no_single_scalar_code_can_be_improved():
    w, h = layer(2, out=3, n=12)
    fmt = over("int3", Channel())
    q = refine(w, h, Rtn()(w, Stats(gram=h), fmt), 100)
    best = row_errors(w, q, h)
    for row, column, code in itertools.product(range(3), range(12), by_name("int3").codes()):
        codes = q.codes.clone()
        codes[row, column] = code
        other = type(q)(codes=codes, scale=q.scale, zero=None, format=fmt, shape=q.shape)
        assert row_errors(w, other, h)[row] >= best[row] * (1 - 1e-9)


def test_columns_between_products_and_single_precision_change_nothing(monkeypatch):
    w, h = layer(3, n=96)
    q = Rtn()(w, Stats(gram=h), FORMATS["e8p"])
    want = refine(w, h, q, 2)
    assert row_errors(w, refine(w.float(), h, q, 2), h).sum() == pytest.approx(
        row_errors(w, want, h).sum().item(), rel=0.02
    )
    for lazy in (1, 40):
        monkeypatch.setattr("fewbit.solve.refine._LAZY", lazy)
        assert torch.equal(refine(w, h, q, 2).codes, want.codes)


def test_without_correlation_there_is_nothing_to_gain():
    w, _ = layer(1)
    h = torch.rand(64, dtype=torch.float64).diag()
    q = Rtn()(w, Stats(gram=h), FORMATS["int2"])
    assert torch.equal(refine(w, h, q, 3).codes, q.codes)


def test_channels_that_were_never_excited_keep_their_codes():
    w, h = layer(4)
    dead = torch.arange(8, 16)
    h[dead], h[:, dead] = 0, 0
    for name in ("int2", "e8p"):
        q = Rtn()(w, Stats(gram=h), FORMATS[name])
        width = FORMATS[name].grid.width
        places = slice(8 // width, 16 // width)
        assert torch.equal(refine(w, h, q, 3).codes[:, places], q.codes[:, places])


def test_an_impossible_number_of_passes_is_refused():
    with pytest.raises(InputError, match="-1 passes"):
        Ldlq(passes=-1)
