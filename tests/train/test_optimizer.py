"""AdamW with states in Formats: against torch's AdamW, StableAdamW's claims, files, bytes."""

import io
import math

import pytest
import torch
from torch import nn

from fewbit.errors import InputError
from fewbit.format import FP32
from fewbit.train import LEVELS, OPTIMIZERS, STATES, LowAdamW, low_adamw, stable_adamw
from fewbit.train.gradients import fp8_gradients, gradient
from fewbit.train.states import one_step

LOW = [n for n in STATES if n != "fp32"]


def randn(*shape, seed=0, scale=1.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def parameters(*shapes, dtype=torch.float32):
    return [nn.Parameter(randn(*s, seed=i, scale=0.1).to(dtype)) for i, s in enumerate(shapes)]


def run(make, steps, *shapes, scale=1e-2, first=0):
    params = parameters(*shapes)
    optimizer = make(params)
    for t in range(first, first + steps):
        for i, p in enumerate(params):
            p.grad = randn(*p.shape, seed=100 * t + i, scale=scale)
        optimizer.step()
    return params, optimizer


# -- the same update as torch's AdamW


@pytest.mark.parametrize("clip", [None, math.inf])
def test_float32_states_give_the_trajectory_of_torch(clip):
    shapes = (64, 96), (50,), (3, 4, 5)
    own, _ = run(lambda p: LowAdamW(p, 1e-3, weight_decay=0.1, clip=clip), 100, *shapes)
    torchs, _ = run(lambda p: torch.optim.AdamW(p, 1e-3, weight_decay=0.1), 100, *shapes)
    for a, b in zip(own, torchs, strict=True):
        assert (a - b).abs().max() < 1e-6


def test_one_by_one_and_together_are_the_same_update():
    shapes = (32, 96), (50,)
    stable = lambda p: stable_adamw(p, 1e-2)  # noqa: E731
    together, _ = run(stable, 20, *shapes)
    # float32 master weights in a Format keep the update from the road for many tensors
    one, _ = run(lambda p: stable_adamw(p, 1e-2, first=FP32, second=FP32, min_size=0), 20, *shapes)
    for a, b in zip(together, one, strict=True):
        assert (a - b).abs().max() < 1e-6


@pytest.mark.parametrize("name", LOW)
def test_the_first_step_uses_the_fresh_moments(name):
    """So that it is AdamW's own, however few bits they are then kept in."""
    own, _ = run(lambda p: low_adamw(name, p, lr=1e-3), 1, (64, 96))
    torchs, _ = run(lambda p: torch.optim.AdamW(p, 1e-3), 1, (64, 96))
    assert (own[0] - torchs[0]).abs().max() <= 2**-11 * torchs[0].abs().max() * (name == "fp8-lm") + 1e-7


def test_the_parameter_is_the_fresh_master_and_the_master_its_rounding():
    (p,), optimizer = run(lambda p: low_adamw("fp8-lm", p, lr=1e-3), 1, (64, 96))
    master = optimizer.state[p]["master"].read()
    assert 0 < (master - p).abs().max() <= 2**-12 * p.abs().max()


def test_small_tensors_keep_float32_and_groups_have_their_own_formats():
    params = parameters((64, 64), (64, 63), (64, 64))
    optimizer = low_adamw("adamw-8bit", [{"params": params[:2]}, {"params": params[2:], "first": None}])
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    formats = [optimizer.state[p]["first"].format for p in params]
    assert formats == [STATES["adamw-8bit"].first, None, None]
    assert optimizer.state[params[2]]["second"].format == STATES["adamw-8bit"].second


def test_a_bfloat16_weight_loses_small_updates_unless_it_rounds_at_random_or_has_a_master():
    def after(**kind):
        p = nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
        optimizer = LowAdamW([p], 1e-3, (0, 0), weight_decay=0.0, **kind)
        for _ in range(300):
            p.grad = -torch.ones_like(p)
            optimizer.step()
        return p.float().mean().item()

    assert after() == 1.0
    assert after(stochastic=True) == pytest.approx(1.3, abs=0.01)
    assert after(master=one_step("fp16")) == pytest.approx(1.3, abs=0.03)
    assert after(master=FP32) == pytest.approx(1.3, abs=2**-8)


def test_the_learning_rate_may_be_a_tensor():
    lr = torch.tensor(1e-3)
    tensor, _ = run(lambda p: low_adamw("fp8-lm", p, lr=lr, clip=1.0), 5, (64, 96))
    number, _ = run(lambda p: low_adamw("fp8-lm", p, lr=1e-3, clip=1.0), 5, (64, 96))
    assert (tensor[0] - number[0]).abs().max() < 1e-6


# -- StableAdamW


def test_the_first_step_is_calibrated():
    (p,), optimizer = run(lambda p: stable_adamw(p, 1e-3, weight_decay=0.0), 1, (100, 100))
    assert optimizer.rms[p] == pytest.approx(1, abs=1e-4)
    moved = p.detach() - parameters((100, 100))[0].detach()
    assert moved.abs().max() == pytest.approx(1e-3, rel=1e-3)  # lr g / |g|


def test_a_burst_after_a_quiet_stretch_is_divided_by_its_rms_and_other_tensors_are_not():
    a, b = parameters((100, 100), (100, 100))
    optimizer = stable_adamw([a, b], 1.0, (0.9, 0.99), weight_decay=0.0)
    for t in range(500):
        a.grad, b.grad = (randn(100, 100, seed=2 * t + i, scale=1e-3) for i in (0, 1))
        optimizer.step()
    assert optimizer.rms[a] == pytest.approx(1, abs=0.05)
    before = a.detach().clone()
    a.grad, b.grad = randn(100, 100, seed=7777), randn(100, 100, seed=7778, scale=1e-3)
    optimizer.step()
    rms, burst = optimizer.rms[a], (a.detach() - before).square().mean().sqrt()
    assert rms == pytest.approx(9.9, abs=0.2)  # 1 / sqrt(1 - b2) = 10 at most
    assert burst == pytest.approx(0.1, abs=0.01)  # of lr: AdamW would have moved by 0.99
    assert optimizer.rms[b] == pytest.approx(1, abs=0.05)


def test_a_gradient_of_zeros_moves_nothing_but_by_weight_decay():
    for make in OPTIMIZERS.values():
        (p,), _ = run(lambda p, make=make: make(p, lr=0.1, weight_decay=0.5), 3, (64, 96), scale=0.0)
        assert (p - 0.95**3 * parameters((64, 96))[0]).abs().max() < 2e-3 * p.abs().max()


# -- ranges of gradients


@pytest.mark.parametrize("name", LOW)
@pytest.mark.parametrize("scale", [1e-8, 1e4])
def test_tiny_and_huge_gradients_neither_vanish_nor_overflow(name, scale):
    own, optimizer = run(lambda p: low_adamw(name, p, lr=1e-3), 10, (64, 96), scale=scale)
    torchs, _ = run(lambda p: torch.optim.AdamW(p, 1e-3), 10, (64, 96), scale=scale)
    assert torch.isfinite(own[0]).all()
    far = (own[0] - torchs[0]).square().mean() / (torchs[0] - parameters((64, 96))[0]).square().mean()
    assert far < (0.1 if name == "adamw-4bit" else 0.02)
    assert (optimizer.state[own[0]]["second"].read() > 0).all()


@pytest.mark.parametrize("name", LOW)
def test_a_burst_saturates_nothing_and_training_goes_on(name):
    p = parameters((64, 96))[0]
    optimizer = low_adamw(name, [p], lr=1e-3)
    for t in range(30):
        p.grad = randn(64, 96, seed=t, scale=1e4 if t == 10 else 1.0)
        if t == 10:
            m, v = (optimizer.state[p][k].read().clone() for k in ("first", "second"))
        before = p.detach().clone()
        optimizer.step()
        assert (p.detach() - before).abs().max() < 1.2e-2
        if t == 10:
            fresh_m, fresh_v = 0.9 * m + 0.1 * p.grad, 0.999 * v + 0.001 * p.grad.square()
            for part, fresh in (("first", fresh_m), ("second", fresh_v)):
                kept = optimizer.state[p][part].read()
                assert kept.abs().max() == pytest.approx(fresh.abs().max().item(), rel=0.07)
    assert torch.isfinite(p).all()


# -- files


def model(dtype=torch.float32):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64)).to(dtype)


