"""Kronecker maps: orthogonal for every size, one matrix for a seed, and outliers spread as QuIP says."""

import json
import subprocess
import sys

import pytest
import torch

from fewbit.errors import InputError
from fewbit.format import FP32, Channel, Format
from fewbit.grid import by_name
from fewbit.io.native import Entry, entries_from_config, quantization_config
from fewbit.transform import Hadamard, Kronecker

SIZES = {576: (24, 24), 1536: (32, 48), 192: (12, 16), 49152: (192, 256), 13696: (107, 128), 97: (1, 97)}
PRINT = (
    "import torch; from fewbit.transform import Kronecker; "
    "print(Kronecker(60, 3).apply(torch.arange(60.)).tolist())"
)


@pytest.mark.parametrize("size", SIZES)
def test_it_is_orthogonal_and_inverts_for_every_size(size):
    t = Kronecker(size, seed=1)
    assert t.factors == SIZES[size]
    x = torch.randn(3, size, generator=torch.Generator().manual_seed(0))
    y = t.apply(x)
    assert torch.allclose(y.norm(dim=1), x.norm(dim=1), rtol=1e-5)
    assert torch.allclose(t.invert(y), x, atol=1e-5)
    assert torch.allclose(t.dual(x.double()), t.apply(x.double()), atol=1e-12)
    if size < 2000:
        m = t.apply(torch.eye(size, dtype=torch.float64))
        assert (m @ m.T - torch.eye(size)).abs().max() < 1e-12


def test_it_is_a_permutation_then_a_kronecker_product():
    t = Kronecker(12, seed=5)
    m = t.apply(torch.eye(12, dtype=torch.float64))
    blocks = m.unflatten(1, (3, 4))
    for row in blocks:  # row i of A x B is the outer product of a row of A and a row of B
        assert torch.linalg.matrix_rank(row) == 1
    products = m.square().unflatten(1, (3, 4)).sum(2)  # squares of a row of A, four times each
    assert len(products.round(decimals=9).unique(dim=0)) == 3


def test_a_layer_computes_the_same_behind_it():
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(5, 60, generator=g), torch.randn(7, 60, generator=g)
    t = Kronecker(60, seed=2)
    assert torch.allclose(t.apply(x) @ t.dual(w).T, x @ w.T, atol=1e-4)
    assert torch.allclose(t.apply(x.T, axis=0).T, t.apply(x))


def test_a_seed_means_one_matrix_in_every_process():
    x = torch.arange(60.0)
    assert torch.equal(Kronecker(60, 3).apply(x), Kronecker(60, 3).apply(x))
    assert not torch.allclose(Kronecker(60, 3).apply(x), Kronecker(60, 4).apply(x))
    torch.manual_seed(99)
    done = subprocess.run([sys.executable, "-c", PRINT], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == Kronecker(60, 3).apply(x).tolist()
    first = (0.29957107634764607, 0.8610498168636739, -0.13502410288560726, -0.3880964760660464)
    drawn = Kronecker(4, 0).apply(torch.eye(4, dtype=torch.float64))[0]
    assert drawn.tolist() == pytest.approx(first, abs=1e-12)  # as checkpoints rely on


def test_one_outlier_is_spread_over_all_entries():
    """QuIP's claim. Max over rms of a matrix with one entry of 100 sigma falls from 99 to about 5."""
    w = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))
    left = {}
    for outlier in (100, 1000):
        w[300, 500] = outlier
        for make in (Kronecker, Hadamard):
            t, u = make(1024, 1), make(1024, 2)
            r = t.apply(u.apply(w, axis=0), axis=1)
            left[make, outlier] = (r.abs().max() / r.square().mean().sqrt()).item()
    assert left[Kronecker, 100] < 7
    assert left[Hadamard, 100] < 6
    assert left[Hadamard, 1000] < 6 < left[Kronecker, 1000] < 30


def test_it_is_written_beside_a_checkpoint():
    fmt = Format(grid=by_name("int4"), block=Channel(), scale=FP32)
    entry = Entry(format=fmt, shape=(4, 12), online=Kronecker(12, seed=7))
    assert entries_from_config(quantization_config({"x": entry}))["x"] == entry
    with pytest.raises(InputError, match="size 0"):
        Kronecker(0)
    assert str(Kronecker(1536)) == "Kronecker 1536 = 32 x 48, seed 0"
