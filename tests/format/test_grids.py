"""Every named grid as the elements of a format: all codes, and every kind of tensor that can come."""

import math

import pytest
import torch

from fewbit.errors import InputError
from fewbit.format import FP16, FP32, Channel, Format, Group, Params, PerTensor, QTensor
from fewbit.grid import GRIDS, Int
from fewbit.io import native

GRIDS_OF_WEIGHTS = [grid for grid in GRIDS if grid != Int(1)]  # int1 holds no positive value
named = pytest.mark.parametrize("grid", GRIDS_OF_WEIGHTS, ids=str)
LEAST = torch.finfo(torch.float32).smallest_normal


def over(grid, block=None):
    """Channels of this grid, or another block, with float32 steps."""
    return Format(grid=grid, block=block or Channel(), scale=FP32)


def sample(grid, *shape, seed=0):
    """Normal numbers; magnitudes of them for a grid without negative values."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return x.abs() if grid.min >= 0 else x


def through(fmt, x):
    return fmt.quantize(x).dequantize()


@named
def test_every_code_comes_back_from_the_value_it_means(grid):
    # of tf32 and fp32 a part
    codes = grid.codes() if grid.bits <= 16 else grid.from_unsigned(torch.arange(2**16))
    finite = grid.value(codes, torch.float64).view(len(codes), -1).isfinite().all(-1)
    codes = codes[finite].view(1, -1)
    shape = torch.Size([1, codes.numel() * grid.width])
    for step in (1.0, 0.375):  # 0.375: products are exact in float64
        if step * grid.max > 3e38:
            continue
        scale = torch.full((1, 1), step)
        q = QTensor(codes=codes, scale=scale, zero=None, format=over(grid), shape=shape)
        values = grid.value(codes, torch.float64).view(shape) * step
        again = over(grid).encode(values, Params(scale=scale, zero=None))
        same = again.codes == codes
        # a table may hold a value twice; then the value comes back
        assert torch.equal(grid.value(again.codes[~same]), grid.value(codes[~same]))
        assert (~same).sum() <= 1
        back = native.from_dict("m", native.to_dict("m", q), over(grid), tuple(shape))
        assert torch.equal(back.codes, codes)


@named
def test_nan_and_inf_are_refused(grid):
    for bad in (math.nan, math.inf, -math.inf):
        x = sample(grid, 3, 24)
        x[1, 5] = bad
        with pytest.raises(InputError, match=r"\[3, 24\] holds 1 NaN or Inf"):
            over(grid).quantize(x)


@named
def test_zeros_denormals_and_constants(grid):
    for scale in (FP32, FP16):
        x = sample(grid, 3, 24)
        x[1] = 0
        y = through(Format(grid=grid, block=Channel(), scale=scale), x)
        assert y[1].abs().max() <= 1e-3 * y[0].abs().max()  # a grid without 0 holds the least it can
        assert torch.equal(y[::2], through(Format(grid=grid, block=Channel(), scale=scale), x[::2]))
    tiny = sample(grid, 3, 24) * 1e-42
    assert tiny.any()
    for x in (tiny, tiny.double(), tiny.double() * 1e-200):
        assert ((through(over(grid), x) - x).abs() <= LEAST * max(1, abs(grid.min), grid.max)).all()
    for constant in (1.0, 3e-5) if grid.min >= 0 else (1.0, -0.37, 3e-5):
        y = through(over(grid), torch.full((3, 24), constant))
        # Exact where an end of the grid can lie there: floats as wide as float32 have no step so small, and
        # some tables end nearer to 0 on the negative side.
        end = grid.max if constant > 0 else -grid.min
        exact = grid.width == 1 and end >= grid.max and grid.max * LEAST < 1e-9
        assert ((y - constant).square().mean().sqrt() / abs(constant)).item() <= (
            1e-6 if exact else 0.02 if grid.width == 1 else 0.7
        )


@named
def test_dtypes_strides_and_empty_tensors(grid):
    x = sample(grid, 48, 48).to(torch.bfloat16)
    want = through(over(grid), x.float())
    for y in (x, x.half().float(), x.float()):
        assert torch.equal(through(over(grid), y.to(torch.bfloat16)), want)
    assert torch.equal(through(over(grid), x.half()), through(over(grid), x.half().float()))
    doubled = over(grid).quantize(x.double())
    assert doubled.dequantize().dtype == torch.float32
    assert ((doubled.dequantize() - want).abs() > 1e-6).float().mean() < 0.02  # ties alone differ
    assert torch.equal(through(over(grid), x.t()), through(over(grid), x.t().contiguous()))
    assert torch.equal(through(over(grid), x[:, ::2]), through(over(grid), x[:, ::2].contiguous()))
    assert torch.equal(through(over(grid, Group(24)), x[:, :24]), through(over(grid), x[:, :24]))
    assert through(over(grid), x[:0]).shape == (0, 48)
    assert through(over(grid, PerTensor()), x[:, :0]).shape == (48, 0)
    assert through(over(grid, Group(24)), x[:0]).shape == (0, 48)


@named
def test_one_element_or_one_vector_and_shapes_that_do_not_divide(grid):
    x = torch.full((grid.width,), 2.5)
    y = through(over(grid, PerTensor()), x)
    assert y.shape == x.shape
    if grid.width == 1:
        assert y.item() == pytest.approx(2.5, rel=1e-6)
        assert through(over(grid, PerTensor()), torch.tensor(2.5)).item() == pytest.approx(2.5, rel=1e-6)
        with pytest.raises(InputError, match="single number"):
            over(grid).quantize(torch.tensor(2.5))
    else:
        with pytest.raises(InputError, match=f"codes {grid.width} columns at once, which does not divide"):
            over(grid).quantize(torch.ones(2, 5 * grid.width - 1))
        with pytest.raises(InputError, match="cut some of them in two"):
            over(grid, Group(grid.width + 1))
    with pytest.raises(InputError, match="does not divide the 25 input columns"):
        over(grid, Group(24)).quantize(torch.ones(2, 25))
