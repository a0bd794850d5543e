"""Formats: what must hold for every grid, block, offset and kind of scale."""

import itertools

import pytest
import torch

from fewbit.errors import InputError
from fewbit.format import (
    BF16,
    DOUBLE_QUANT,
    E4M3_OVER_FP32,
    E8M0,
    FP16,
    FP32,
    MSE,
    SCALES,
    AbsMax,
    Block2d,
    Channel,
    Divisor,
    Flat,
    Format,
    Group,
    MinMax,
    Percentile,
    PerTensor,
    QTensor,
    Token,
    Zero,
    value_of,
)  # fmt: skip
from fewbit.format.codec import from_plain, to_plain
from fewbit.grid import GRIDS, Int, by_name

BLOCKS = (PerTensor(), Channel(), Token(), Group(32), Block2d(16, 32), Flat(48))
OFFSETS = (Zero.NONE, Zero.FLOAT, Zero.OFFSET)


def sample(seed=0, shape=(64, 128)):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g) * torch.rand(shape[0], 1, generator=g) + 0.1


def formats():
    """Every combination that means something, over a few grids."""
    grids = [by_name(n) for n in ("int4", "uint3", "int8", "e2m1", "e4m3fn", "nf4")]
    for grid, block, zero, scale in itertools.product(grids, BLOCKS, Zero, SCALES):
        if zero is Zero.INTEGER and not isinstance(grid, Int):
            continue
        if zero in (Zero.NONE, Zero.MEAN) and grid.min == 0:
            continue
        yield Format(grid=grid, block=block, zero=zero, scale=scale, range=MinMax())


ALL = list(formats())


def test_every_combination_round_trips_and_counts_its_bits():
    x = sample()
    for fmt in ALL:
        q = fmt.quantize(x)
        assert q.dequantize().shape == x.shape
        assert torch.isfinite(q.dequantize()).all(), fmt
        assert q.bits_per_weight == pytest.approx(fmt.bits_per_weight(x.shape), abs=1e-12), fmt
        # decode-encode identity: values of the grid, with the same parameters, get their own codes back
        again = fmt.encode(q.dequantize(), fmt_params(q))
        assert torch.equal(again.dequantize(), q.dequantize()), fmt


def fmt_params(q):
    from fewbit.format import Params

    return Params(scale=q.scale, zero=q.zero)


@pytest.mark.parametrize("fmt", [f for f in ALL if f.scale == FP32 and isinstance(f.grid, Int)], ids=str)
def test_error_inside_the_range_is_at_most_half_a_step(fmt):
    x = sample(1)
    q = fmt.quantize(x)
    half = fmt.block.join(value_of(q.scale).unsqueeze(-1).expand_as(fmt.block.split(x)), x.shape) / 2
    # an integer zero is rounded, which moves the interval by up to half a step
    slack = 2.0 if fmt.zero is Zero.INTEGER else 1.0
    assert ((q.dequantize() - x).abs() <= half * slack * (1 + 1e-5) + 1e-6).all()


def test_bits_per_weight_by_hand():
    shape = (64, 128)
    g = lambda **kw: Format(grid=by_name("int4"), **kw).bits_per_weight(shape)  # noqa: E731
    assert g(block=Group(64), scale=FP16) == 4 + 16 / 64
    assert g(block=Group(64), scale=FP16, zero=Zero.INTEGER) == 4 + 20 / 64
    assert g(block=Group(64), scale=FP16, zero=Zero.FLOAT) == 4 + 32 / 64
    assert g(block=Channel(), scale=FP32) == 4 + 32 / 128
    assert g(block=PerTensor(), scale=FP32) == 4 + 32 / (64 * 128)
    assert g(block=Group(32), scale=E8M0) == 4.25
    assert g(block=Group(16), scale=E4M3_OVER_FP32) == 4.5 + 32 / (64 * 128)
    big = (1024, 1024)
    nf4 = Format(grid=by_name("nf4"), block=Flat(64), scale=DOUBLE_QUANT)
    assert nf4.bits_per_weight(big) == 4 + 8 / 64 + 32 / (64 * 256) + 32 / 2**20  # one mean for the tensor


