"""ACIQ: the paper's numbers, the rule against a brute-force search, bits for channels, bias correction."""

import re
from pathlib import Path

import pytest
import torch
from clips import error_at, real_formats, search, stratified, uniform

from fewbit.errors import InputError
from fewbit.format import FP16, FP32, Channel, Format, Group, PerTensor, Zero
from fewbit.format.aciq import ACIQ, allocate, clip, correct_bias, noise
from fewbit.format.prior import Prior, expected_error
from fewbit.grid import Int, by_name

LAPLACE = (1.8628, 2.8307, 3.8972, 5.0286, 6.2048, 7.4131, 8.6456, 9.8968)
GAUSS = (1.2399, 1.7106, 2.1516, 2.5591, 2.9362, 3.2869, 3.6151, 3.9240)


@pytest.mark.parametrize("bits", range(1, 9))
def test_clips_of_the_paper(bits):
    assert clip(bits, Prior.LAPLACE) == pytest.approx(LAPLACE[bits - 1], abs=1e-4)
    assert clip(bits, Prior.GAUSS) == pytest.approx(GAUSS[bits - 1], abs=1e-4)
    for prior in Prior:
        assert clip(bits, prior, one_sided=True) == pytest.approx(clip(bits + 1, prior), rel=1e-12)
        a = clip(bits, prior)
        assert noise(a, bits, prior) < min(noise(a * 0.99, bits, prior), noise(a * 1.01, bits, prior))


@pytest.mark.parametrize("bits", range(2, 9))
def test_noise_of_the_paper_describes_two_to_the_m_plus_one_points(bits):
    points = uniform(2**bits + 1) * clip(bits, Prior.GAUSS)
    close = 0.08 if bits == 2 else 0.03
    assert expected_error(points, Prior.GAUSS) == pytest.approx(
        noise(clip(bits, Prior.GAUSS), bits, Prior.GAUSS), rel=close
    )


def test_minimum_noise_of_the_paper():
    published = {
        (Prior.LAPLACE, 4): 0.04602, (Prior.LAPLACE, 8): 5.99e-4, (Prior.GAUSS, 4): 0.010493,
        (Prior.GAUSS, 8): 8.71e-5,
    }  # fmt: skip
    for (prior, bits), least in published.items():
        assert noise(clip(bits, prior), bits, prior) == pytest.approx(least, rel=2e-3)


@pytest.mark.parametrize("prior", Prior)
@pytest.mark.parametrize("bits", range(2, 9))
def test_within_one_percent_of_brute_force(prior, bits):
    x = stratified(prior, 1 << (19 if bits == 8 else 17))
    for fmt in real_formats(bits):
        _, a = ACIQ()(x, fmt, None)  # the data choose the prior
        least, best = search(fmt, x, a.item())
        assert a.item() == pytest.approx(best, rel=0.01)
        assert error_at(fmt, x, a) <= 1.002 * least


@pytest.mark.parametrize("prior", Prior)
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("zero", [Zero.NONE, Zero.INTEGER])
def test_half_range_after_a_relu(prior, bits, zero):
    x = stratified(prior, 1 << 17).clamp(min=0)
    fmt = Format(grid=Int(bits, signed=False), zero=zero, scale=FP32)
    lo, hi = ACIQ()(x, fmt, None)
    assert lo.item() == 0 or zero is Zero.NONE

    def error(a: float) -> float:
        return (fmt.round_trip(x[None], x.new_zeros(1), x.new_tensor([a])) - x).square().mean().item()

    clips = [hi.item() * (0.9 + 0.005 * i) for i in range(41)]
    best = min(clips, key=error)
    assert hi.item() == pytest.approx(best, rel=0.011)


def test_the_data_choose_per_block():
    x = torch.stack([stratified(p, 4096) * s for p in Prior for s in (0.1, 7)])
    fmt = Format(grid=Int(4), scale=FP32)
    chosen = ACIQ()(x, fmt, None)[1]
    gauss, laplace = (ACIQ(prior=p)(x, fmt, None)[1] for p in Prior)
    torch.testing.assert_close(chosen, torch.cat([gauss[:2], laplace[2:]]))
    assert not torch.allclose(gauss, laplace, rtol=0.05)


@pytest.mark.parametrize("zero", [Zero.NONE, Zero.OFFSET])
def test_interval_follows_scale_and_shift_and_stays_in_the_data(zero):
    x = stratified(Prior.LAPLACE, 1024).float() + 0.3
    fmt = Format(grid=Int(4), zero=zero, scale=FP32)
    lo, hi = ACIQ()(x, fmt, None)
    lo3, hi3 = ACIQ()(3 * x, fmt, None)
    torch.testing.assert_close(torch.stack([lo3, hi3]), 3 * torch.stack([lo, hi]))
    if zero is Zero.OFFSET:
        low, high = ACIQ()(x - 2, fmt, None)
        torch.testing.assert_close(torch.stack([low, high]), torch.stack([lo, hi]) - 2, rtol=1e-4, atol=1e-4)
        assert lo >= x.min()
        assert hi <= x.max()
        few = torch.tensor([[1.0, 2.0, -1.0], [5.0, 5.0, 5.0]])
        low, high = ACIQ()(few, Format(grid=Int(8), zero=zero, scale=FP32), None)
        assert (low >= few.amin(-1)).all()
        assert (high <= few.amax(-1)).all()


