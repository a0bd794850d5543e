"""LowLinear as users meet it: claims of papers, what is kept and computed, layers by name, resuming."""

import itertools
from dataclasses import replace

import pytest
import torch
from tiny import tiny, tiny_ids
from torch import nn

from fewbit.errors import InputError
from fewbit.format import FP32, Block2d, Channel, Format, Group, MinMax, PerTensor, Zero, format_by_name
from fewbit.grid import by_name
from fewbit.train import (
    PRODUCTS,
    Keep,
    LowLinear,
    Product,
    Products,
    blockwise,
    delayed,
    lower,
    mxfp4,
    mxfp6,
    mxfp8,
    nvfp4,
    restore,
    rowwise,
    switchback,
    switchback_memory,
    switchback_rows,
    tensorwise,
)
from fewbit.train import lowlinear as module
from fewbit.train.products import cast, product, turned


def rows(grid="int8-narrow", block=Channel()):
    return Format(grid=by_name(grid), block=block, scale=FP32)


def error(got, want):
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def low(how, k=64, n=32, bias=False):
    torch.manual_seed(0)
    return LowLinear(nn.Linear(k, n, bias=bias), how)


# -- SwitchBack's claims


def test_switchback_has_the_weight_gradient_of_the_wide_layer():
    """The same bits, in float32 and under autocast; and the bias sums over all tokens."""
    for autocast in (False, True):
        layer, x, g = low(switchback(), bias=True), noise(2, 24, 64), noise(2, 24, 32, seed=1)
        wide = nn.Linear(64, 32)
        wide.load_state_dict(layer.state_dict())
        for one in (layer, wide):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                y = one(x)
            y.backward(g.to(y.dtype))
        assert torch.equal(layer.weight.grad, wide.weight.grad)
        assert torch.equal(layer.bias.grad, wide.bias.grad)


def test_a_large_token_leaves_the_others_alone_by_rows_and_drowns_them_by_tensor():
    x = noise(32, 64)
    large = x.clone()
    large[3] *= 1000
    others = torch.arange(32) != 3
    layer = low(switchback())
    assert torch.equal(layer(large)[others], layer(x)[others])
    whole = low(tensorwise(grid="int8-narrow", gradient="int8-narrow"))
    assert not whole(large)[others].any()


def test_fp8_has_range_for_a_thousand_and_needs_rows_for_a_million():
    x, others = noise(32, 64), torch.arange(32) != 3
    for factor, most in ((1e3, 0.04), (1e6, 1.1)):
        large = x.clone()
        large[3] *= factor
        found = {}
        for name in ("tensorwise", "rowwise"):
            layer = low(PRODUCTS[name]())
            want = (x @ layer.weight.t())[others]
            found[name] = error(layer(large)[others], want)
        assert found["rowwise"] < 0.04
        assert found["tensorwise"] < most
        assert factor < 1e6 or found["tensorwise"] > 0.9


def test_steps_of_a_weights_rows_do_not_serve_its_columns():
    """SwitchBackQ quantizes W again for the input gradient; codes with the forward's steps would differ."""
    layer, g = low(switchback_rows()), noise(48, 32)
    with torch.no_grad():
        layer.weight[0] *= 30
    x = noise(48, 64).requires_grad_()
    layer(x).backward(g)
    w = layer.weight.detach()
    columns = (w / (w.abs().amax(0) / 127)).round() * (w.abs().amax(0) / 127)
    once = (w / (w.abs().amax(1, keepdim=True) / 127)).round() * (w.abs().amax(1, keepdim=True) / 127)
    step = g.abs().amax(1, keepdim=True) / 127
    g = (g / step).round() * step
    assert error(x.grad, g @ columns) < 1e-5
    assert error(x.grad, g @ once) > 1e-3


def test_noise_of_a_sum_over_tokens_grows_with_their_root():
    """Why the weight gradient stays wide: int8 rows, the error of G^T x over 64 and 1024 tokens."""
    how = Product(left=rows(), right=rows())
    found = []
    for tokens in (64, 1024, 16384):
        g, x = noise(32, tokens), noise(64, tokens, seed=1)
        found.append((product(g, x, how).double() - g.double() @ x.double().t()).norm().item())
    assert all(3 < b / a < 6 for a, b in itertools.pairwise(found)), found


# -- blocks, Hadamard maps, stochastic rounding


def test_tiles_of_a_weight_are_the_same_numbers_for_both_products_and_lines_are_not():
    w = noise(64, 96)
    tile, line = format_by_name("nvfp4"), format_by_name("nvfp4")
    tile = replace(tile, block=Block2d(16, 16))
    for fmt, same in ((tile, True), (line, False)):
        how = Product(left=fmt, right=fmt).casts[1]
        a, b = cast(w, how).dequantize(), cast(w.t(), how).dequantize().t()
        assert torch.equal(a, b) == same
        assert how.turns(how) == same
    how = Product(left=tile, right=tile).casts[1]
    assert torch.equal(turned(cast(w, how)).dequantize(), cast(w, how).dequantize().t())