def learn(net, optimizer, steps, first=0):
    losses = []
    for t in range(first, first + steps):
        x = randn(32, 64, seed=t).to(next(net.parameters()).dtype)
        loss = (net(x) - x.flip(-1)).float().square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def saved(*objects):
    file = io.BytesIO()
    torch.save([o.state_dict() for o in objects], file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("name", [*OPTIMIZERS, *LEVELS, "stochastic"])
def test_a_resumed_run_is_the_same_run_bit_for_bit(name):
    def start():
        net = model(torch.bfloat16 if name in (*LEVELS, "stochastic") else torch.float32)
        if name in LEVELS:
            return net, LEVELS[name].optimizer(net, lr=1e-2, clip=1.0)
        kind = {"stochastic": True, "seed": 3} if name == "stochastic" else {}
        make = OPTIMIZERS.get(name, OPTIMIZERS["adamw-8bit"])
        return net, make(net.parameters(), lr=1e-2, **kind)

    net, optimizer = start()
    learn(net, optimizer, 6)
    files = saved(net, optimizer)
    whole = learn(net, optimizer, 6, first=6)
    other, again = start()
    other.load_state_dict(files[0])
    again.load_state_dict(files[1])
    assert learn(other, again, 6, first=6) == whole
    for a, b in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", LOW)
def test_a_run_of_torchs_adamw_goes_on_in_few_bits_and_comes_back(name):
    net = model()
    wide = torch.optim.AdamW(net.parameters(), 3e-3)
    learn(net, wide, 60)
    low = low_adamw(name, net.parameters(), lr=1.0)
    low.load_state_dict(wide.state_dict())
    assert low.param_groups[0]["lr"] == 3e-3
    into = learn(net, low, 20, first=60)
    low.restore()
    back = torch.optim.AdamW(net.parameters())
    back.load_state_dict(low.to_adamw())
    out = learn(net, back, 20, first=80)
    alone = model()
    reference = learn(alone, torch.optim.AdamW(alone.parameters(), 3e-3), 100)
    near = 0.05 if name == "adamw-4bit" else 0.01
    assert sum(into) == pytest.approx(sum(reference[60:80]), rel=near)
    assert sum(out) == pytest.approx(sum(reference[80:]), rel=near)


def test_a_saved_master_goes_into_a_parameter_that_is_its_own_master():
    net = model()
    low = low_adamw("fp8-lm", net.parameters(), lr=1e-2)
    learn(net, low, 5)
    master = low.state[net[0].weight]["master"].read().clone()
    files = saved(net, low)
    wide = low_adamw("fp32", net.parameters())
    wide.load_state_dict(files[1])
    assert torch.equal(net[0].weight, master)
    assert "master" not in wide.state[net[0].weight]


def test_states_of_other_parameters_are_refused():
    low = low_adamw("fp8-lm", parameters((64, 96)))
    with pytest.raises(InputError, match=r"saved states of \[2\] parameters"):
        low.load_state_dict(low_adamw("fp32", parameters((64, 96), (3,))).state_dict())
    _, other = run(lambda p: low_adamw("fp32", p), 1, (96, 64))
    with pytest.raises(InputError, match=r"shape \[96, 64\] does not belong"):
        low.load_state_dict(other.state_dict())
    amsgrad = torch.optim.AdamW(parameters((64, 96)), amsgrad=True)
    with pytest.raises(InputError, match="AMSGrad"):
        low.load_state_dict(amsgrad.state_dict())


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"betas": (0.9, 1.0)}, r"betas in \[0, 1\)"),
        ({"lr": -1.0}, "lr -1.0"),
        ({"clip": 0.0}, "would stop every update"),
        ({"weight": one_step("e4m3fn")}, "need a master"),
    ],
)
def test_impossible_numbers_are_refused(wrong, said):
    with pytest.raises(InputError, match=said):
        LowAdamW(parameters((4, 4)), **wrong)
    with pytest.raises(InputError, match="no optimizer states named 'adamw-2bit'; known are fp32"):
        low_adamw("adamw-2bit", [])