def test_edges_and_layouts():
    fmt = Format(grid=Int(4), scale=FP32)
    for x in (
        torch.zeros(2, 5),
        torch.full((2, 5), 1e30),
        torch.full((2, 1), -3.0),
        torch.full((2, 4), 1e-42),
    ):
        lo, hi = ACIQ()(x, fmt, None)
        assert torch.isfinite(hi).all()
        assert (hi <= x.abs().amax(-1)).all()
        assert torch.equal(lo, -hi)
    x = torch.randn(6, 4, 32, generator=torch.Generator().manual_seed(0))
    strided = x.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(ACIQ()(x, fmt, None)[1], ACIQ()(strided, fmt, None)[1])
    assert ACIQ()(x, fmt, None)[1].shape == (6, 4)
    double = ACIQ()(x.double(), fmt, None)[1]
    assert double.dtype == torch.float64
    torch.testing.assert_close(double.float(), ACIQ()(x, fmt, None)[1])
    padded = torch.cat([x, torch.zeros(6, 4, 50)], -1)
    torch.testing.assert_close(ACIQ()(padded, fmt, None)[1], ACIQ()(x, fmt, None)[1])
    with pytest.raises(InputError, match="gauss, laplace"):
        ACIQ(prior="cauchy")


def test_allocation_meets_the_budget_and_saves_noise():
    alpha = torch.rand(101, generator=torch.Generator().manual_seed(0)).exp2() ** 4
    alpha[3] = 0
    for bits in (0, 0.5, 2, 3.25, 4, 7.9, 8):
        got = allocate(alpha, bits)
        assert got.dtype == torch.int64
        assert got.sum().item() == int(101 * bits)
        assert 0 <= got.min() <= got.max() <= 8
        order = alpha.argsort()
        assert (got[order].diff() >= 0).all()  # wider channels never get less
    bits = allocate(alpha, 4)
    assert bits[3] == 0
    assert (alpha**2 / 4.0**bits).sum() < (alpha**2 / 4.0**4).sum()
    inner = (bits > 0) & (bits < 8)  # bins in proportion to alpha^(2/3), to half a bit either way
    spread = (bits - 2 / 3 * alpha.log2())[inner]
    assert spread.max() - spread.min() <= 1 + 1e-4


@pytest.mark.parametrize(
    ("alpha", "bits"), [([1.0], 9), ([1.0], -1), ([-1.0], 4), ([float("nan")], 4), ([[1.0]], 4)]
)
def test_allocation_refuses(alpha, bits):
    with pytest.raises(InputError):
        allocate(torch.tensor(alpha), bits)


@pytest.mark.parametrize("block", [Channel(), Group(16)])
@pytest.mark.parametrize("variance", [False, True])
def test_bias_correction_restores_mean_and_deviation(block, variance):
    g = torch.Generator().manual_seed(0)
    w = torch.randn(12, 64, generator=g) * torch.rand(12, 1, generator=g) + 0.5
    fmt = Format(grid=Int(2, signed=False), block=block, range=ACIQ(), zero=Zero.OFFSET, scale=FP32)
    q = fmt.quantize(w)
    fixed = correct_bias(w, q, variance)
    assert fixed.format == fmt
    assert torch.equal(fixed.codes, q.codes)
    now = fixed.dequantize().double()
    assert not torch.allclose(q.dequantize().mean(-1), w.mean(-1), rtol=1e-4)
    torch.testing.assert_close(now.mean(-1), w.double().mean(-1), rtol=1e-6, atol=0)
    close = {"rtol": 1e-6, "atol": 0} if variance else {"rtol": 0.5, "atol": 0}
    torch.testing.assert_close(now.std(-1), w.double().std(-1), **close)


def test_bias_correction_of_constant_rows_and_refusals():
    fmt = Format(grid=Int(4), block=Channel(), zero=Zero.OFFSET, scale=FP32)
    w = torch.full((2, 8), 3.0)
    assert torch.equal(correct_bias(w, fmt.quantize(w)).dequantize(), w)
    for wrong in (
        Format(grid=Int(4), block=Channel(), scale=FP16),
        Format(grid=Int(4), block=PerTensor(), zero=Zero.OFFSET, scale=FP32),
        Format(grid=by_name("uint4"), block=Channel(), zero=Zero.INTEGER, scale=FP32),
    ):
        with pytest.raises(InputError, match="zero=offset"):
            correct_bias(w, wrong.quantize(w))
    with pytest.raises(InputError, match="give the originals"):
        correct_bias(w[:1], fmt.quantize(w))


def test_the_example_of_the_documentation_prints_what_stands_there(capsys):
    page = (Path(__file__).parents[2] / "docs" / "formats.md").read_text()
    code, printed = re.search(r"```python\n(.*?)```\n\nprints\n\n```\n(.*?)```", page, re.DOTALL).groups()
    with torch.random.fork_rng(devices=[]):
        exec(compile(code, "docs/formats.md", "exec"), {})
    got = capsys.readouterr().out
    numbers = re.compile(r"\d+\.\d+")
    assert numbers.sub("#", got) == numbers.sub("#", printed)
    want = [float(v) for v in numbers.findall(printed)]
    assert [float(v) for v in numbers.findall(got)] == pytest.approx(want, abs=2e-4)
