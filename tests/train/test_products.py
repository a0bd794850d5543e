"""What papers claim of low-precision products: SwitchBack, blocks, Hadamard maps, stochastic rounding."""

import itertools
from dataclasses import replace

import torch
from torch import nn

from fewbit.format import FP32, Block2d, Channel, Format, Group, format_by_name
from fewbit.grid import by_name
from fewbit.train import (
    PRODUCTS,
    LowLinear,
    Product,
    mxfp4,
    mxfp6,
    switchback,
    switchback_rows,
    tensorwise,
)
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