def test_two_symmetric_divisors_at_four_bits():
    x = torch.tensor([[3.0, -3.0, 1.0, 0.0]])
    edge = Format(grid=by_name("int4"), block=Channel(), scale=FP32, divisor=Divisor.EDGE).quantize(x)
    full = Format(grid=by_name("int4"), block=Channel(), scale=FP32, divisor=Divisor.FULL).quantize(x)
    torch.testing.assert_close(edge.dequantize()[0, :2], torch.tensor([3.0, -3.0]))
    torch.testing.assert_close(full.dequantize()[0, :2] / 3, torch.tensor([14 / 15, -16 / 15]))


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize(
    "values", [[5.0, 6.0, 5.5, 5.2], [-5.0, -6.0, -5.5, -5.2], [2.0] * 4, [0.0] * 4, [0, 0, 0, 7.0]]
)
def test_integer_zero_keeps_zero_exact_and_in_range(bits, signed, values):
    fmt = Format(
        grid=Int(bits, signed=signed), block=Channel(), scale=FP32, zero=Zero.INTEGER, range=MinMax()
    )
    x = torch.tensor([values])
    q = fmt.quantize(x)
    assert fmt.grid.min <= int(q.zero) <= fmt.grid.max
    assert torch.isfinite(q.dequantize()).all()
    zero = fmt.encode(torch.zeros(1, 4), fmt_params(q))
    assert not zero.dequantize().any()
    # never collapses a one-sided group to a single far value
    assert (q.dequantize() - x).abs().max() <= x.abs().max() / (2**bits - 1) * 1.01


def test_the_offset_is_computed_from_the_step_as_stored():
    """With steps rounded to powers of two, the block's minimum is still exact: code 'min' plus offset is
    lo.
    """
    x = sample(2) + 40
    fmt = Format(grid=by_name("int8"), block=Channel(), scale=E8M0, zero=Zero.OFFSET, range=MinMax())
    got = fmt.quantize(x).dequantize()
    lo, where = x.min(1)
    torch.testing.assert_close(got.gather(1, where[:, None])[:, 0], lo, rtol=1e-6, atol=0)


def test_tiny_blocks_under_nested_scales_stay_finite():
    x = sample(3)
    x[:8] *= 1e-12
    x[8:16] = 0
    for scale in SCALES:
        for grid in ("int4", "e2m1"):
            q = Format(grid=by_name(grid), block=Group(16), scale=scale).quantize(x)
            assert torch.isfinite(q.dequantize()).all(), scale
            assert q.dequantize()[8:16].abs().max() == 0


def test_power_of_two_scales_are_powers_of_two():
    q = Format(grid=by_name("e2m1"), block=Group(32), scale=E8M0).quantize(sample(4))
    mantissa, _ = torch.frexp(q.scale.dequantize())
    assert (mantissa == 0.5).all()


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_split_and_join_are_inverse_and_take_gives_each_column_its_step(block):
    x = sample(5)
    assert torch.equal(block.join(block.split(x), x.shape), x)
    p = torch.arange(max(1, block.split(x)[..., 0].numel())).float().reshape(block.scale_shape(x.shape))
    dense = block.join(p.unsqueeze(-1).expand_as(block.split(x)), x.shape)
    columns = torch.randperm(128, generator=torch.Generator().manual_seed(0))[:40]
    assert torch.equal(block.take(p, x.shape, columns).expand(64, 40), dense[:, columns])


@pytest.mark.parametrize(
    ("block", "shape"), [(Group(64), (8, 100)), (Block2d(16, 16), (24, 32)), (Block2d(8, 48), (8, 64))]
)
def test_a_block_that_does_not_tile_is_refused_with_a_remedy(block, shape):
    with pytest.raises(InputError, match=r"use|choose"):
        Format(grid=by_name("int4"), block=block, scale=FP32).quantize(torch.ones(shape))


def test_finer_blocks_lower_the_error():
    x = sample(6, (128, 256)) * torch.rand(256, generator=torch.Generator().manual_seed(1))
    error = [
        float(
            (Format(grid=by_name("int4"), block=b, scale=FP32).quantize(x).dequantize() - x).square().mean()
        )
        for b in (PerTensor(), Channel(), Group(64), Group(16))
    ]
    assert error == sorted(error, reverse=True)


