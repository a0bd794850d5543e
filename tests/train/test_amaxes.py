"""Delayed scaling: where steps come from, what changes a history, recomputation, ranks."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fewbit.errors import InputError
from fewbit.train import LowLinear, advance, delayed, lower, tensorwise
from fewbit.train.amaxes import GRADIENT, INPUT, WEIGHT


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def layer(how, seed=0):
    torch.manual_seed(seed)
    return LowLinear(nn.Linear(32, 48, bias=False), how)


def step(low, x, g):
    x = x.clone().requires_grad_()
    low.weight.grad = None
    y = low(x)
    y.backward(g)
    return y.detach(), x.grad, low.weight.grad


def fp8(x, amax, top, dtype):
    s = amax / top
    return (x / s).clamp(-top, top).to(dtype).double() * s.double()


def test_the_first_steps_are_those_of_the_tensor_at_hand():
    x, g = noise(16, 32), noise(16, 48, seed=1)
    for a, b in zip(step(layer(delayed()), x, g), step(layer(tensorwise()), x, g), strict=True):
        assert torch.equal(a, b)


def test_later_steps_are_those_of_the_largest_amax_of_the_history():
    """The oldest leaves after H steps; what is larger than the history saturates."""
    low, g = layer(delayed(history=2)), noise(16, 48, seed=1)
    x, w = noise(16, 32), low.weight.detach()
    known = {3.0: [], 0.5: [3.0], 2.0: [0.5, 3.0], 1.0: [2.0, 0.5]}
    for size, history in known.items():
        now = x * size
        seen = max(history, default=size) * x.abs().max()
        want = fp8(now, seen, 448, torch.float8_e4m3fn) @ fp8(w, w.abs().max(), 448, torch.float8_e4m3fn).t()
        y, dx, _ = step(low, now, g * size)
        assert torch.allclose(y.double(), want, rtol=1e-5, atol=1e-6 * want.abs().max())
        seen = max(history, default=size) * g.abs().max()
        want = fp8(g * size, seen, 57344, torch.float8_e5m2) @ fp8(w, w.abs().max(), 448, torch.float8_e4m3fn)
        assert torch.allclose(dx.double(), want, rtol=1e-5, atol=1e-6 * want.abs().max())
        advance(low)


def test_a_margin_leaves_room_for_growth():
    x = noise(16, 32)
    for margin, lost in ((0, True), (1, False)):
        low = layer(delayed(margin=margin))
        low(x).sum().backward()
        advance(low)
        y, want = low(1.9 * x), 1.9 * x @ low.weight.t()
        assert ((y - want).norm() / want.norm() > 0.045) == lost


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 0.0])
def test_amaxes_that_are_0_nan_or_inf_change_no_step(bad):
    low, x, g = layer(delayed()), noise(16, 32), noise(16, 48, seed=1)
    step(low, x, g)
    advance(low)
    before = low.amaxes()
    _, _, dw = step(low, torch.full_like(x, bad), torch.full_like(g, bad))
    advance(low)
    assert torch.equal(low.amaxes(), before)
    assert bad == 0 or dw.isnan().all()
    assert all(t.isfinite().all() for t in step(low, x, g))


def test_a_history_moves_on_when_told_and_gathers_micro_batches_until_then():
    low, x, g = layer(delayed(history=4)), noise(16, 32), noise(16, 48, seed=1)
    for size in (1.0, 3.0, 2.0):
        step(low, x * size, g / size)
    assert not low.amaxes.history.any()
    advance(low)
    assert low.amaxes.history[INPUT].tolist() == [(3 * x).abs().max().item(), 0, 0, 0]
    assert low.amaxes.history[WEIGHT, 0] == low.weight.abs().max()
    assert low.amaxes.history[GRADIENT, 0] == g.abs().max()
    assert not low.amaxes.pending.any()


def test_recomputed_forwards_see_the_same_steps_and_leave_the_same_history():
    x, g, found = noise(16, 32), noise(16, 48, seed=1), []
    for again in (False, True):
        low = layer(delayed())
        for size in (1.0, 2.0, 5.0):
            rows = (x * size).requires_grad_()
            y = checkpoint(low, rows, use_reentrant=False) if again else low(rows)
            y.backward(g)
            advance(low)
        found.append((y.detach(), rows.grad, low.weight.grad, low.amaxes.history))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_evaluation_leaves_no_trace():
    low = layer(delayed()).eval()
    low(noise(16, 32))
    assert not low.amaxes.pending.any()


def test_histories_stay_float32_and_start_empty_from_the_meta_device():
    low = layer(delayed()).bfloat16()
    assert low.weight.dtype == torch.bfloat16
    assert low.amaxes.history.dtype == torch.float32
    with torch.device("meta"):
        low = LowLinear(nn.Linear(32, 48), delayed())
    low = low.to_empty(device="cpu")
    low.amaxes.reset_parameters()
    assert not low.amaxes.history.any()


def test_a_model_without_histories_has_none_to_move_on():
    model = lower(nn.Sequential(nn.Linear(32, 32)), tensorwise())
    with pytest.raises(InputError, match=r"lower it with delayed\(\) first"):
        advance(model)


def test_ranks_share_the_largest_amax(monkeypatch):
    """The other rank's amaxes: larger for inputs and smaller for the rest."""
    low, group = layer(delayed()), object()
    step(low, noise(16, 32), noise(16, 48))
    own, calls = low.amaxes.pending.clone(), []

    def reduce(latest, op, where):
        calls.append((op, where))
        latest.copy_(torch.maximum(latest, (own * torch.tensor([2.0, 0.5, 0.5])).expand_as(latest)))

    monkeypatch.setattr(torch.distributed, "all_reduce", reduce)
    advance(low, group)
    assert calls == [(torch.distributed.ReduceOp.MAX, group)]
    assert torch.equal(low.amaxes.history[:, 0], own * torch.tensor([2.0, 1.0, 1.0]))
