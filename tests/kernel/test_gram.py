"""X^T X: every way of computing it agrees with the eager reference, and with float64."""

import pytest
import torch

from fewbit.kernel.gram import add_gram, add_gram_eager, full

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gram_on_cuda_keeps_float32_accuracy(dtype):
    x = torch.randn(3000, 257, generator=torch.Generator().manual_seed(0)).to(dtype).cuda()
    exact = x.double().t() @ x.double()
    got = full(add_gram(torch.zeros(257, 257, device="cuda"), x))
    assert (got - exact).norm() < 1e-5 * exact.norm()


def test_gram_equals_its_eager_reference_on_odd_shapes():
    g = torch.Generator().manual_seed(0)
    for tokens, n in ((1, 1), (7, 5), (33, 300), (500, 257)):
        fast, eager = torch.zeros(n, n), torch.zeros(n, n)
        for _ in range(2):
            x = torch.randn(tokens, n, generator=g)
            add_gram(fast, x)
            add_gram_eager(eager, x)
        torch.testing.assert_close(full(fast), eager, rtol=1e-5, atol=1e-4)
