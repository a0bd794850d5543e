"""Products whose backward reads the codes of forward: errors, folding, odd shapes, what is kept."""

import pytest
import torch

from fewbit.errors import InputError
from fewbit.train import LowLinear, lower
from fewbit.train.folded import Folded

WAYS = (Folded(), Folded(by_rows=False), Folded(by_rows=False, gradient=torch.float8_e5m2))


def run(how, x, w, g):
    x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
    y = how.linear(x, w)
    y.backward(g)
    return y.detach(), x.grad, w.grad


def exact(x, w, g):
    x, w, g = x.double(), w.double(), g.double()
    return x @ w.t(), g @ w, g.t() @ x


def error(a, b):
    return ((a.double() - b).norm() / b.norm()).item()


def noise(m, n, k, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=g) for shape in ((m, k), (n, k), (m, n))]


@pytest.mark.parametrize("how", WAYS, ids=str)
def test_errors_are_those_of_fp8(how):
    args = noise(256, 128, 512)
    found = [error(a, b) for a, b in zip(run(how, *args), exact(*args), strict=True)]
    wide = 0.061 if how.gradient == torch.float8_e5m2 else 0.039
    assert 0.03 < found[0] < 0.039, found
    assert 0.03 < min(found[1:]) <= max(found[1:]) < wide, found


def test_folding_is_as_exact_as_rounding_every_copy_by_its_rows():
    """Tokens and channels of very different sizes: no worse than x and W rounded twice, per row."""
    from fewbit.train.scalings import rowwise

    x, w, g = noise(256, 128, 192)
    x = x * torch.logspace(-2, 2, 256)[torch.randperm(256)][:, None]
    w, g = w * torch.logspace(-2, 2, 128)[:, None], g * torch.logspace(1, -1, 256)[:, None]
    layer = LowLinear(torch.nn.Linear(192, 128, bias=False), rowwise())
    layer.weight.data.copy_(w)
    x2 = x.clone().requires_grad_()
    layer(x2).backward(g)
    twice = [error(a, b) for a, b in zip((x2.grad, layer.weight.grad), exact(x, w, g)[1:], strict=True)]
    once = [error(a, b) for a, b in zip(run(Folded(), x, w, g), exact(x, w, g), strict=True)][1:]
    assert all(o < 1.1 * t for o, t in zip(once, twice, strict=True)), (once, twice)


def test_a_step_a_row_keeps_tokens_apart():
    x, w, g = noise(64, 32, 48)
    x[7] *= 1e6
    y = run(Folded(), x, w, g)[0]
    rest = torch.arange(64) != 7
    assert error(y[rest], exact(x, w, g)[0][rest]) < 0.045
    y = run(Folded(by_rows=False), x, w, g)[0]
    assert error(y[rest], exact(x, w, g)[0][rest]) > 0.9


@pytest.mark.parametrize("how", WAYS[:2], ids=str)
@pytest.mark.parametrize("shape", [(1, 16, 16), (33, 20, 7), (3, 1, 1)], ids=str)
def test_odd_sides_and_rows_of_zeros(how, shape):
    x, w, g = noise(*shape)
    x[0], w[-1], g[0] = 0, 0, 0
    for a, b in zip(run(how, x, w, g), exact(x, w, g), strict=True):
        assert a.shape == b.shape
        assert a.isfinite().all()
        assert b.norm() == 0 or error(a, b) < 0.13


@pytest.mark.parametrize("factor", [1e-8, 1e4])
def test_small_and_large_gradients_survive(factor):
    x, w, g = noise(64, 32, 48)
    for a, b in zip(run(Folded(), x, w, g * factor), exact(x, w, g * factor), strict=True):
        assert error(a, b) < 0.045


def test_nan_stays_nan():
    x, w, g = noise(32, 16, 16)
    g[3, 2] = torch.inf
    _, dx, dw = run(Folded(), x, w, g)
    assert dx[3].isnan().all()
    assert dw[2].isnan().all()
    assert dx[4].isfinite().all()


def test_what_waits_for_backward_is_a_byte_an_element():
    x, w, _ = noise(256, 128, 512)
    x, w, kept = x.requires_grad_(), w.requires_grad_(), []

    def pack(t):
        kept.append(t.numel() * t.element_size())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        Folded().linear(x, w)
    assert sum(kept) == x.numel() + w.numel() + 4 * (256 + 128)  # codes, and float32 steps of rows


def test_layers_of_a_model_and_one_graph():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(32, 48), torch.nn.ReLU(), torch.nn.Linear(48, 16))
    x = torch.randn(4, 5, 32)
    reference = model(x)
    lower(model, Folded())
    assert all(type(m) is LowLinear for m in (model[0], model[2]))
    y = model(x)
    assert error(y, reference.double()) < 0.06
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), y)


def test_no_other_grid_for_gradients():
    with pytest.raises(InputError, match="float16 have no FP8 product"):
        Folded(gradient=torch.float16)
