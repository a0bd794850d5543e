"""Incoherence: what is kept in another basis is the same function, and nothing stands out in it."""

import pytest
import torch

from fewbit.errors import InputError
from fewbit.format import Stats
from fewbit.transform import Incoherence, Spread

QUIP = Incoherence(spread=Spread.KRONECKER)
G = torch.Generator().manual_seed(0)


@pytest.mark.parametrize("basis", [Incoherence(), Incoherence(output=False), Incoherence(block=24), QUIP])
@pytest.mark.parametrize("shape", [(48, 72), (20, 96), (7, 48)])
def test_a_weight_comes_back_and_its_layer_computes_what_it_did(basis, shape):
    w, x = torch.randn(shape, generator=G), torch.randn(5, shape[1], generator=G)
    inside = basis.enter(w)
    torch.testing.assert_close(basis.leave(inside), w, rtol=1e-5, atol=1e-5)
    y = basis.input_map(shape[1]).apply(x) @ inside.T
    rows = basis.output_map(shape[0])
    y = y if rows is None else rows.invert(y)
    torch.testing.assert_close(y, x @ w.T, rtol=1e-4, atol=1e-4)


def test_the_error_of_the_output_is_the_same_in_both():
    """tr(E H E^T) does not depend on the basis (QuIP, section 4.1)."""
    w, e = torch.randn(48, 72, generator=G), torch.randn(48, 72, generator=G)
    x = torch.randn(300, 72, generator=G) @ torch.randn(72, 72, generator=G)
    h, basis = x.T @ x / 300, Incoherence()
    inside = Stats(gram=h).mapped(basis.input_map(72).apply).gram
    d = basis.enter(w + e) - basis.enter(w)
    torch.testing.assert_close((d @ inside * d).sum(), (e @ h * e).sum(), rtol=1e-4, atol=0)


def test_one_large_weight_is_spread_over_the_matrix():
    w = torch.randn(192, 576, generator=G)
    w[3, 100] = 1000
    rms = w.square().mean().sqrt()
    assert w.abs().max() / rms > 250
    assert Incoherence().enter(w).abs().max() / rms < 10


def test_blocks_that_do_not_tile_are_refused():
    with pytest.raises(InputError, match="576 columns, which blocks of 1024 do not tile"):
        Incoherence(block=1024).check((64, 576), "layer q")
    with pytest.raises(InputError, match="2 or more"):
        Incoherence(block=1)
