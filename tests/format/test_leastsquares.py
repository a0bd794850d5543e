"""Claims: refitting to the codes beats intervals that are only shrunk, and finds what was rounded before."""

import dataclasses

import pytest
import torch

from fewbit.errors import InputError
from fewbit.format import BF16, FORMATS, MSE, Channel, Format, Group, LeastSquares, MinMax, Zero
from fewbit.format.codec import from_plain, to_plain
from fewbit.grid import Int, by_name

FORMATS_TRIED = {
    "int4": Format(grid=Int(4), block=Group(32), scale=BF16),
    "int3 with offset": Format(grid=Int(3), block=Group(32), scale=BF16, zero=Zero.OFFSET, range=MinMax()),
    "e2m1": Format(grid=by_name("e2m1"), block=Group(32), scale=BF16),
    "nf4": FORMATS["nf4"],
    **{name: FORMATS[name] for name in ("q4_0", "q4_1", "q6_k", "q4_k", "q2_k")},
}
EACH = pytest.mark.parametrize("name", FORMATS_TRIED)


def gauss(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def error(x, fmt, range, weights=None):
    q = dataclasses.replace(fmt, range=range).quantize(x, weights)
    squared = (q.dequantize() - x).square()
    return (squared if weights is None else squared * weights).mean()


@EACH
def test_less_error_than_a_search_that_only_shrinks(name):
    x, fmt = gauss(64, 256), FORMATS_TRIED[name]
    assert error(x, fmt, LeastSquares()) < error(x, fmt, MSE()) < error(x, fmt, MinMax())


@EACH
def test_with_weights_it_is_their_error_that_is_least(name):
    x, fmt, w = gauss(64, 256), FORMATS_TRIED[name], gauss(256, seed=1).exp()
    weighted = error(x, fmt, LeastSquares(), w)
    assert weighted < error(x, fmt, MSE(), w)
    assert weighted < error(x, fmt, LeastSquares(weighted=False), w)


@pytest.mark.parametrize("name", ["int4", "q4_0", "q4_1", "q8_0"])
def test_what_lies_on_the_grid_stays(name):
    fmt = dataclasses.replace(FORMATS_TRIED.get(name, FORMATS.get(name)), range=LeastSquares())
    x = fmt.quantize(gauss(16, 64)).dequantize()
    torch.testing.assert_close(fmt.quantize(x).dequantize(), x, rtol=2e-3, atol=1e-4)


def test_blocks_of_one_value_and_columns_without_weight():
    for fmt in FORMATS_TRIED.values():
        fitted = dataclasses.replace(fmt, range=LeastSquares())
        for x in (torch.zeros(4, 256), torch.full((4, 256), 0.5), torch.full((4, 256), -3.0)):
            assert torch.isfinite(fitted.quantize(x, torch.zeros(256)).dequantize()).all()
            torch.testing.assert_close(fitted.quantize(x).dequantize(), x, rtol=0.05, atol=1e-6)


def test_wide_blocks_want_a_wider_span():
    x, fmt = gauss(32, 1024), Format(grid=Int(4), block=Channel(), scale=BF16)
    assert error(x, fmt, LeastSquares(span=8)) < 0.97 * error(x, fmt, LeastSquares())


def test_refused_and_kept_as_data():
    with pytest.raises(InputError, match=r"a span of -1 steps is none; give 0 or more"):
        LeastSquares(span=-1)
    assert from_plain(to_plain(LeastSquares(span=4, weighted=False))) == LeastSquares(span=4, weighted=False)
