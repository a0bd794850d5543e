"""Fake quantization: the numbers are the Format's own, the gradients those of the papers."""

import math

import pytest
import torch
from quantized import FORMATS, int_format

from fewbit.errors import InputError
from fewbit.format import FP16, FP32, Channel, Format, Gaussian, MinMax, Params, PerTensor, Zero
from fewbit.grid import Int, by_name
from fewbit.train import LSQ, PACT, Clipped, Identity, Interior, LearnedRange, Straight, Trust, fake, midrise
from fewbit.train.quest import quest_weight

TENSOR = Format(grid=Int(3), block=PerTensor(), scale=FP32)  # codes -4 .. 3
SURROGATES = (Clipped(), Interior(), Identity(), Trust())


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def line(fmt) -> bool:
    return fmt.grid.width == 1 and fmt.codebook is None and fmt.grid.bits <= 16


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_the_numbers_are_those_of_the_format_bit_for_bit(fmt):
    w = normal(64, 96)
    want = fmt.quantize(w).dequantize()
    for surrogate in SURROGATES if line(fmt) else (Identity(),):
        assert torch.equal(fake(w, fmt, surrogate=surrogate), want)
    if fmt.scale is not None:
        params = fmt.fit(2 * w)
        got = fake(w, fmt, params, Identity())
        assert torch.equal(got, fmt.encode(w, params).dequantize())
    if not line(fmt):
        with pytest.raises(InputError, match=r"use Identity\(\)"):
            fake(w, fmt)


def test_stochastic_rounding_takes_the_same_draws_as_the_format_and_is_right_on_average():
    w, fmt = normal(16, 32), int_format(4)
    params = fmt.fit(w)
    draw = lambda i: torch.Generator().manual_seed(i)  # noqa: E731
    assert torch.equal(fake(w, fmt, params, generator=draw(3)), fmt.encode(w, params, draw(3)).dequantize())
    mean = torch.stack([fake(w, fmt, params, generator=draw(i)) for i in range(400)]).mean(0)
    nearest = fake(w, fmt, params)
    assert (mean - w).abs().mean() < 0.15 * (nearest - w).abs().mean()


def test_each_surrogate_passes_where_its_rule_says():
    x = torch.tensor([-6.0, -4.4, -4.0, 0.2, 3.0, 3.4, 3.6], requires_grad=True)
    at = Params(scale=torch.tensor(1.0), zero=None)
    want = {
        Identity(): [1, 1, 1, 1, 1, 1, 1],
        Clipped(): [0, 1, 1, 1, 1, 1, 0],
        Interior(): [0, 0, 0, 1, 0, 0, 0],
        Trust(): [0, 1, 1, 1, 1, 1, 0],
        Trust(outer=2.0): [0, 0, 1, 1, 1, 0, 0],
    }
    for surrogate, mask in want.items():
        (grad,) = torch.autograd.grad(fake(x, TENSOR, at, surrogate).sum(), x)
        assert grad.tolist() == mask, surrogate


def test_trust_on_fp4_is_half_of_the_gap_between_4_and_6():
    fmt = Format(grid=by_name("e2m1"), block=PerTensor(), scale=FP32)
    x = torch.tensor([5.0, 6.9, 7.1, -7.1], requires_grad=True)
    fake(x, fmt, Params(scale=torch.tensor(1.0), zero=None), Trust()).sum().backward()
    assert x.grad.tolist() == [1, 1, 0, 0]


def test_lsq_gradients_are_those_of_equation_3():
    v = torch.tensor([-3, -0.6, 0.1, 0.7, 2.0], requires_grad=True)
    learned = {"step": torch.tensor(0.5, requires_grad=True)}
    out = LSQ()(v, TENSOR, learned)
    assert out.tolist() == [-2, -0.5, 0, 0.5, 1.5]
    gs = [torch.autograd.grad(out[i], learned["step"], retain_graph=True)[0].item() for i in range(5)]
    g = 1 / math.sqrt(5 * 3)
    assert gs == pytest.approx([g * d for d in (-4, 0.2, -0.2, -0.4, 3)], abs=1e-6)
    out.sum().backward()
    assert v.grad.tolist() == [0, 1, 1, 1, 0]
    assert LSQ().initial(v, TENSOR)["step"].item() == pytest.approx(2 * 1.28 / math.sqrt(3))


def test_lsq_gradient_is_the_finite_difference_of_the_surrogate():
    """The straight-through surrogate: clip(v / s) s plus the rounding error held fixed, in steps."""
    w = normal(8, 32, seed=1).double()
    fmt = Format(grid=Int(4), block=Channel(), scale=FP32)
    s = LSQ().initial(w, fmt)["step"].double()
    target = normal(8, 32, seed=2).double()
    clip = lambda s: (w / s).clamp(-8, 7)  # noqa: E731
    held = clip(s).round() - clip(s)
    loss = lambda s: (((clip(s) + held) * s - target) ** 2).sum(-1, keepdim=True)  # noqa: E731
    difference = (loss(s + 1e-6) - loss(s - 1e-6)) / 2e-6
    step = s.clone().requires_grad_()
    ((LSQ()(w, fmt, {"step": step}) - target) ** 2).sum().backward()
    torch.testing.assert_close(step.grad, difference / math.sqrt(32 * 7), rtol=1e-4, atol=1e-5)


