"""Cayley SGD: it stays on the manifold, it descends, and each step is the Cayley transform."""

import pytest
import torch

from fewbit.transform import Hadamard
from fewbit.transform.cayley import cayley_step, drift, retract

N = 48


def start(n=N):
    return Hadamard(n, seed=1).apply(torch.eye(n))


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_fifty_steps_along_noise_stay_orthogonal(size):
    r = start()
    for step in range(50):
        r = cayley_step(r, size * normal(N, N, seed=step), 1.5)
    assert drift(r) < 1e-4
    assert (r - start()).abs().max() > 0.01


def test_a_step_is_the_cayley_transform_of_the_skew_part():
    r, g = start().double(), normal(N, N).double()
    a = (r.mT @ g - g.mT @ r) / 2
    for lr in (1e-3, 1.0):
        t = min(lr, 1 / a.abs().sum(0).max().item())
        eye = torch.eye(N).double()
        exact = torch.linalg.solve(eye + t / 2 * a, r @ (eye - t / 2 * a), left=False)
        got = cayley_step(r, g, lr)
        torch.testing.assert_close(got, exact, rtol=0, atol=1e-5)
        assert drift(got) < 1e-5


def test_a_step_sees_only_the_skew_part_of_the_gradient():
    r, g, s = start(), normal(N, N), normal(N, N, seed=1)
    torch.testing.assert_close(cayley_step(r, g + r @ (s + s.mT), 0.01), cayley_step(r, g, 0.01))


def test_a_hidden_rotation_is_found_from_correlated_vectors():
    """min |X R - Y|^2 with Y = X Q: the orthogonal Procrustes problem, whose answer is Q."""
    q = retract(torch.eye(N) + 0.1 * normal(N, N, seed=2))
    x = normal(400, N)
    r, losses = torch.eye(N), []
    for _ in range(200):
        leaf = r.clone().requires_grad_()
        loss = (x @ leaf - x @ q).square().sum() / len(x)
        losses.append(loss.item())
        r = cayley_step(r, torch.autograd.grad(loss, leaf)[0], 0.1)
    assert losses[-1] < 1e-3 * losses[0]
    torch.testing.assert_close(r, q, rtol=0, atol=0.02)


def test_retraction_repairs_and_leaves_what_is_orthogonal():
    r = start()
    torch.testing.assert_close(retract(r), r, rtol=0, atol=1e-6)
    bent = r + 1e-3 * normal(N, N)
    assert drift(bent) > 1e-3
    assert drift(retract(bent)) < 1e-6
    assert (retract(bent) - r).abs().max() < 2e-2
