"""Optimizers over sharded parameters (DTensor) on 2 gloo processes: what one process makes of the whole."""

import math
import warnings

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks
from torch import nn
from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

from fewbit.train import O3, OPTIMIZERS, Guard, clip_gradients, gradient, low_adamw
from fewbit.train.gradients import set_gradient
from fewbit.train.guard import gradient_norm
from fewbit.train.states import one_step, quantize

SHAPES = [(64, 256), (64, 256), (6, 5)]  # sharded, replicated, sharded
PLACES = [Shard(0), Replicate(), Shard(0)]
STEPS = 8


@pytest.fixture(scope="module")
def ranks():
    pool = Ranks()
    yield pool
    pool.close()


def randn(*shape, seed=0, scale=1.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def whole(name):
    params = [nn.Parameter(randn(*s, seed=i, scale=0.1)) for i, s in enumerate(SHAPES)]
    return params, OPTIMIZERS[name](params, lr=1e-2)


def sharded(name):
    mesh = init_device_mesh("cpu", (2,))
    params, _ = whole(name)
    params = [
        nn.Parameter(distribute_tensor(p.detach(), mesh, [at])) for p, at in zip(params, PLACES, strict=True)
    ]
    return params, OPTIMIZERS[name](params, lr=1e-2)


def steps(params, optimizer, count, first=0):
    """Gradients with a burst at step 5, so that StableAdamW has something to divide by."""
    for t in range(first, first + count):
        for i, p in enumerate(params):
            g = randn(*p.shape, seed=100 * t + i, scale=1.0 if t == 5 else 1e-2)
            p.grad = distribute_tensor(g, p.device_mesh, p.placements) if hasattr(p, "device_mesh") else g
        optimizer.step()


def trained(rank, world, name):
    params, optimizer = sharded(name)
    steps(params, optimizer, STEPS)
    rms = [optimizer.rms[p].item() for p in params] if optimizer.rms else []
    return [p.full_tensor().detach().numpy() for p in params], rms


@pytest.mark.parametrize("name", ["stable-adamw", "fp32", "adamw-8bit", "adamw-fp8", "adamw-4bit"])
def test_two_shards_are_one_tensor(ranks, name):
    """Blocks of 256 and 128 divide the shards, so that codes are the same; the rms is that of the whole."""
    params, optimizer = whole(name)
    steps(params, optimizer, STEPS)
    for found, rms in ranks(2, trained, name):
        for a, b in zip(found, params, strict=True):
            assert (torch.from_numpy(a) - b).abs().max() < 1e-6
        for i, value in enumerate(rms):
            assert value == pytest.approx(optimizer.rms[params[i]].item(), rel=1e-5)
    if name == "stable-adamw":
        alone, unclipped = whole("fp32")
        steps(alone, unclipped, STEPS)
        assert (params[0] - alone[0]).abs().max() > 1e-3  # the burst was divided


def moved(rank, world):
    """From two processes to a plain AdamW state of whole tensors."""
    params, optimizer = sharded("adamw-8bit")
    steps(params, optimizer, STEPS)
    state = optimizer.to_adamw()
    full = {
        i: {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in s.items()}
        for i, s in state["state"].items()
    }
    return {"state": full, "param_groups": state["param_groups"]}, [p.full_tensor().detach() for p in params]


def test_states_of_two_processes_go_on_in_one(ranks):
    state, found = ranks(2, moved)[0]
    params, optimizer = whole("adamw-8bit")
    steps(params, optimizer, STEPS)
    again = low_adamw("adamw-8bit", [nn.Parameter(p.clone()) for p in found])
    again.load_state_dict(state)
    steps(params, optimizer, 3, first=STEPS)
    steps(again.param_groups[0]["params"], again, 3, first=STEPS)
    for a, b in zip(again.param_groups[0]["params"], params, strict=True):
        assert (a - b).abs().max() < 1e-5


def clipped(rank, world):
    params, _ = sharded("fp32")
    for i, p in enumerate(params):
        g = distribute_tensor(randn(*p.shape, seed=i), p.device_mesh, p.placements)
        if i < 2:
            set_gradient(p, quantize(g.to_local(), one_step("e4m3fn")))
        else:
            p.grad = g
    before = gradient_norm(params)
    clip_gradients(params, 1.0)
    return before.item(), gradient_norm(params).item()


def test_norms_are_those_of_whole_tensors_and_replicas_count_once(ranks):
    params, _ = whole("fp32")
    exact = math.sqrt(sum(randn(*p.shape, seed=i).square().sum().item() for i, p in enumerate(params)))
    first, second = ranks(2, clipped)
    assert first == second
    assert first[0] == pytest.approx(exact, rel=1e-3)
    assert first[1] == pytest.approx(1.0, rel=1e-5)


def guarded(rank, world):
    """Replicas whose gradients differ, as without an all-reduce: rank 1 alone overflows at step 1."""
    params, optimizer = whole("adamw-fp8")
    guard, taken = Guard(optimizer, group=dist.group.WORLD), []
    for t in range(3):
        for p in params:
            p.grad = torch.full_like(p, math.inf if (rank, t) == (1, 1) else 1.0)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            step = guard.step()
        taken.append((step.taken, [str(w.message) for w in said]))
    same = all(gradient(p) is not None for p in params)
    return taken, same, optimizer.state[params[0]]["step"].item()


def test_one_rank_with_inf_makes_all_ranks_leave_the_step_out(ranks):
    for rank, (taken, _, count) in enumerate(ranks(2, guarded)):
        assert [t for t, _ in taken] == [True, False, True]
        assert ("another rank" if rank == 0 else "number 0") in taken[1][1][0]
        assert count == 2


def fully_sharded(rank, world):
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 64))
    fully_shard(net)
    optimizer = O3.optimizer(net, lr=1e-2)
    guard, losses, kinds = Guard(optimizer, max_norm=1.0), [], set()
    for t in range(30):
        x = randn(64, 64, seed=t)
        loss = (net(x) - x.flip(-1)).square().mean()
        loss.backward()
        kinds |= {(n, type(gradient(p)).__name__) for n, p in net.named_parameters()}
        guard.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, sorted(kinds)


def test_fsdp2_hands_its_shards_to_the_gradients_in_fp8_and_to_the_level(ranks):
    """Each rank sees the same batch, so that the mean of gradients is that of one process."""
    (first, kinds), (second, _) = ranks(2, fully_sharded)
    assert first == second
    assert kinds == [
        ("0.bias", "DTensor"), ("0.weight", "QTensor"), ("2.bias", "DTensor"), ("2.weight", "QTensor"),
    ]  # fmt: skip
    assert first[-1] < 0.6 * first[0]
