"""Gram matrix of a layer's inputs, accumulated batch by batch: G += X^T X.

X^T X is symmetric, so half of a general product is wasted. On a CPU the BLAS routine ``ssyrk`` (through
SciPy) computes one triangle only, at a general product's rate. torch offers no such routine. On CUDA a plain
float32 product is used, with TF32 off: ten bits of mantissa in H are not positive definite enough for
Cholesky.
"""

from __future__ import annotations

import torch
from torch import Tensor


def add_gram_eager(gram: Tensor, x: Tensor) -> Tensor:
    """gram [n, n] float32 += x^T x for x [tokens, n]; the reference for every device."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        return gram.addmm_(x.t().float(), x.float())
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def add_gram(gram: Tensor, x: Tensor) -> Tensor:
    """gram [n, n] float32 += x^T x for x [tokens, n], in place; only the UPPER triangle is valid on a CPU.

    Call ``full`` once at the end to fill the other triangle.
    """
    if x.device.type != "cpu":
        return add_gram_eager(gram, x)
    from scipy.linalg.blas import ssyrk

    # Row-major x [tokens, n] is column-major x^T [n, tokens]: BLAS reads it without a copy, and its lower
    # triangle in column-major order is our upper one.
    a = x.float().contiguous().numpy().T
    c = gram.numpy().T
    out = ssyrk(1.0, a, beta=1.0, c=c, trans=0, lower=1, overwrite_c=1)
    if out.base is not c.base and out is not c:
        gram.copy_(torch.from_numpy(out.T))
    return gram


def full(gram: Tensor) -> Tensor:
    """The symmetric matrix whose upper triangle ``gram`` holds; fills the lower one in place and returns
    it.
    """
    n, tile = len(gram), 256
    for i in range(0, n, tile):  # by tiles: one transposed pass over all would miss the cache at every line
        j = min(i + tile, n)
        own = gram[i:j, i:j].triu()
        gram[i:j, i:j] = own + own.triu(1).t()
        gram[j:, i:j] = gram[i:j, j:].t()
    return gram
