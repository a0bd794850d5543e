"""Hadamard maps: orthonormal at every size, equal to their explicit matrix, and they spread outliers."""

import pytest
import torch

from fewbit.errors import InputError
from fewbit.format import FP32, Format, Token
from fewbit.format.codec import from_plain, to_plain
from fewbit.grid import Int
from fewbit.transform import Hadamard, Product, hadamard_matrix
from fewbit.transform.hadamard import _hartley, _paley

# Hidden, head and feed-forward sizes of models people use; 13696 = 2^7 * 107 has no known exact factor here.
SIZES = (
    64, 96, 192, 384, 576, 896, 1152, 1536, 2048, 2304, 3072, 3584, 4096, 4544, 4864, 5120, 8192, 8960, 11008,
    13696, 13824, 14336, 17920, 18944, 25600, 27648, 28672, 29568, 49152, 53248,
)  # fmt: skip
ODD = (1, 2, 3, 5, 9, 27, 45, 107, 130, 225, 578, 999)
PALEY = [n for n in range(1, 301) if _paley(n)[0]]


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def explicit(n: int, seed: int | None = None) -> torch.Tensor:
    """diag(s) H / sqrt(n) as one matrix, from the factors alone."""
    t = torch.ones(1, 1, dtype=torch.float64)
    for f in Hadamard(n).factors:
        t = torch.kron(t, (hadamard_matrix(f) if f % 2 == 0 or f == 1 else _hartley(f)) / f**0.5)
    if seed is not None:
        bits = torch.randint(0, 2, (n,), generator=torch.Generator().manual_seed(seed))
        t = (1 - 2 * bits)[:, None] * t
    return t


@pytest.mark.parametrize("order", [1, 2, 4, 8, 64, 256, 344, 924, *PALEY])
def test_every_order_is_a_hadamard_matrix(order):
    h = hadamard_matrix(order)
    assert h.shape == (order, order)
    assert (h.abs() == 1).all()
    assert torch.equal(h @ h.T, order * torch.eye(order, dtype=h.dtype))


def test_the_orders_that_models_need_are_found():
    assert {12, 20, 24, 28, 36, 44, 52, 60, 68, 76, 84, 100, 108, 140, 148} <= set(PALEY)
    assert len(PALEY) == 44
    assert not set(PALEY) & {92, 116, 156, 172}  # Williamson's: not built


@pytest.mark.parametrize("n", [n for n in (*SIZES, *ODD) if n <= 1536])
def test_fast_equals_the_explicit_orthonormal_matrix(n):
    t = explicit(n, seed=3)
    eye = torch.eye(n, dtype=torch.float64)
    torch.testing.assert_close(t @ t.T, eye, rtol=0, atol=1e-12)
    fast = Hadamard(n, seed=3)
    torch.testing.assert_close(fast.apply(eye), t, rtol=0, atol=1e-12)
    torch.testing.assert_close(fast.invert(eye), t.T, rtol=0, atol=1e-12)
    torch.testing.assert_close(fast.dual(eye), t, rtol=0, atol=1e-12)


