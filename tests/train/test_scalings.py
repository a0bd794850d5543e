"""Every recipe of low-precision training against its formulas, and what all of them must survive."""

import formulas
import pytest
import torch
from tiny import tiny, tiny_ids
from torch import nn
from torch.utils.checkpoint import checkpoint

from fewbit.train import PRODUCTS, LowLinear, lower

STOCHASTIC = ("mxfp4", "nvfp4")
# relative error on normal data: y, dx, dw
ERRORS = {
    "wide": (1e-6, 1e-6, 1e-6),
    "tensorwise": (0.039, 0.061, 0.061),
    "delayed": (0.039, 0.061, 0.061),
    "folded-tensorwise": (0.039, 0.061, 0.061),
    "mxfp6": (0.042, 0.063, 0.063),
    "mxfp4": (0.17, 0.22, 0.28),
    "nvfp4": (0.15, 0.2, 0.2),
    "switchback": (0.014, 0.014, 1e-6),
    "switchback-memory": (0.014, 0.014, 0.01),
    "switchback-rows": (0.014, 0.014, 1e-6),
    "rowwise-wide-weight-gradient": (0.039, 0.039, 1e-6),
}
named = pytest.mark.parametrize("name", PRODUCTS)


def layer(name, k=80, n=48, *, bias=False, seed=0):
    torch.manual_seed(seed)
    return LowLinear(nn.Linear(k, n, bias=bias), PRODUCTS[name]())


def run(low, x, g):
    """y, dx, dw of tokens x and gradients g, in any shape."""
    x = x.clone().requires_grad_()
    low.weight.grad = None
    y = low(x)
    y.backward(g)
    return y.detach(), x.grad, low.weight.grad


def error(got, want):
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def data(m=48, k=80, n=48, seed=1):
    torch.manual_seed(seed)
    return torch.randn(m, k), torch.randn(m, n)


def test_every_recipe_has_its_formula():
    assert set(PRODUCTS) == set(formulas.REFERENCES)


@named
def test_products_are_those_of_the_formula(name):
    """Sides that blocks of 32 and 128 do not divide, tokens in three dimensions."""
    low, (x, g) = layer(name), data()
    y, dx, dw = run(low, x.view(2, 24, 80), g.view(2, 24, 48))
    assert y.shape == (2, 24, 48)
    assert dx.shape == (2, 24, 80)
    want = formulas.REFERENCES[name](x, low.weight.detach(), g)
    assert error(y.view(48, 48), want[0]) < 2e-6
    if name not in STOCHASTIC:
        assert error(dx.view(48, 80), want[1]) < 2e-6
        assert error(dw, want[2]) < 2e-6


@named
def test_errors_on_normal_data(name):
    x, g = data(256, 512, 256)
    low = layer(name, 512, 256)
    with torch.no_grad():
        low.weight.normal_()
    got, want = run(low, x, g), formulas.wide(x, low.weight.detach(), g)
    for found, true, most in zip(got, want, ERRORS.get(name, (0.039,) * 3), strict=True):
        assert most < 1e-5 or error(found, true) > most / 4
        assert error(found, true) < most


@named
@pytest.mark.parametrize("factor", [1e-8, 1e4])
def test_small_and_large_gradients_survive(name, factor):
    low, (x, g) = layer(name), data()
    _, *want = formulas.wide(x, low.weight.detach(), g * factor)
    for found, true in zip(run(low, x, g * factor)[1:], want, strict=True):
        assert error(found, true) < 0.3


@named
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_never_becomes_finite(name, bad):
    low, (x, g) = layer(name), data()
    x[5, 7] = bad
    y, _, dw = run(low, x, g)
    assert not y[5].isfinite().any()
    assert not dw[:, 7].isfinite().any()
    x, g = data()
    g[5, 7] = bad
    _, dx, dw = run(low, x, g)
    assert not dx[5].isfinite().any()
    assert not dw[7].isfinite().any()
    x, g = data()
    with torch.no_grad():
        low.weight[3, 2] = bad
    y, dx, _ = run(low, x, g)
    assert not y[:, 3].isfinite().any()
    assert not dx[:, 2].isfinite().any()


@named
@pytest.mark.parametrize("tokens", [0, 1, 3])
def test_few_tokens_and_zeros(name, tokens):
    low = layer(name, bias=True)
    y, dx, dw = run(low, torch.zeros(tokens, 80), torch.zeros(tokens, 48))
    assert torch.equal(y, low.bias.detach().expand(tokens, 48))
    assert dx.shape == (tokens, 80)
    assert not dx.any()
    assert not dw.any()
    x, g = data(tokens)
    with torch.no_grad():
        low.weight.zero_()
    y, dx, dw = run(low, x, g)
    assert torch.equal(y, low.bias.detach().expand(tokens, 48))
    assert not dx.any()
    assert dw.isfinite().all()
    assert dw.any() == (tokens > 0)


