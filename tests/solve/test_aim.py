"""Weights aimed at the float output: least squares for rounded inputs, then any solver as it is."""

import pytest
import torch

from fewbit.errors import InputError
from fewbit.format import FP32, AbsMax, Channel, Format, Need, Stats, Token
from fewbit.format.activation import Activation
from fewbit.format.codec import from_plain, to_plain
from fewbit.grid import by_name
from fewbit.solve import SOLVERS, Aimed, Hqq, Ldlq, Rtn
from fewbit.solve.aim import aimed

INT4 = by_name("int4")
WEIGHT = Format(grid=INT4, block=Channel(), scale=FP32)
INPUT = Activation(format=Format(grid=INT4, block=Token(), range=AbsMax(), scale=FP32))


def layer(tokens=4000, n=64, out=48, seed=0):
    """A weight, inputs whose energy lies in few directions, and the inputs in 4 bits per token."""
    g = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(n, n, generator=g))[0]
    x = torch.randn(tokens, n, generator=g) * torch.logspace(0, -2, n) @ basis
    return torch.randn(out, n, generator=g), x, INPUT(x)


def stats_of(x, r):
    tokens = len(x)
    return Stats(gram=r.T @ r / tokens, cross=(x - r).T @ r / tokens, tokens=tokens)


def loss(w, q, x, r):
    """Relative squared error of the layer's output."""
    y = x @ w.T
    return float((r @ q.T - y).square().sum() / y.square().sum())


def test_aimed_weights_are_least_squares_for_the_float_output():
    w, x, r = layer()
    s = stats_of(x, r)
    got = aimed(w, s.gram, s.cross, damp=1e-9)
    want = torch.linalg.lstsq(r.double(), (x @ w.T).double()).solution.T
    assert (got - want).norm() < 1e-3 * want.norm()


def test_a_damped_aim_lies_between_the_weights_and_least_squares():
    w, x, r = layer()
    s = stats_of(x, r)
    losses = [loss(w, aimed(w, s.gram, s.cross, damp), x, r) for damp in (1e-9, 0.1, 10.0, 1e9)]
    assert losses == sorted(losses)
    assert losses[-1] == pytest.approx(loss(w, w, x, r), rel=1e-3)
    assert losses[0] < 0.8 * losses[-1]


@pytest.mark.parametrize("solver", [Rtn(), Ldlq(), Hqq()], ids=["rtn", "ldlq", "hqq"])
def test_every_solver_loses_less_on_text_never_seen_when_it_is_aimed(solver):
    w, x, r = layer()
    train, test = slice(0, 3000), slice(3000, None)
    s = stats_of(x[train], r[train])
    plain = solver(w, s, WEIGHT).dequantize()
    better = Aimed(solver=solver, damp=0.01)(w, s, WEIGHT).dequantize()
    assert loss(w, better, x[test], r[test]) < 0.8 * loss(w, plain, x[test], r[test])


def test_inputs_that_are_not_rounded_leave_the_inner_solver_alone():
    w, x, _ = layer()
    s = Stats(gram=x.T @ x / len(x), tokens=len(x))
    assert torch.equal(Aimed()(w, s, WEIGHT).codes, Ldlq()(w, s, WEIGHT).codes)


def test_it_is_plain_data_that_asks_for_what_its_solver_does_and_for_both_products():
    solver = Aimed(solver=Hqq(), damp=0.3)
    assert from_plain(to_plain(solver), SOLVERS) == solver
    assert solver.needs == Hqq().needs | {Need.GRAM, Need.CROSS}


def test_columns_without_any_input_keep_their_weights():
    w, x, r = layer()
    x[:, :8] = r[:, :8] = 0
    s = stats_of(x, r)
    assert torch.equal(aimed(w, s.gram, s.cross, 0.1)[:, :8], w[:, :8])
    zero = torch.zeros_like(s.gram)
    assert torch.equal(aimed(w, zero, zero, 0.1), w)


@pytest.mark.parametrize("damp", [0.0, -1.0, float("inf"), float("nan")])
def test_impossible_damping_is_refused(damp):
    with pytest.raises(InputError, match="must be positive"):
        Aimed(damp=damp)