def test_codes_of_forward_with_steps_along_the_wrong_axis_are_not_reused():
    """MXFP6: the weight as the forward sees it would give another input gradient.

    E4M3 hides it: a power of 2 more or less in the step changes no number within its 18 binades.
    """
    layer = low(mxfp6(), 64, 64)
    with torch.no_grad():
        layer.weight.mul_(torch.logspace(-3, 3, 64)[:, None])
    x, g = noise(32, 64).requires_grad_(), noise(32, 64, seed=1)
    layer(x).backward(g)
    left, right = layer.products.input_gradient.casts
    g = cast(g, left).dequantize()
    w = layer.weight.detach()
    assert error(x.grad, g @ cast(w.t(), right).dequantize().t()) < 1e-6
    assert error(x.grad, g @ cast(w, right).dequantize()) > 1e-3


def test_a_hadamard_map_cancels_in_the_product_and_tames_outlying_tokens():
    fine = rows("fp32", Group(16))
    a, b = noise(32, 64), noise(48, 64, seed=1)
    assert (
        error(product(a, b, Product(left=fine, right=fine, hadamard=16)), a.double() @ b.double().t()) < 1e-6
    )
    g, x = noise(32, 1024), noise(48, 1024, seed=1)  # gradients and inputs, tokens last
    x[:, ::64] *= 10
    coarse = mxfp4().forward.left
    plain, mapped = (Product(left=coarse, right=coarse, hadamard=size) for size in (0, 32))
    want = g.double() @ x.double().t()
    assert error(product(g, x, mapped), want) < 0.8 * error(product(g, x, plain), want)


def test_stochastic_rounding_is_unbiased_without_clipping():
    """The mean weight gradient of n draws of MXFP4 nears the true one as 1 / sqrt(n); nearest does not."""
    g, x = noise(32, 64), noise(48, 64, seed=1)
    want = g.double() @ x.double().t()
    how = mxfp4().weight_gradient
    torch.manual_seed(0)
    draws = torch.stack([product(g, x, how) for _ in range(256)]).double()
    one, few, many = error(draws[0], want), error(draws[:16].mean(0), want), error(draws.mean(0), want)
    assert 3 < one / few < 5.5
    assert 3 < few / many < 5.5
    assert error(product(g, x, replace(how, stochastic=(False, False))), want) > 3 * many


