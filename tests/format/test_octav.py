"""OCTAV: the paper's fixed points, the clip against a brute-force search, and invariances."""

import pytest
import torch
from clips import error_at, real_formats, search, stratified

from fewbit.errors import InputError
from fewbit.format import FP32, Channel, Divisor, Format, Group, PerTensor, Zero
from fewbit.format.octav import OCTAV, noise_constant, recursion
from fewbit.format.prior import Prior
from fewbit.grid import Int, by_name

# The paper's recursion on unit Gauss and Laplace data, 2^B + 1 points.
FIXED = {
    Prior.GAUSS: {2: 1.739, 3: 2.162, 4: 2.563, 6: 3.284},
    Prior.LAPLACE: {2: 2.866, 3: 3.902, 4: 5.027, 6: 7.472},
}
INT4 = Format(grid=Int(4), scale=FP32)


def weights(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("prior", Prior)
@pytest.mark.parametrize("bits", [2, 3, 4, 6])
def test_fixed_points_of_the_paper(prior, bits):
    x = stratified(prior)
    *_, paper = real_formats(bits)
    assert noise_constant(paper.unit_points()) == pytest.approx(4.0**-bits / 3)
    s = OCTAV(refine=0)(x, paper, None)[1].item()
    assert s == pytest.approx(FIXED[prior][bits], rel=0.01)
    c, inside = 4.0**-bits / 3, (x.abs() <= s).double().mean()
    excess = (x.abs() - s).clamp(min=0).mean()
    assert abs(c * s * inside - excess) / s < 1e-4  # stationary


@pytest.mark.parametrize("prior", Prior)
@pytest.mark.parametrize("bits", range(2, 9))
def test_within_one_percent_of_brute_force(prior, bits):
    x = stratified(prior, 1 << (19 if bits == 8 else 17))
    for fmt in real_formats(bits):
        _, s = OCTAV()(x, fmt, None)
        least, best = search(fmt, x, s.item())
        assert s.item() == pytest.approx(best, rel=0.01)
        assert error_at(fmt, x, s) <= 1.0005 * least


@pytest.mark.parametrize("prior", Prior)
@pytest.mark.parametrize("name", ["e2m1", "nf4", "e3m2", "int2", "int4"])
def test_other_grids_reach_the_least_error(prior, name):
    x = stratified(prior, 1 << 16)
    for zero in (Zero.NONE, Zero.OFFSET):
        fmt = Format(grid=by_name(name), zero=zero, scale=FP32)
        _, s = OCTAV()(x, fmt, None)
        assert error_at(fmt, x, s) <= 1.002 * search(fmt, x, s.item())[0]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_converges_in_under_ten_steps(bits):
    c = 1 / (12 * (2 ** (bits - 1) - 1) ** 2)
    for x in (stratified(Prior.GAUSS), stratified(Prior.LAPLACE), torch.linspace(0, 1, 999).double()):
        y = (x.abs() / x.abs().max())[None]
        start = torch.tensor([2.0 + bits / 4])
        s, _, steps = recursion(y, torch.tensor([c]).double(), start.double(), 9)
        more, _, _ = recursion(y, torch.tensor([c]).double(), start.double(), 50)
        assert steps < 10
        torch.testing.assert_close(s, more, rtol=2e-3, atol=0)


def test_unsigned_is_signed_with_one_bit_more():
    """On [0, s] with step s / 2^B the rounding noise is that of the signed (B + 1)-bit clip."""
    x = stratified(Prior.GAUSS).abs()
    for bits in (2, 4):
        c = torch.tensor([4.0**-bits / 12]).double()
        *_, paper = real_formats(bits + 1)
        start = torch.tensor([2.0]).double()
        s, _, _ = recursion((x / x.max())[None], c, start, 10)
        assert (s * x.max()).item() == pytest.approx(OCTAV(refine=0)(x, paper, None)[1].item(), rel=1e-3)


@pytest.mark.parametrize("zero", [Zero.NONE, Zero.INTEGER])
def test_half_range_after_a_relu(zero):
    x = stratified(Prior.GAUSS, 1 << 17).clamp(min=0)
    fmt = Format(grid=Int(3, signed=False), zero=zero, scale=FP32)
    lo, hi = OCTAV()(x, fmt, None)
    assert zero is Zero.NONE or lo == 0

    def error(a: float) -> float:
        return (fmt.round_trip(x[None], x.new_zeros(1), x.new_tensor([a])) - x).square().mean().item()

    least = min(error(hi.item() * (0.9 + 0.005 * i)) for i in range(41))
    assert error(hi.item()) <= 1.001 * least


@pytest.mark.parametrize("block", [PerTensor(), Channel(), Group(32), Group(128)])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("zero", Zero)
def test_never_worse_than_the_whole_range_and_refining_helps(block, bits, zero):
    if zero is Zero.MEAN:
        return
    x = weights((32, 256))
    grid = Int(bits, narrow=True) if zero is Zero.NONE else Int(bits, signed=False)
    errors = []
    for rule in (OCTAV(refine=3), OCTAV(refine=0)):
        fmt = Format(grid=grid, block=block, zero=zero, scale=FP32, range=rule)
        errors.append((fmt.quantize(x).dequantize() - x).square().mean())
    blocks = block.split(x)
    blocks = blocks.reshape(-1, blocks.shape[-1])
    whole = fmt.round_trip(blocks, *blocks.aminmax(dim=-1))
    assert errors[0] <= errors[1]
    assert errors[0] <= (whole - blocks).square().mean() * 1.001


def test_invariances():
    x = weights((16, 200))
    s = OCTAV()(x, INT4, None)[1]
    g = torch.Generator().manual_seed(1)
    torch.testing.assert_close(OCTAV()(4 * x, INT4, None)[1], 4 * s, rtol=0, atol=0)  # exact powers of two
    torch.testing.assert_close(OCTAV()(3e5 * x, INT4, None)[1], 3e5 * s, rtol=1e-3, atol=0)
    shuffled = x[:, torch.randperm(200, generator=g)]
    torch.testing.assert_close(OCTAV()(shuffled, INT4, None)[1], s, rtol=1e-4, atol=0)
    padded = torch.cat([x, torch.zeros(16, 77)], -1)
    torch.testing.assert_close(OCTAV()(padded, INT4, None)[1], s, rtol=1e-4, atol=0)
    narrow = Format(grid=Int(4, narrow=True), scale=FP32)  # -8 breaks the mirror symmetry of int4
    signs = torch.randint(0, 2, x.shape, generator=g) * 2 - 1
    torch.testing.assert_close(
        OCTAV()(x * signs, narrow, None)[1], OCTAV()(x, narrow, None)[1], rtol=1e-4, atol=0
    )


@pytest.mark.parametrize("zero", [Zero.NONE, Zero.INTEGER, Zero.OFFSET])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_edges(zero, bits):
    fmt = Format(
        grid=Int(bits, signed=False) if zero is not Zero.NONE else Int(max(bits, 2)), zero=zero, scale=FP32
    )
    for value, n in ((0.0, 5), (2.5, 1), (-2.5, 1), (-1.0, 7), (1e30, 9), (1e-42, 3)):
        x = torch.full((2, n), value)
        lo, hi = OCTAV()(x, fmt, None)
        assert torch.isfinite(lo).all()
        assert torch.isfinite(hi).all()
        if zero is Zero.NONE:
            torch.testing.assert_close(hi, x.abs().amax(-1), rtol=1e-5, atol=0)
        elif value == 2.5:
            torch.testing.assert_close(hi, x[:, 0])
    x = torch.tensor([[1e30, -1e30, 1e29, 3e29, 0.0]])
    lo, hi = OCTAV()(x, fmt, None)
    assert torch.isfinite(hi - lo).all()
    assert 0 < hi - lo <= 2e30


def test_layouts_and_dtypes():
    x = weights((6, 4, 32))
    s = OCTAV()(x, INT4, None)[1]
    assert s.shape == (6, 4)
    strided = x.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(OCTAV()(strided, INT4, None)[1], s)
    double = OCTAV()(x.double(), INT4, None)[1]
    assert double.dtype == torch.float64
    torch.testing.assert_close(double.float(), s, rtol=1e-3, atol=0)
    full = Format(grid=Int(4), divisor=Divisor.FULL, scale=FP32)
    assert (OCTAV()(x, full, None)[1] <= x.abs().amax(-1)).all()


def test_long_blocks_are_summed_in_parts():
    x = weights((300_001,))
    s = OCTAV()(x, INT4, None)[1]
    assert s.item() == pytest.approx(OCTAV()(x.double(), INT4, None)[1].item(), rel=1e-5)
    assert s.item() == pytest.approx(OCTAV()(x[:131_072], INT4, None)[1].item(), rel=0.02)


def test_impossible_settings_are_refused():
    for wrong in ({"steps": 0}, {"refine": -1}):
        with pytest.raises(InputError, match="OCTAV"):
            OCTAV(**wrong)
