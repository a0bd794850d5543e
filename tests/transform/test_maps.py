"""Maps leave x W^T as it was, undo themselves, and work along any axis, in any float dtype."""

import pytest
import torch

from fewbit.errors import InputError
from fewbit.transform import Diagonal, Hadamard, Orthogonal, Permutation, Product, gram

N = 24


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def rotation(*shape, seed=0):
    return torch.linalg.qr(normal(*shape, seed=seed)).Q


def diagonal(n=N, seed=1):
    return Diagonal(normal(n, seed=seed).exp())


def permutation(n=N, seed=2):
    return Permutation(torch.randperm(n, generator=torch.Generator().manual_seed(seed)))


MAPS = {
    "diagonal": diagonal(),
    "negative": Diagonal(-normal(N, seed=1).exp()),
    "permutation": permutation(),
    "orthogonal": Orthogonal(rotation(N, N)),
    "blocks": Orthogonal(rotation(4, 6, 6)),
    "hadamard": Hadamard(N, seed=0),
    "heads": Hadamard(N, block=8),
    "inexact": Hadamard(N, seed=0, block=3),
    "product": Product((diagonal(), permutation(), Hadamard(N, seed=3))),
    "nested": Product((Hadamard(N), Product((Orthogonal(rotation(N, N)), diagonal())))),
}
every = pytest.mark.parametrize("t", MAPS.values(), ids=MAPS.keys())


@every
def test_outputs_of_a_linear_layer_stay(t):
    x, w = normal(7, N, seed=5), normal(10, N, seed=6)
    torch.testing.assert_close(t.apply(x) @ t.dual(w).T, x @ w.T, rtol=0, atol=1e-12)
    assert not torch.allclose(t.apply(x), x)


@every
def test_explicit_matrix_inverse_and_dual(t):
    eye = torch.eye(N, dtype=torch.float64)
    T = t.apply(eye)
    torch.testing.assert_close(t.invert(eye), torch.linalg.inv(T), rtol=0, atol=1e-12)
    torch.testing.assert_close(t.dual(eye), torch.linalg.inv(T).T, rtol=0, atol=1e-12)
    x = normal(3, 5, N)
    torch.testing.assert_close(t.apply(x), x @ T, rtol=0, atol=1e-12)
    torch.testing.assert_close(t.invert(t.apply(x)), x, rtol=0, atol=1e-12)
    torch.testing.assert_close(t.apply(t.invert(x)), x, rtol=0, atol=1e-12)


@every
@pytest.mark.parametrize("axis", [0, 1, 2, -1, -3])
def test_any_axis(t, axis):
    shape = [2, 3, 4]
    shape[axis] = N
    x = normal(*shape)
    want = torch.moveaxis(torch.moveaxis(x, axis, -1) @ t.apply(torch.eye(N).double()), -1, axis)
    got = t.apply(x, axis)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    assert got.is_contiguous()
    torch.testing.assert_close(t.invert(got, axis), x, rtol=0, atol=1e-12)
    assert t.apply(x[:0] if axis not in (0, -3) else x[:, :0], axis).numel() == 0


@every
def test_a_single_row_such_as_a_bias(t):
    x = normal(N)
    torch.testing.assert_close(t.apply(x), t.apply(x[None])[0], rtol=0, atol=1e-12)


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_dtypes_are_rounded_once(t, dtype):
    x = normal(6, N).to(dtype)
    got, want = t.apply(x), t.apply(x.double())
    assert got.dtype == dtype
    # half a unit in the last place, and the noise of float32
    torch.testing.assert_close(got.double(), want, rtol=0.51 * torch.finfo(dtype).eps, atol=1e-5)


@every
def test_gram_of_mapped_activations(t):
    x = normal(50, N)
    y = t.apply(x)
    torch.testing.assert_close(gram(x.T @ x, t), y.T @ y, rtol=1e-12, atol=1e-10)


