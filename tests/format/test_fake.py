"""Fake quantization gives the numbers of the format, bit for bit, and the gradients of its surrogate."""

import pytest
import torch

from fewbit.errors import InputError
from fewbit.format import BF16, FP32, MSE, Channel, Format, Group, MinMax, Zero, format_by_name
from fewbit.format.fake import Steps, export, fake, gaps, interval, limits, steps
from fewbit.format.format import Params
from fewbit.grid import by_name


def weights(seed=0, shape=(48, 128), dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def integers(bits, zero, scale=BF16, signed=False, range=None):
    grid = by_name(f"{'' if signed else 'u'}int{bits}")
    return Format(grid=grid, block=Group(32), zero=zero, scale=scale, range=range or MinMax())


FORMATS = {
    "int4": integers(4, Zero.NONE, signed=True),
    "uint3": integers(3, Zero.INTEGER),
    "uint2-mse": integers(2, Zero.INTEGER, range=MSE()),
    "uint4-float-zero": integers(4, Zero.FLOAT),
    "uint4-offset": integers(4, Zero.OFFSET),
    "rows": Format(grid=by_name("int4"), block=Channel(), scale=FP32),
    **{name: format_by_name(name) for name in ("nf4", "nf4-dq", "mxfp4", "nvfp4", "mx6", "qoq")},
}


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
def test_forward_is_the_format_bit_for_bit(fmt):
    w = weights()
    at = steps(fmt, *interval(fmt, w), w)
    seen = fmt.block.join(fake(fmt.block.split(w), at), w.shape)
    assert torch.equal(seen, fmt.quantize(w).dequantize())


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
def test_exported_codes_mean_what_was_trained_on(fmt):
    w = weights(1)
    lo, hi = interval(fmt, w)
    at = steps(fmt, 0.83 * lo, 0.91 * hi, w)
    nudge = torch.rand(fmt.block.split(w).shape, generator=torch.Generator().manual_seed(2)) - 0.5
    seen = fmt.block.join(fake(fmt.block.split(w), at, nudge), w.shape)
    q = export(w, at, nudge)
    assert torch.equal(seen, q.dequantize())
    assert not torch.equal(q.codes, fmt.quantize(w).codes)


def test_gradient_of_the_step_is_that_of_lsq():
    """LSQ, eq. 3, on a 3-bit grid with step 1/2: inside v - x/s, outside the end of the grid."""
    s = torch.full((5, 1), 0.5, requires_grad=True)
    x = torch.tensor([-3, -0.6, 0.1, 0.7, 2.0]).reshape(5, 1).requires_grad_()
    fmt = Format(grid=by_name("int3"), scale=FP32)
    out = fake(x, Steps(format=fmt, params=Params(scale=None, zero=None), scale=s, zero=None))
    out.sum().backward()
    assert out.flatten().tolist() == [-2, -0.5, 0, 0.5, 1.5]
    torch.testing.assert_close(s.grad.flatten(), torch.tensor([-4, 0.2, -0.2, -0.4, 3]))
    assert x.grad.flatten().tolist() == [0, 1, 1, 1, 0]


def surrogate(fmt, w, lo, hi, at, blocks):
    """x^ with every rounding replaced by "plus what it added at the point", and saturation by a constant."""
    s0, z0 = at.scale.detach(), at.zero.detach()
    raw0 = (hi - lo) / fmt.reach
    shift_s = s0.squeeze(-1) - raw0
    raw_z = lambda lo, s: lo - fmt.grid.min * s if fmt.zero is Zero.OFFSET else fmt.grid.min - lo / s  # noqa: E731
    shift_z = z0.squeeze(-1) - raw_z(lo, raw0 + shift_s)
    unit = lambda s, z: (blocks - z) / s if fmt.zero is Zero.OFFSET else blocks / s + z  # noqa: E731
    u0 = unit(s0, z0)
    low, high = limits(fmt)
    inside, v0 = (u0 >= low) & (u0 <= high), fmt.grid.snap(u0)

    def value(lo, hi):
        s = (hi - lo) / fmt.reach + shift_s
        z = (raw_z(lo, s) + shift_z).unsqueeze(-1)
        s = s.unsqueeze(-1)
        v = torch.where(inside, unit(s, z) + (v0 - u0), v0)
        return v * s + z if fmt.zero is Zero.OFFSET else (v - z) * s

    return value


@pytest.mark.parametrize("zero", [Zero.INTEGER, Zero.FLOAT, Zero.OFFSET])
def test_gradient_of_the_ends_is_that_of_the_surrogate(zero):
    """Central differences in float64 of the loss on the surrogate, for both ends of every group."""
    fmt = integers(3, zero)
    w = weights(3, (2, 64), torch.float64)
    blocks, pull = fmt.block.split(w), weights(4, (2, 2, 32), torch.float64)
    lo, hi = (0.6 * end for end in interval(fmt, w))  # clips, so that both branches are taken
    ends = [lo.clone().requires_grad_(), hi.clone().requires_grad_()]
    at = steps(fmt, *ends, w)
    out = fake(blocks, at)
    value = surrogate(fmt, w, lo, hi, at, blocks)
    torch.testing.assert_close(value(lo, hi), out.detach(), rtol=1e-12, atol=1e-12)
    (out * pull).sum().backward()
    for k, end in enumerate(ends):
        for i in range(end.numel()):
            d = torch.zeros(end.numel(), dtype=torch.float64)
            d[i] = 1e-6
            d = d.view_as(end)
            up, down = ((lo + sign * d, hi) if k == 0 else (lo, hi + sign * d) for sign in (1, -1))
            slope = ((value(*up) - value(*down)) * pull).sum() / 2e-6
            torch.testing.assert_close(end.grad.flatten()[i], slope, rtol=1e-6, atol=1e-7)


def test_what_saturates_is_what_lies_half_a_gap_beyond_the_grid():
    assert limits(FORMATS["int4"]) == (-8.5, 7.5)
    assert limits(FORMATS["uint3"]) == (-0.5, 7.5)
    low, high = limits(format_by_name("mxfp4"))  # ends -6, -4 ... 4, 6
    assert (low, high) == pytest.approx((-7, 7))


def test_gaps_are_those_of_the_points_around_a_value():
    fmt = format_by_name("mxfp4")  # 0 .5 1 1.5 2 3 4 6
    x = torch.tensor([[0.1, 0.7, -1.2, 2.5, -3.5, 5.0, 6.0, -9.0]])
    at = Steps(format=fmt, params=Params(scale=None, zero=None), scale=torch.ones(1, 1), zero=None)
    assert gaps(x, at).tolist() == [[0.5, 0.5, 0.5, 1, 1, 2, 2, 2]]


def test_formats_without_learnable_steps_are_refused():
    for fmt in (Format(grid=by_name("bf16")), format_by_name("nf4-dq").scale):
        with pytest.raises(InputError, match="cannot be learned"):
            steps(fmt, -torch.ones(()), torch.ones(()), torch.ones(4))
