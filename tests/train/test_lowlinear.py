"""LowLinear as users meet it: what is kept and computed, layers by name, refusals, resuming."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import tiny, tiny_ids
from torch import nn

from fewbit.errors import InputError
from fewbit.format import FP32, Block2d, Channel, Format, Group, MinMax, PerTensor, Zero, format_by_name
from fewbit.grid import by_name
from fewbit.train import (
    Keep,
    LowLinear,
    Product,
    Products,
    blockwise,
    delayed,
    lower,
    mxfp4,
    mxfp8,
    nvfp4,
    restore,
    rowwise,
    switchback,
    switchback_memory,
    tensorwise,
)
from fewbit.train import lowlinear as module
from fewbit.train.products import cast


def rows(grid="int8-narrow", block=Channel()):
    return Format(grid=by_name(grid), block=block, scale=FP32)


def error(got, want):
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def low(how, k=64, n=32, bias=False):
    torch.manual_seed(0)
    return LowLinear(nn.Linear(k, n, bias=bias), how)


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


def test_the_loop_of_the_page_trains(folders):
    page = Path(__file__).parents[2] / "docs" / "fp8-training.md"
    (code,) = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    assert '"smollm2"' in code
    names = {}
    exec(compile(code.replace('"smollm2"', repr(str(folders / "llama"))), str(page), "exec"), names)
    assert names["loss"].isfinite()
    assert type(names["model"].model.layers[0].mlp.up_proj) is nn.Linear