@every
def test_gradients_flow(t):
    x = normal(2, N).requires_grad_()
    assert torch.autograd.gradcheck(t.apply, (x,))
    assert torch.autograd.gradcheck(t.invert, (x,))


def test_gradients_reach_the_scale_and_the_rotation():
    s, r = normal(N).exp().requires_grad_(), rotation(N, N).requires_grad_()
    both = Product((Diagonal(s), Orthogonal(r)))
    both.apply(normal(4, N)).square().sum().backward()
    assert s.grad.abs().sum() > 0
    assert r.grad.abs().sum() > 0


def test_diagonal_is_smoothquant():
    """x / s and W * s: at alpha 1/2, s = sqrt(ax / aw) makes the maxima of both columns equal."""
    x, w = normal(40, N) * normal(N, seed=3).exp(), normal(16, N, seed=4)
    t = Diagonal((x.abs().amax(0) / w.abs().amax(0)).sqrt())
    torch.testing.assert_close(t.apply(x), x / t.scale)
    torch.testing.assert_close(t.apply(x).abs().amax(0), t.dual(w).abs().amax(0))


def test_permutation_reorders():
    t = Permutation(torch.tensor([2, 0, 1]))
    assert t.apply(torch.tensor([10.0, 11, 12])).tolist() == [12, 10, 11]
    assert t.invert(torch.tensor([12.0, 10, 11])).tolist() == [10, 11, 12]


def test_a_product_acts_first_to_last():
    first, then = diagonal(), permutation()
    x = normal(3, N)
    torch.testing.assert_close(Product((first, then)).apply(x), then.apply(first.apply(x)))
    assert not torch.allclose(Product((then, first)).apply(x), Product((first, then)).apply(x))


def test_equality():
    assert Hadamard(N, seed=0) == Hadamard(N, seed=0) != Hadamard(N)
    same = diagonal()
    assert Product((same, Hadamard(N))) == Product((same, Hadamard(N)))
    assert same != Diagonal(same.scale.clone())  # maps that hold a tensor are equal to themselves alone
    assert len({same, same, diagonal()}) == 2


@every
def test_other_tensors_are_refused(t):
    for wrong, axis in ((torch.ones(3, N + 1), -1), (torch.ones(3, N), 0), (torch.ones(N), 1)):
        with pytest.raises(InputError, match=f"{N} elements along axis {axis}"):
            t.apply(wrong, axis)
    with pytest.raises(InputError, match="int64"):
        t.dual(torch.ones(3, N, dtype=torch.int64))
    with pytest.raises(InputError, match="axis -1"):
        t.invert(torch.tensor(1.0))


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda: Diagonal(torch.tensor([1.0, 0.0])), "1 NaN, Inf or 0"),
        (lambda: Diagonal(torch.tensor([1.0, torch.inf, torch.nan])), "2 NaN, Inf or 0"),
        (lambda: Diagonal(torch.ones(2, 2)), r"shape \[2, 2\]"),
        (lambda: Permutation(torch.tensor([0, 2])), "once each"),
        (lambda: Permutation(torch.tensor([0, 0, 1])), "once each"),
        (lambda: Permutation(torch.tensor([0.5, 1])), "float32"),
        (lambda: Permutation(torch.tensor([[0, 1], [2, 3]])), r"shape \[2, 2\]"),
        (lambda: Orthogonal(torch.ones(3, 4)), r"\[3, 4\]"),
        (lambda: Orthogonal(1.0001 * torch.eye(4)), "1e-5"),
        (lambda: Orthogonal(torch.full((3, 3), torch.nan)), "1e-5"),
        (lambda: Orthogonal(rotation(N, N).bfloat16()), "bfloat16"),
        (lambda: Product(()), "one size"),
        (lambda: Product((Hadamard(8), Hadamard(12))), r"\[8, 12\]"),
    ],
)
def test_impossible_maps_are_refused(build, says):
    with pytest.raises(InputError, match=says):
        build()