@pytest.mark.parametrize("grid", ["int2", "int3", "int4", "e2m1", "nf4"])
@pytest.mark.parametrize("zero", OFFSETS)
def test_mse_range_never_loses_to_minmax_and_wins_on_outliers(grid, zero):
    x = sample(7)
    x[:, ::64] *= 6
    mse = {}
    for r in (MinMax(), MSE(weighted=False)):
        fmt = Format(grid=by_name(grid), block=Group(64), scale=FP32, zero=zero, range=r)
        mse[type(r)] = (fmt.quantize(x).dequantize() - x).square().unflatten(-1, (-1, 64)).sum(-1)
    assert (mse[MSE] <= mse[MinMax] * (1 + 1e-5)).all()
    assert mse[MSE].sum() < 0.97 * mse[MinMax].sum()


def test_importance_moves_the_range_to_the_columns_that_count():
    x = sample(8)
    x[:, 0] = 9  # an outlier that clipping would sacrifice
    fmt = Format(grid=by_name("int3"), block=Channel(), scale=FP32, range=MSE())
    importance = torch.ones(128)
    plain = (fmt.quantize(x, importance).dequantize() - x)[:, 0].abs().mean()
    importance[0] = 1e4
    kept = (fmt.quantize(x, importance).dequantize() - x)[:, 0].abs().mean()
    assert kept < plain / 3


def test_percentile_is_the_order_statistic():
    x = torch.arange(1, 101).float()[None]
    lo, hi = Percentile(q=90)(x, None, None)
    assert (float(lo), float(hi)) == (11.0, 90.0)
    assert [float(v) for v in Percentile(q=100)(x, None, None)] == [1.0, 100.0]


def test_absmax_is_symmetric():
    lo, hi = AbsMax()(torch.tensor([[1.0, -3.0]]), None, None)
    assert float(lo) == -3
    assert float(hi) == 3


def test_stochastic_rounding_is_unbiased():
    x = sample(9, (8, 64))
    fmt = Format(grid=by_name("int4"), block=Channel(), scale=FP32)
    params, g = fmt.fit(x), torch.Generator().manual_seed(0)
    mean = torch.stack([fmt.encode(x, params, g).dequantize() for _ in range(2000)]).mean(0)
    assert ((mean - x).abs() < 4 * params.scale / 2 / 2000**0.5 + 1e-6).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_is_refused(bad):
    x = sample()
    x[3, 3] = bad
    with pytest.raises(InputError, match="1 NaN or Inf"):
        Format(grid=by_name("int4"), block=Channel(), scale=FP32).quantize(x)


def test_plain_formats_are_casts():
    x = sample(10)
    assert torch.equal(FP16.quantize(x).dequantize(), x.half().float())
    assert torch.equal(BF16.quantize(x).dequantize(), x.bfloat16().float())


def test_impossible_formats_are_refused():
    with pytest.raises(InputError, match="integer grid"):
        Format(grid=by_name("nf4"), scale=FP32, zero=Zero.INTEGER)
    with pytest.raises(InputError, match="no scale"):
        Format(grid=by_name("int4"), zero=Zero.OFFSET)
    with pytest.raises(InputError, match="group size 0"):
        Group(0)
    with pytest.raises(InputError, match="percentile"):
        Percentile(q=20)
    with pytest.raises(InputError, match="MSE"):
        MSE(steps=0)


def test_every_format_and_grid_round_trips_through_plain_data():
    for fmt in ALL:
        assert from_plain(to_plain(fmt)) == fmt
    for grid in GRIDS:
        fmt = Format(grid=grid, block=Group(24), scale=FP32)
        assert from_plain(to_plain(fmt)) == fmt


def test_saved_text_cannot_name_foreign_classes_or_fields():
    with pytest.raises(InputError, match="unknown type 'Popen'"):
        from_plain({"type": "Popen", "args": "rm"})
    with pytest.raises(InputError, match="no field 'sizee'"):
        from_plain({"type": "Group", "sizee": 3})


def test_rows_of_a_qtensor():
    x = sample(11)
    for scale, zero in itertools.product((FP32, E8M0), (Zero.NONE, Zero.INTEGER)):
        q = Format(grid=by_name("int4"), block=Group(32), scale=scale, zero=zero, range=MinMax()).quantize(x)
        part = q.rows(10, 20)
        assert isinstance(part, QTensor)
        assert torch.equal(part.dequantize(), q.dequantize()[10:20])
        assert part.bits_per_weight == q.bits_per_weight