def test_lsq_finds_the_best_step_of_a_normal_tensor():
    x = normal(20_000)
    fmt = Format(grid=Int(4, narrow=True), block=PerTensor(), scale=FP32)
    step = LSQ().initial(x, fmt)["step"].requires_grad_()
    optimizer = torch.optim.Adam([step], lr=3e-3)
    for _ in range(150):
        optimizer.zero_grad()
        ((LSQ()(x, fmt, {"step": step}) - x) ** 2).sum().backward()
        optimizer.step()
    error = lambda s: ((fmt.encode(x, Params(scale=s, zero=None)).dequantize() - x) ** 2).mean()  # noqa: E731
    trials = torch.linspace(0.2, 0.6, 201)
    best = trials[torch.stack([error(s) for s in trials]).argmin()]
    assert step.item() == pytest.approx(best.item(), rel=0.03)


def test_a_step_below_the_floor_stays_positive_and_comes_back():
    step = torch.tensor(-0.1, requires_grad=True)
    out = LSQ()(normal(100), TENSOR, {"step": step})
    assert out.isfinite().all()
    (out * normal(100)).sum().neg().backward()  # larger outputs lower the loss
    assert step.grad < 0


def test_learned_ranges_train_steps_and_zeros_and_store_what_was_trained():
    x = normal(64) + 1
    for zero in (Zero.INTEGER, Zero.OFFSET, Zero.FLOAT):
        fmt = Format(grid=Int(4, signed=False), block=PerTensor(), range=MinMax(), zero=zero, scale=FP16)
        learned = {n: p.requires_grad_() for n, p in LearnedRange().initial(x, fmt).items()}
        out = LearnedRange()(x, fmt, learned)
        assert torch.equal(out, fmt.quantize(x).dequantize())  # starts from the range rule
        out[:9].square().sum().backward()
        assert learned["step"].grad != 0
        assert learned["zero"].grad.isfinite()
        with torch.no_grad():
            learned["step"].mul_(0.7)
            learned["zero"].add_(0.31)
        params = LearnedRange().params(x, fmt, learned)
        assert params.scale.dtype == torch.float16  # as it will be stored
        assert torch.equal(LearnedRange()(x, fmt, learned), fmt.encode(x, params).dequantize())


def test_pact_gives_its_clip_the_gradient_of_what_it_clips():
    fmt = Format(grid=Int(2, signed=False), block=PerTensor(), scale=FP32)
    x = torch.tensor([-1.0, 0.4, 1.4, 3.0, 5.0], requires_grad=True)
    learned = {"alpha": torch.tensor(3.0, requires_grad=True)}
    out = PACT()(x, fmt, learned)
    assert out.tolist() == [0, 0, 1, 3, 3]
    out.sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 0, 0]
    assert learned["alpha"].grad == 2
    with pytest.raises(InputError, match="use an unsigned grid"):
        PACT().initial(x, TENSOR)


@pytest.mark.parametrize(
    ("bits", "alpha", "error"), [(1, 0.79788, 0.3634), (2, 1.49353, 0.1188), (4, 2.5140, 0.01154)]
)
def test_quest_s_grid_has_the_paper_s_clip_and_error(bits, alpha, error):
    x, fmt = normal(4, 50_000), quest_weight(bits)
    out = fake(x, fmt)
    rms = x.square().mean(-1, keepdim=True).sqrt()
    assert len(out[0].unique()) == 2**bits
    torch.testing.assert_close(out.amax(-1, keepdim=True), alpha * rms, rtol=1e-4, atol=0)
    assert ((out - x) ** 2).mean().item() == pytest.approx(error, rel=0.02)


def test_trust_masks_what_lies_half_a_step_beyond_the_clip():
    x = normal(4, 50_000).requires_grad_()
    fake(x, quest_weight(4), surrogate=Trust()).sum().backward()
    assert (x.grad == 0).float().mean().item() == pytest.approx(0.0073, rel=0.1)  # P(|z| > 2.6816)


def test_settings_that_mean_nothing_are_refused():
    affine = Format(grid=Int(4), block=Channel(), range=MinMax(), zero=Zero.INTEGER, scale=FP32)
    with pytest.raises(InputError, match="LearnedRange"):
        LSQ().initial(normal(4, 8), affine)
    with pytest.raises(InputError, match="cannot be learned"):
        LSQ().initial(normal(4, 8), Format(grid=by_name("e4m3")))
    with pytest.raises(InputError, match="outer trust factor"):
        Trust(outer=0)
    with pytest.raises(InputError, match="1 to 8 bits"):
        midrise(0)
    assert Straight().initial(normal(4, 8), affine) == {}
    assert isinstance(quest_weight(2).range, Gaussian)