# -- bytes


def bytes_of(*tensors):
    return sum(t.untyped_storage().nbytes() for t in tensors)


def test_six_bytes_a_parameter_against_sixteen():
    """Gradient, m, v and master of a matrix of 2^20 elements, as storage; steps are counted apart."""
    net = nn.Linear(1024, 1024, bias=False).bfloat16()
    optimizer = low_adamw("fp8-lm", net.parameters())
    fp8_gradients(net)
    net(torch.ones(1, 1024).bfloat16()).sum().backward()
    optimizer.step()
    g, state = gradient(net.weight), optimizer.state[net.weight]
    parts = [state[k] for k in ("first", "second", "master")]
    assert net.weight.grad is None
    assert bytes_of(g.codes, *(part.codes for part in parts)) == 6 * 2**20
    assert bytes_of(g.scale, *(part.scale for part in parts)) == 4 * 4

    net = nn.Linear(1024, 1024, bias=False)  # float32 master weights, 16-bit arithmetic by autocast
    optimizer = torch.optim.AdamW(net.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        net(torch.ones(1, 1024)).sum().backward()
    optimizer.step()
    state = optimizer.state[net.weight]
    usual = net.weight.grad, state["exp_avg"], state["exp_avg_sq"], net.weight.data
    assert bytes_of(*usual) == 16 * 2**20


@pytest.mark.parametrize(
    ("name", "each"), [("fp32", 8), ("adamw-fp8", 2.03125), ("adamw-8bit", 2.03125), ("adamw-4bit", 1.0625)]
)
def test_bytes_of_the_states_with_their_steps(name, each):
    (p,), optimizer = run(lambda p: low_adamw(name, p), 1, (256, 256))
    held = [optimizer.state[p][k] for k in ("first", "second")]
    kept = [t for h in held for t in (h.codes, h.scale) if t is not None]
    assert bytes_of(*kept) == each * 256 * 256
