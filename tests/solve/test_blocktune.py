"""Tuning what is still float: on a stack of two linears, with no loop around it."""

import torch
from torch import nn

from fewbit.solve.blocktune import BlockTuning, held_error, tune_rest
from fewbit.solve.calls import Calls

TUNING = BlockTuning(steps=60, lr=0.02, batch=1, held=0.25, looks=3)


class Pair(nn.Module):
    """Two linears and a gain; ``idle`` is never called."""

    def __init__(self):
        super().__init__()
        self.up, self.down, self.idle = nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(4, 4)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


def made():
    """The pair with its first weight rounded coarsely, and its calls with the float outputs."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pair, xs = Pair(), [torch.randn(1, 64, 16) for _ in range(12)]
    with torch.no_grad():
        targets = [pair(x) for x in xs]
        pair.up.weight.copy_((pair.up.weight * 6).round() / 6)
    calls = [((x,), {}) for x in xs]
    return pair, Calls(pair, {}, calls[:9], targets[:9]), Calls(pair, {}, calls[9:], targets[9:])


def test_the_second_linear_makes_up_for_the_first():
    pair, train, held = made()
    before = {n: p.detach().clone() for n, p in pair.named_parameters()}
    leaves = {n: p for n, p in pair.named_parameters() if n != "up.weight"}
    found = tune_rest(train, held, leaves, TUNING, {"up.bias": torch.bfloat16})
    assert found.error < 0.8 * found.start
    assert found.start == held_error(held, {})
    assert found.error == held_error(held, found.values)
    assert found.values["up.bias"].equal(found.values["up.bias"].bfloat16().float())
    assert all(p.equal(before[n]) for n, p in pair.named_parameters())
    again = tune_rest(train, held, leaves, TUNING, {"up.bias": torch.bfloat16})
    assert all(again.values[n].equal(found.values[n]) for n in leaves)


def test_a_rate_that_ruins_the_block_is_not_kept():
    pair, train, held = made()
    wild = BlockTuning(steps=4, lr=50.0, lr_rest=50.0, batch=1, looks=4)
    found = tune_rest(train, held, {"down.weight": pair.down.weight}, wild, {})
    assert found.error == found.start
    assert found.values["down.weight"].equal(pair.down.weight)


def test_parameters_that_no_call_reaches_stay():
    pair, train, held = made()
    found = tune_rest(train, held, {"idle.weight": pair.idle.weight}, TUNING, {})
    assert found.error == found.start
    assert found.values["idle.weight"].equal(pair.idle.weight)