@pytest.mark.parametrize("how", [mxfp4(), nvfp4(), delayed(history=3)], ids=["mxfp4", "nvfp4", "delayed"])
def test_a_run_that_is_resumed_has_the_same_bits(how, tmp_path):
    def start():
        torch.manual_seed(0)
        model = lower(nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 32)), how)
        return model, torch.optim.AdamW(model.parameters(), lr=1e-2)

    def go(model, optimizer, steps):
        from fewbit.train import advance

        for step in steps:
            model(noise(16, 32, seed=step)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            if how.history:
                advance(model)

    model, optimizer = start()
    go(model, optimizer, range(6))
    other, own = start()
    go(other, own, range(3))
    state = {"model": other.state_dict(), "optimizer": own.state_dict(), "rng": torch.get_rng_state()}
    torch.save(state, tmp_path / "state.pt")
    resumed, own = start()
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed.load_state_dict(state["model"])
    own.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["rng"])
    go(resumed, own, range(3, 6))
    for a, b in zip(model.state_dict().values(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b)


# -- what is kept and what is computed


def kept(layer, x):
    sizes = []

    def pack(t):
        sizes.append(t.numel() * t.element_size())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(x)
    return sum(sizes)


def test_codes_take_a_byte_where_wide_inputs_take_theirs():
    x, weight = noise(48, 64).requires_grad_(), 32 * 64
    assert kept(low(switchback()), x) == 4 * x.numel() + 4 * weight  # the weight is the Parameter itself
    steps = 4 * 48 + 4
    assert kept(low(switchback_memory()), x) == x.numel() + weight + steps
    tiles = low(blockwise(keep=Keep.CODES, size=32))
    assert kept(tiles, x) == x.numel() + weight + 4 * (48 * 2 + 2)
    assert kept(low(replace(rowwise(), keep=Keep.CODES)), x) == x.numel() + 4 * 48 + 4 * weight


def test_codes_that_are_kept_are_quantized_again_along_the_tokens():
    how = replace(rowwise(), keep=Keep.CODES)
    layer, x, g = low(how), noise(48, 64), noise(48, 32, seed=1)
    layer(x).backward(g)
    seen = cast(x, how.forward.casts[0]).dequantize()
    left, right = how.weight_gradient.casts
    want = cast(g.t(), left).dequantize() @ cast(seen.t(), right).dequantize().t()
    assert error(layer.weight.grad, want) < 1e-6


@pytest.mark.parametrize("how", [tensorwise(), blockwise(), switchback_memory(), delayed()])
def test_frozen_sides_cost_nothing(how, monkeypatch):
    layer, x, g = low(how), noise(48, 64), noise(48, 32, seed=1)
    full = x.clone().requires_grad_()
    layer(full).backward(g)
    calls = []
    real = module.multiply
    monkeypatch.setattr(module, "multiply", lambda *a: calls.append(1) or real(*a))
    layer(x).backward(g)  # no gradient of x
    assert len(calls) == 2
    assert torch.equal(layer.weight.grad / 2, layer.weight.grad - layer.weight.grad / 2)
    layer.weight.requires_grad_(False)
    layer.weight.grad = None
    part = x.clone().requires_grad_()
    layer(part).backward(g)
    assert len(calls) == 4
    assert torch.equal(part.grad, full.grad)
    assert layer.weight.grad is None
    assert kept(layer, part) <= 4 * layer.weight.numel() + 16  # and x is not held


def test_a_second_derivative_is_refused():
    x = noise(16, 64).requires_grad_()
    (dx,) = torch.autograd.grad(low(tensorwise())(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_inputs_of_another_width_are_refused():
    with pytest.raises(InputError, match=r"a layer of 64 inputs got torch.float32 of shape \[2, 128\]"):
        low(tensorwise())(noise(2, 128))
    with pytest.raises(InputError, match=r"got torch\.int64"):
        low(tensorwise())(torch.zeros(2, 64, dtype=torch.int64))


# -- what is refused when it is described


BAD = {
    "give both a format, or neither": lambda: Product(left=rows()),
    "a wide product has no": lambda: Product(hadamard=16),
    "map of 24": lambda: Product(left=rows(), right=rows(), hadamard=24),
    "E5M2 by E5M2": lambda: Product(left=rows("e5m2"), right=rows("e5m2")),
    "steps and no zeros": lambda: Product(left=format_by_name("nf4"), right=rows()),
    "no zeros, per": lambda: Product(left=replace(rows("uint8"), zero=Zero.OFFSET), right=rows()),
    "from the largest magnitude, got MinMax": lambda: Product(
        left=replace(rows(), range=MinMax()), right=rows()
    ),
    "codes to keep": lambda: Products(keep=Keep.CODES),
    "history of -1": lambda: Products(history=-1),
    "one step a tensor everywhere": lambda: replace(rowwise(), history=16),
}


@pytest.mark.parametrize("said", BAD)
def test_what_means_nothing_is_refused(said):
    with pytest.raises(InputError, match=said):
        BAD[said]()


# -- models


def test_lower_and_restore_leave_parameters_as_they_are(caplog):
    model = tiny("llama")
    before, ids = dict(model.named_parameters()), tiny_ids()
    logits = model(input_ids=ids).logits
    with caplog.at_level("INFO", "fewbit.train"):
        assert lower(model, tensorwise()) is model
    assert "14 linear layers lowered; left wide: lm_head (matches '*lm_head')" in caplog.text
    assert isinstance(model.model.layers[0].mlp.up_proj, LowLinear)
    assert type(model.lm_head) is nn.Linear
    assert all(p is before[n] for n, p in model.named_parameters())
    assert 0 < error(model(input_ids=ids).logits, logits) < 0.1
    restore(model)
    assert torch.equal(model(input_ids=ids).logits, logits)
    with pytest.raises(InputError, match="nothing to restore"):
        restore(model)


def test_layers_are_chosen_by_pattern_or_by_function():
    how = {"*down_proj": None, "*mlp*": mxfp8(), "*self_attn*": switchback()}
    block = lower(tiny("llama"), how).model.layers[0]
    assert type(block.mlp.down_proj) is nn.Linear
    assert block.mlp.up_proj.products == mxfp8()
    assert block.self_attn.q_proj.products == switchback()
    wide = lower(tiny("llama"), lambda name, layer: tensorwise() if layer.in_features > 64 else None)
    assert isinstance(wide.model.layers[0].mlp.down_proj, LowLinear)
    assert type(wide.model.layers[0].mlp.up_proj) is nn.Linear


def test_nothing_to_lower_is_said_and_the_model_stays():
    model = tiny("llama")
    with pytest.raises(InputError, match=r"no linear layers to lower; those left wide: .*no products for it"):
        lower(model, {"*nothing*": tensorwise()})
    assert not any(isinstance(m, LowLinear) for m in model.modules())


def test_one_layer_is_a_model():
    linear = nn.Linear(32, 16)
    layer = lower(linear, tensorwise())
    assert isinstance(layer, LowLinear)
    assert layer.weight is linear.weight
    assert type(restore(layer)) is nn.Linear


def test_the_blocks_of_a_format_tell_where_products_are_padded():
    how = Product(left=rows("e4m3fn", Group(48)), right=rows("e4m3fn", Block2d(32, 48)))
    assert [c.tile for c in how.casts] == [(16, 48), (32, 48)]
    assert rows("e4m3fn", PerTensor()) == tensorwise().forward.left
