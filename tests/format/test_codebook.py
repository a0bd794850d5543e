"""Tables that belong to a tensor: fitted by the range rule, counted in the bits, stored as a format says."""

import math

import pytest
import torch

from fewbit.errors import InputError
from fewbit.format import (
    FP16,
    AbsMax,
    Block2d,
    Channel,
    Clusters,
    Codebook,
    Format,
    PerTensor,
    Tiles,
    Zero,
)
from fewbit.format.codec import from_plain, to_plain
from fewbit.grid import Int, Learned, by_name
from fewbit.io import native
from fewbit.nn.linear import QLinear

INT8 = Format(grid=Int(8, narrow=True), block=Channel(), scale=FP16)


def learned(grid, share, store=FP16, **fields):
    return Format(grid=grid, range=Clusters(), codebook=Codebook(block=share, store=store), **fields)


FORMATS = {
    "row": learned(Learned(1, 3), Channel()),
    "row, int8": learned(Learned(1, 3), Channel(), INT8),
    "tensor": learned(Learned(1, 4), PerTensor()),
    "tiles": learned(Learned(2, 4), Tiles(500, 32), INT8),
    "rectangles": learned(Learned(2, 3), Block2d(16, 24)),
    "sums": learned(Learned(8, 4, 2), PerTensor(), block=Channel(), scale=FP16),
    "wide": learned(Learned(4, 9), PerTensor()),
}
SHAPE = (48, 96)


def weight(seed=0, shape=SHAPE):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS.keys())
def test_a_tensor_with_tables_survives_a_file_a_layer_and_a_configuration(fmt):
    w = weight()
    q = fmt.quantize(w)
    assert from_plain(to_plain(fmt)) == fmt
    stored = native.to_dict("x", q)
    assert sum(t.nbytes for t in stored.values()) == q.nbytes
    assert q.bits_per_weight == pytest.approx(fmt.bits_per_weight(SHAPE))
    back = native.from_dict("x", stored, fmt, SHAPE)
    assert torch.equal(back.dequantize(), q.dequantize())
    x = weight(1, (5, 96))
    torch.testing.assert_close(QLinear(q.to("cpu"))(x), x @ q.dequantize().t())
    assert QLinear(q).qweight.bits_per_weight == q.bits_per_weight
    again = fmt.encode(q.dequantize(), fmt.fit(w))
    torch.testing.assert_close(again.dequantize(), q.dequantize())


def test_bits_are_those_of_codes_and_tables():
    n = math.prod(SHAPE)
    assert FORMATS["row"].bits_per_weight(SHAPE) == 3 + 8 * 16 / 96
    assert FORMATS["row, int8"].bits_per_weight(SHAPE) == 3 + (8 * 8 + 16) / 96
    tiles = n // (16 * 32)
    assert FORMATS["tiles"].bits_per_weight(SHAPE) == 2 + tiles * (16 * 2 * 8 + 16) / n
    assert FORMATS["sums"].bits_per_weight(SHAPE) == 1 + 16 / 96 + 2 * 16 * 8 * 16 / n


@pytest.mark.parametrize("name", ["row", "row, int8"])
def test_rows_with_tables_of_their_own_can_be_cut(name):
    q = FORMATS[name].quantize(weight())
    assert q.format.rows_independent
    assert not FORMATS["tiles"].rows_independent
    assert torch.equal(q.rows(5, 20).dequantize(), q.dequantize()[5:20])


def test_plain_rounding_onto_a_table_for_each_row_is_kmeans():
    """At most 2^b values a row, each the mean of its members, weighted by what their inputs do."""
    w, h = weight(), torch.rand(96, generator=torch.Generator().manual_seed(3)) + 0.1
    q = FORMATS["row"].quantize(w, h)
    value = q.dequantize()
    for row in range(0, 48, 7):
        levels = value[row].unique()
        assert len(levels) <= 8
        for level in levels:
            member = value[row] == level
            mean = (h * w[row])[member].sum() / h[member].sum()
            assert abs(mean - level) < 2e-3  # float16


def test_weights_of_errors_pay_on_the_error_they_weigh():
    w, h = weight(), torch.logspace(-3, 3, 96)
    plain, weighted = (FORMATS["tiles"].quantize(w, importance) for importance in (None, h))
    error = lambda q, c: float(((w - q.dequantize()).square() * c).sum())  # noqa: E731
    assert error(weighted, h) < 0.9 * error(plain, h)
    assert error(plain, 1) < 0.9 * error(weighted, 1)


def test_a_row_of_few_values_is_exact():
    w = torch.tensor([-1.0, 0.5, 2.0])[torch.arange(96) % 3].expand(4, 96)
    assert torch.equal(FORMATS["row"].quantize(w).dequantize(), w)


def test_tiles_keep_tables_at_or_below_the_share_that_was_asked_for():
    for shape in ((576, 576), (1536, 576), (576, 1536), (192, 576), (4096, 11008)):
        tile = Tiles(2176).of(shape)
        assert shape[0] % tile.rows == 0
        assert shape[1] % tile.cols == 0
        assert tile.cols <= 256
        assert tile.rows * tile.cols >= 2176
    assert Tiles(2176).of((1536, 576)) == Block2d(12, 192)
    assert Tiles(10**6).of((32, 64)) == Block2d(32, 64)  # the whole matrix, when it is small


def test_impossible_tables_are_refused_in_words():
    book = Codebook(block=Channel(), store=FP16)
    for fields in (
        {"grid": Learned(1, 3), "codebook": book, "range": AbsMax()},
        {"grid": Learned(1, 3), "range": Clusters()},
        {"grid": by_name("int4"), "codebook": book, "range": Clusters()},
        {"grid": Learned(1, 3), "codebook": book, "range": Clusters(), "scale": FP16, "zero": Zero.OFFSET},
    ):
        with pytest.raises(InputError, match="learned tables need"):
            Format(**fields)
    with pytest.raises(InputError, match="cut some of them in two"):
        learned(Learned(4, 4), Block2d(4, 6))
    with pytest.raises(InputError, match="cannot be stored"):
        Codebook(block=Channel(), store=Format(grid=by_name("int8")))
    with pytest.raises(InputError, match="choose another width or other tiles"):
        learned(Learned(4, 4), Tiles(8, 6)).check((4, 12))
    with pytest.raises(InputError, match="does not divide"):
        FORMATS["sums"].quantize(torch.ones(8, 20))
    with pytest.raises(InputError, match="NaN"):
        FORMATS["row"].quantize(weight() * float("nan"))
    for wrong in ({"iterations": 0}, {"sample": -1}):
        with pytest.raises(InputError, match="learn no table"):
            Clusters(**wrong)
