"""What each recipe of low-precision training loses in one layer, and what it keeps for backward.

    OMP_NUM_THREADS=1 python benchmarks/product_errors.py > benchmarks/results/product_errors.md

A layer of 512 inputs and 256 outputs, 1024 tokens, all normal, seed 0. Relative errors (Frobenius norms)
against float64 of y = x W^T, dx = G W and dW = G^T x. "Outlying tokens": 8 tokens of x are a million times
as large, and the error is that of y over the others. "Kept": bytes an element of x that wait for backward,
from a bfloat16 input, without the weight.
"""

import torch
from torch import nn

from fewbit.train import PRODUCTS, LowLinear


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Relative, in float64."""
    return ((got.double() - want).norm() / want.norm()).item()


def kept(low: LowLinear, x: torch.Tensor) -> float:
    """Bytes held between forward and backward, for each element of x."""
    sizes = []

    def pack(t: torch.Tensor) -> torch.Tensor:
        sizes.append(t.numel() * t.element_size())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        low(x)  # x needs no gradient, so the weight is not held
    return sum(sizes) / x.numel()


def row(name: str) -> str:
    """One line of the table."""
    torch.manual_seed(0)
    x, g, w = torch.randn(1024, 512), torch.randn(1024, 256), torch.randn(256, 512)
    low = LowLinear(nn.Linear(512, 256, bias=False), PRODUCTS[name]())
    with torch.no_grad():
        low.weight.copy_(w)
    rows = x.clone().requires_grad_()
    y = low(rows)
    y.backward(g)
    a, b, c = x.double(), g.double(), w.double()
    found = error(y.detach(), a @ c.t()), error(rows.grad, b @ c), error(low.weight.grad, b.t() @ a)
    large, others = x.clone(), torch.arange(1024) >= 8
    large[:8] *= 1e6
    with torch.no_grad():
        lost = error(low(large)[others], (a @ c.t())[others])
    size = kept(low.bfloat16(), x.bfloat16())
    return f"| {name} | {' | '.join(f'{100 * e:.2f}' for e in (*found, lost))} | {size:.2f} |"


if __name__ == "__main__":
    print("Printed by `OMP_NUM_THREADS=1 python benchmarks/product_errors.py` (see its first lines).\n")
    print("| recipe | y % | dx % | dW % | y %, outlying tokens | kept |")
    print("|---|--:|--:|--:|--:|--:|")
    for name in PRODUCTS:
        print(row(name))
