"""Quantizers at inputs and outputs of modules: ranges, groups of columns, and that nothing else changes."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from fewbit.errors import InputError
from fewbit.format import FP32, MSE, Format, MinMax, PerTensor, Zero
from fewbit.format.activation import Activation
from fewbit.format.block import Columns, Token
from fewbit.grid import Int
from fewbit.nn.sites import At, Quantizer, Seen, Site, fit, observe, place

AFFINE = Format(grid=Int(8, signed=False), range=MinMax(), zero=Zero.INTEGER, scale=FP32)
STATIC = Activation(format=AFFINE, static=True)


def grouped(groups):
    return Activation(format=replace(AFFINE, block=Columns(1)), static=True, groups=groups)


def seen_of(x):
    return Seen(low=x.amin(0)[None], high=x.amax(0)[None], rows=x, tokens=len(x))


class Residual(nn.Module):
    """y = norm(x + f(x)): a sum that has no module of its own."""

    def __init__(self, d=16):
        super().__init__()
        torch.manual_seed(1)
        self.f, self.norm, self.unused = nn.Linear(d, d), nn.LayerNorm(d), nn.Linear(d, d)

    def forward(self, x, attention_mask=None):
        return self.norm(x + self.f(x))


@pytest.fixture
def model():
    return Residual().eval()


@pytest.fixture
def x():
    return torch.randn(4, 6, 16, generator=torch.Generator().manual_seed(0))


def test_a_residual_sum_passes_through_its_quantizer_and_comes_back_when_removed(model, x):
    site = Site("norm", At.INPUT)
    with torch.no_grad():
        before = model(x)
        quantizer = fit(STATIC, observe(model, [site], [{"x": x}])[site])
        remove = place(model, {site: quantizer})
        y = x + model.f(x)
        step = (y.max() - y.min()) / 255
        expected = model.norm.forward(((y / step).round()) * step)
        torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-4)
        assert not torch.equal(model(x), before)
        remove()
        assert torch.equal(model(x), before)


def test_an_output_is_rounded_where_it_is_made(model, x):
    site = Site("f")
    quantizer = fit(STATIC, observe(model, [site], [{"x": x}])[site])
    remove = place(model, {site: quantizer})
    h = model.f(x)
    remove()
    assert len(h.unique()) <= 256 < len(model.f(x).unique())


def test_two_sites_of_one_module_and_a_dynamic_one(model, x):
    dynamic = Activation(format=replace(AFFINE, block=Token()))
    quantizers = {Site("norm", At.INPUT): Quantizer(dynamic), Site("norm"): fit(dynamic, None)}
    remove = place(model, quantizers)
    y = x + model.f(x)
    expected = dynamic(model.norm.forward(dynamic(y)))
    assert torch.equal(model(x), expected)
    remove()


def test_the_steps_of_a_site_are_in_the_state_dict_and_keep_their_dtype_in_a_copy_too(model, x):
    site = Site("norm", At.INPUT)
    place(model, {site: fit(STATIC, observe(model, [site], [{"x": x}])[site])})
    assert {"norm.input_site.scale", "norm.input_site.zero"} <= set(model.state_dict())
    twin = copy.deepcopy(model).bfloat16()
    assert twin.norm.input_site.scale.dtype == torch.float32
    assert torch.equal(twin.norm.input_site.scale, model.norm.input_site.scale)
    twin = copy.deepcopy(model)
    twin.norm.input_site.scale *= 100
    assert (twin(x) - model(x)).abs().max() > 0.1, "the copy rounds with the steps of its original"


def test_calibration_leaves_padding_out(model, x):
    mask = torch.ones(4, 6, dtype=torch.long)
    mask[:, 4:] = 0
    padded = x.clone()
    padded[:, 4:] = 1000
    site = Site("f", At.INPUT)
    seen = observe(model, [site], [{"x": padded, "attention_mask": mask}])[site]
    clean = observe(model, [site], [{"x": x[:, :4]}])[site]
    assert seen.tokens == 16
    assert torch.equal(seen.low, clean.low)
    assert torch.equal(seen.high, clean.high)
    assert torch.equal(seen.rows, clean.rows)


def test_the_moving_average_moves_and_min_max_does_not_forget(model):
    batches = [{"x": torch.full((1, 2, 16), v)} for v in (1.0, 5.0, 5.0)]
    site = Site("f", At.INPUT)
    seen = observe(model, [site], batches)[site]
    average = fit(replace(STATIC, momentum=0.9), seen).params
    high = 0.9 * (0.9 * 1 + 0.1 * 5) + 0.1 * 5
    assert average.scale.item() == pytest.approx(high / 255)
    assert fit(STATIC, seen).params.scale.item() == pytest.approx(5 / 255)


def test_the_mse_range_clips_one_wild_value_and_errs_less():
    x = torch.randn(4096, 8, generator=torch.Generator().manual_seed(0))
    x[7, 3] = 60
    wide = replace(AFFINE, grid=Int(4, signed=False))
    errors = []
    for rule in (MinMax(), MSE(weighted=False, shrink=0.05, steps=40)):
        quantizer = fit(Activation(format=replace(wide, range=rule), static=True), seen_of(x))
        errors.append((quantizer(x) - x).square().mean())
    assert errors[1] < 0.6 * errors[0]


def test_one_group_is_per_tensor_and_d_groups_are_per_dimension():
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0)) * torch.logspace(-1, 1, 8)
    assert torch.equal(fit(grouped(1), seen_of(x))(x), fit(STATIC, seen_of(x))(x))
    each = torch.cat([fit(STATIC, seen_of(c))(c) for c in x.split(1, -1)], -1)
    assert torch.equal(fit(grouped(8), seen_of(x))(x), each)


def test_sorted_groups_lose_less_to_outlier_dimensions_than_natural_ones():
    """Two of 64 dimensions are 50 times wider, in different quarters: K = 4 leaves the error of half of the
    groups, or with them in one group of a quarter.
    """
    x = torch.randn(2048, 64, generator=torch.Generator().manual_seed(0))
    x[:, [5, 40]] *= 50
    x[0, [5, 40]], x[1, [5, 40]] = 200, -200  # equal ranges
    seen, natural = seen_of(x), torch.arange(64)
    # The wide dimensions themselves err the same under all three.
    narrow = [i for i in range(64) if i not in (5, 40)]

    def error(quantizer):
        return (quantizer(x) - x)[:, narrow].square().sum().item()

    whole = error(fit(STATIC, seen))
    assert error(fit(grouped(4), seen, natural)) / whole == pytest.approx(30 / 62, rel=0.02)
    assert error(fit(grouped(4), seen)) / whole == pytest.approx(14 / 62, rel=0.02)


def test_quantizing_sorted_columns_is_sorting_quantized_ones():
    x = torch.randn(32, 12, generator=torch.Generator().manual_seed(0))
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    quantizer = fit(grouped(3), seen_of(x), order)
    straight = fit(grouped(3), seen_of(x[:, order]), torch.arange(12))
    assert torch.equal(quantizer(x)[:, order], straight(x[:, order]))


def test_a_linear_after_groups_is_a_sum_of_integer_products():
    """sum over groups k of s_k s_w W_k (q_k - z_k): what integer hardware computes."""
    draw = torch.Generator().manual_seed(0)
    x, w = torch.randn(16, 24, generator=draw), torch.randn(5, 24, generator=draw)
    codes_w = Format(grid=Int(8), scale=FP32, block=PerTensor()).quantize(w)
    quantizer = fit(grouped(3), seen_of(x), torch.arange(24))
    q = quantizer.activation.format.encode(x, quantizer.params)
    total = torch.zeros(16, 5, dtype=torch.float64)
    for k in range(3):
        part = slice(8 * k, 8 * k + 8)
        centred = q.codes[:, part].long() - q.zero[8 * k].long()
        total += (
            q.scale[8 * k].double() * codes_w.scale.double() * (centred @ codes_w.codes[:, part].long().T)
        )
    expected = quantizer(x).double() @ codes_w.dequantize().double().T
    torch.testing.assert_close(total, expected, rtol=1e-6, atol=1e-6)


def test_what_cannot_be_is_refused_in_a_sentence(model, x):
    with pytest.raises(InputError, match=r"no module 'nrm'.*did you mean 'norm'"):
        place(model, {Site("nrm"): Quantizer(Activation(format=AFFINE))})
    with pytest.raises(InputError, match=r"unused:output was not reached"):
        observe(model, [Site("unused")], [{"x": x}])
    with pytest.raises(InputError, match=r"one row per token"):
        observe(model, [Site("f")], [{"x": x, "attention_mask": torch.ones(4, 5)}])
    with pytest.raises(InputError, match=r"without tokens"):
        observe(model, [Site("f")], [{"x": x, "attention_mask": torch.zeros(4, 6)}])
    with pytest.raises(InputError, match=r"no module 'g'"):
        observe(model, [Site("f"), Site("g")], [{"x": x}])
    with pytest.raises(InputError, match=r"0 batches"):
        observe(model, [Site("f")], [])
    with pytest.raises(InputError, match=r"needs stored steps"):
        Quantizer(STATIC)
    with pytest.raises(InputError, match=r"5 groups do not divide 16 .* choose from \[2, 4, 8, 16\]"):
        fit(grouped(5), seen_of(x.reshape(-1, 16)))
    assert not model.f._forward_hooks, "a refused calibration leaves its hooks behind"