@pytest.mark.parametrize("n", [n for n in SIZES if n > 1536])
def test_large_sizes_are_orthonormal_and_flat(n):
    fast, x = Hadamard(n, seed=1), normal(6, n)
    y = fast.apply(x)
    torch.testing.assert_close(fast.invert(y), x, rtol=0, atol=1e-12)
    torch.testing.assert_close(fast.apply(fast.invert(x)), x, rtol=0, atol=1e-12)
    torch.testing.assert_close(y @ y.T, x @ x.T, rtol=1e-12, atol=1e-9)
    one_hot = torch.zeros(3, n, dtype=torch.float64)
    one_hot[torch.arange(3), torch.tensor([0, n // 3, n - 1])] = 1
    rows = fast.apply(one_hot).abs() * n**0.5
    if fast.exact:
        torch.testing.assert_close(rows, torch.ones_like(rows), rtol=0, atol=1e-12)
    else:
        assert rows.max() <= 2**0.5 + 1e-12  # one Hartley factor


def test_only_sizes_with_a_factor_that_has_no_order_are_inexact_and_they_say_so():
    assert [n for n in SIZES if not Hadamard(n).exact] == [13696]
    assert [n for n in ODD if Hadamard(n).exact] == [1, 2]
    assert str(Hadamard(13696)) == (
        "Hadamard 13696 = 107 (Hartley, inexact: spreads outliers up to 1.41x less) x 128"
    )
    assert str(Hadamard(576, seed=7, block=64)) == "Hadamard 576 = 9 blocks of 64, seed 7"
    assert Hadamard(13696, block=128).exact


@pytest.mark.parametrize("heads", [2, 8, 12, 20, 32])
def test_per_head_then_across_heads_is_the_full_transform(heads):
    dh = 64
    x = normal(5, heads * dh)
    inner = Hadamard(heads * dh, block=dh).apply(x)
    outer = Hadamard(heads).apply(inner.unflatten(-1, (heads, dh)), axis=-2).flatten(-2)
    torch.testing.assert_close(outer, x @ torch.kron(explicit(heads), explicit(dh)), rtol=0, atol=1e-12)
    torch.testing.assert_close(outer, Hadamard(heads * dh).apply(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("n", "block"), [(64, 1), (64, 64), (576, 64), (108, 36), (96, 3)])
def test_blocks_are_transformed_apart(n, block):
    x, s = normal(4, n), (explicit(n, 5) / explicit(n))[:, 0]
    want = (x * s).unflatten(-1, (-1, block)) @ explicit(block)
    torch.testing.assert_close(
        Hadamard(n, seed=5, block=block).apply(x), want.flatten(-2), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("n", [576, 1000, 4096, 14336])
def test_tiles_of_rows_and_gradients_give_the_same(n):
    """Long inputs are cut into tiles; with a gradient they are not."""
    t, x = Hadamard(n, seed=2), normal(300, n, dtype=torch.float32)
    y = t.apply(x)
    torch.testing.assert_close(y[-3:], t.apply(x[-3:]), rtol=0, atol=1e-5)
    torch.testing.assert_close(t.invert(y), x, rtol=0, atol=1e-5)
    leaf = x[:200].clone().requires_grad_()
    out = t.apply(leaf)
    torch.testing.assert_close(out, y[:200], rtol=0, atol=1e-5)
    (gradient,) = torch.autograd.grad(out, leaf, y[:200])
    torch.testing.assert_close(gradient, x[:200], rtol=0, atol=1e-5)  # T^T T = I


@pytest.mark.parametrize("n", [576, 4096, 13696])
def test_signs_depend_on_the_seed_alone(n):
    x = normal(2, n, dtype=torch.float32)
    once = Hadamard(n, seed=4).apply(x)
    torch.manual_seed(99)
    assert torch.equal(Hadamard(n, seed=4).apply(x), once)
    with torch.inference_mode():
        assert torch.equal(Hadamard(n, seed=4).apply(x), once)
    assert not torch.allclose(Hadamard(n, seed=5).apply(x), once)
    assert not torch.allclose(Hadamard(n).apply(x), once)


def test_signs_of_a_seed_never_change():
    """Checkpoints keep the seed, not the signs."""
    first = Hadamard(64, seed=0).apply(torch.eye(64))[:10, 0].sign()
    assert first.tolist() == [1, -1, -1, 1, -1, -1, -1, -1, -1, -1]


@pytest.mark.parametrize("n", [576, 1536, 4096, 13696])
def test_planted_outliers_are_spread(n):
    """max/rms falls at least 3x, and the int4 per-token error at least 2x (relative root mean square)."""
    x = normal(64, n, dtype=torch.float32)
    x[:, [3, n // 2, n - 7]] *= 60
    fmt = Format(grid=Int(4), block=Token(), scale=FP32)
    y = Hadamard(n, seed=0).apply(x)

    def peak(a):
        return (a.abs().amax(-1) / a.square().mean(-1).sqrt()).mean()

    def error(a):
        return ((fmt.quantize(a).dequantize() - a).norm() / a.norm()).item()

    assert peak(y) <= peak(x) / 3
    assert error(y) <= error(x) / 2


def test_survives_a_round_trip_through_plain_data():
    both = Product((Hadamard(576, seed=3), Hadamard(576, block=64)))
    assert to_plain(Hadamard(576, seed=3)) == {"type": "Hadamard", "size": 576, "seed": 3}
    again = from_plain(to_plain(both), (Hadamard, Product))
    assert again == both
    assert hash(again) == hash(both)


@pytest.mark.parametrize(
    "wrong", [{"size": 0}, {"size": -4}, {"size": 64, "block": 48}, {"size": 8, "block": 0}]
)
def test_impossible_sizes_are_refused(wrong):
    with pytest.raises(InputError, match="a Hadamard map of size"):
        Hadamard(**wrong)