@named
def test_tokens_that_are_zero_change_no_other(name):
    """Padding: with zero tokens behind the others, results of the others stay as they are."""
    low, (x, g) = layer(name), data()
    zero = x.new_zeros(16, 80), g.new_zeros(16, 48)
    torch.manual_seed(0)
    y, dx, dw = run(low, x, g)
    torch.manual_seed(0)
    more = run(low, torch.cat([x, zero[0]]), torch.cat([g, zero[1]]))
    assert torch.equal(more[0][:48], y)
    assert not more[0][48:].any()
    if name not in STOCHASTIC:  # draws of noise differ
        assert torch.allclose(more[1][:48], dx, rtol=1e-5, atol=1e-6)
        assert torch.allclose(more[2], dw, rtol=1e-5, atol=1e-5)


@named
def test_recomputed_forwards_give_the_same_bits(name):
    low, (x, g) = layer(name), data()
    torch.manual_seed(7)
    plain = run(low, x, g)
    low = layer(name)
    torch.manual_seed(7)
    x = x.requires_grad_()
    y = checkpoint(low, x, use_reentrant=False)
    y.backward(g)
    assert all(torch.equal(a, b) for a, b in zip(plain, (y, x.grad, low.weight.grad), strict=True))


@named
def test_micro_batches_add_up(name):
    low, (x, g) = layer(name), data()
    torch.manual_seed(7)
    parts = [run(low, x[i : i + 16], g[i : i + 16])[2] for i in (0, 16, 32)]
    torch.manual_seed(7)
    low.weight.grad = None
    for i in (0, 16, 32):
        low(x[i : i + 16].requires_grad_()).backward(g[i : i + 16])
    assert torch.equal(low.weight.grad, sum(parts))


@named
def test_autocast_and_16_bits(name):
    low, (x, g) = layer(name, bias=True), data()
    with torch.autocast("cpu", torch.bfloat16):
        y, dx, dw = run(low, x, g.bfloat16())
    assert (y.dtype, dx.dtype, dw.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    want = formulas.wide(x, low.weight.detach(), g)
    most = ERRORS.get(name, (0.039,) * 3)
    bias = low.bias.detach()
    for found, true, e in zip((y - bias, dx, dw), want, most, strict=True):
        assert error(found, true) < 1.2 * e + 0.01
    low = low.bfloat16()
    y, dx, dw = run(low, x.bfloat16(), g.bfloat16())
    assert {y.dtype, dx.dtype, dw.dtype} == {torch.bfloat16}
    for found, true, e in zip((y - bias, dx, dw), want, most, strict=True):
        assert error(found, true) < 1.2 * e + 0.01


def test_double_precision_stays_double():
    low, (x, g) = layer("tensorwise").double(), data()
    y, dx, dw = run(low, x.double(), g.double())
    assert {y.dtype, dx.dtype, dw.dtype} == {torch.float64}
    assert error(y, x.double() @ low.weight.detach().t()) < 0.04


def test_a_model_compiles_to_one_graph():
    """One recipe of each kind in a row; those without noise with the same bits forward and backward."""
    for names in (("rowwise", "delayed", "switchback-memory"), ("mxfp4",)):
        torch.manual_seed(0)
        model = nn.Sequential(*[LowLinear(nn.Linear(48, 48), PRODUCTS[n]()) for n in names])
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        found = []
        for way in (model, compiled):
            model.zero_grad()
            x = data(16, 48)[0].requires_grad_()
            y = way(x)
            y.square().sum().backward()
            found.append((y.detach(), x.grad, *(p.grad.clone() for p in model.parameters())))
        if names == ("mxfp4",):
            assert torch.equal(found[0][0], found[1][0])
            assert all(error(b, a) < 0.8 for a, b in zip(*found, strict=True))
        else:
            assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def train(name, steps=6):
    """Losses of a tiny language model that learns one batch."""
    model = tiny("llama").train()
    if name is not None:
        lower(model, PRODUCTS[name]())
    torch.manual_seed(3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(steps):
        ids = tiny_ids(2, 24)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.fixture(scope="module")
def wide_losses():
    return train(None)


@named
def test_a_tiny_language_model_learns_as_in_float(name, wide_losses):
    losses = train(name)
    within = 0.1 if name in STOCHASTIC else 0.02
    assert losses[-1] < losses[0] - 0.5
    assert abs(losses[-1] / wide_losses[-1] - 1) < within, (losses, wide_losses)
