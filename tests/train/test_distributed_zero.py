"""FP8-LM's whole-tensor ZeRO on 2 and 4 gloo processes."""

import math

import pytest
import torch
from ranks import Ranks
from torch import nn

from fewbit.errors import InputError
from fewbit.train import LEVELS, low_adamw
from fewbit.train.distributed import E4M3, Wire, Zero, partition, shared_steps
from fewbit.train.gradients import fp8_gradients


@pytest.fixture(scope="module")
def ranks():
    pool = Ranks()
    yield pool
    pool.close()


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(16, 64), nn.ReLU(), nn.LayerNorm(64), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4)
    )


def data(step, rank):
    made = torch.Generator().manual_seed(100 * step + rank)
    x = torch.randn(8, 16, generator=made)
    return x, x[:, :4].sin()


BUILD = {
    "adamw": lambda params: torch.optim.AdamW(params, lr=1e-2),
    "fp8-lm": lambda params: low_adamw("fp8-lm", params, lr=1e-2, min_size=1),
}


def go(model, zero, rank, steps, start=0):
    losses = []
    for step in range(start, start + steps):
        x, y = data(step, rank)
        loss = nn.functional.mse_loss(model(x), y)
        zero.zero_grad()
        loss.backward()
        zero.step()
        losses.append(loss.item())
    return losses


def test_every_tensor_has_one_owner_and_loads_differ_by_the_largest_at_most():
    made = torch.Generator().manual_seed(0)
    for world in (1, 2, 4, 7):
        for _ in range(20):
            sizes = torch.randint(1, 10_000, (23,), generator=made).tolist()
            owners = partition(sizes, world)
            loads = [sum(s for s, o in zip(sizes, owners, strict=True) if o == r) for r in range(world)]
            assert sum(loads) == sum(sizes)
            assert max(loads) - min(loads) <= max(sizes)
    assert partition([5, 9, 5, 1], 2) == [1, 0, 1, 0]


def trained(rank, world, name):
    model = net()
    if rank:  # rank 0's count
        model[0].weight.data.zero_()
    zero = Zero(model, BUILD[name])
    losses = go(model, zero, rank, 15)
    held = [n for n, owner in zero.owners.items() if owner == rank]
    states = {zero._name[id(p)] for p in zero.optimizer.state}
    return [p.detach() for p in model.parameters()], losses, held, states, len(zero.wide)


def alone(world, steps=15):
    """One process that rounds what ranks send: each gradient and the weights, by the same formats."""
    model = net()
    wide = {p: p.detach().clone() for p in model.parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    place(model)
    losses = []
    for step in range(steps):
        grads = []
        for rank in range(world):
            x, y = data(step, rank)
            loss = nn.functional.mse_loss(model(x), y)
            grads.append(torch.autograd.grad(loss, list(model.parameters())))
            losses.append(loss.item())
        for i, p in enumerate(model.parameters()):
            own = torch.stack([g[i] for g in grads])
            if p.ndim >= 2:
                s = shared_steps(own.abs().amax().view(1))[0]
                own = E4M3.grid.value(E4M3.grid.round(own / s)) * s
            p.grad = own.mean(0)
            p.data.copy_(wide[p])
        optimizer.step()
        wide = {p: p.detach().clone() for p in model.parameters()}
        place(model)
    return [p.detach() for p in model.parameters()], losses


def place(model):
    for p in model.parameters():
        if p.ndim >= 2:
            p.data.copy_(E4M3.quantize(p.detach()).dequantize())


@pytest.mark.parametrize("world", [2, 4])
def test_the_partitioned_run_is_the_single_process_run_and_all_ranks_hold_the_same_bits(ranks, world):
    found = ranks(world, trained, "adamw")
    params, losses = alone(world)
    for rank, (own, seen, held, states, wide) in enumerate(found):
        assert all(torch.equal(a, b) for a, b in zip(own, found[0][0], strict=True))
        assert seen == pytest.approx(losses[rank::world], rel=1e-3)
        assert states == {*held, "0.bias", "2.weight", "2.bias", "3.bias", "5.bias"}
        assert wide == len(held)
    for p, q in zip(found[0][0], params, strict=True):
        if p.ndim >= 2:  # on the grid of E4M3
            assert torch.equal(p, E4M3.quantize(p).dequantize())
        assert (p - q).norm() <= 0.02 * q.norm()
    owned = [n for _, _, held, _, _ in found for n in held]
    assert sorted(owned) == ["0.weight", "3.weight", "5.weight"]


def test_a_master_in_the_optimizer_leaves_no_wide_weight(ranks):
    for own, losses, held, _, wide in ranks(2, trained, "fp8-lm"):
        assert wide == 0
        assert held
        assert losses[-1] < 0.8 * losses[0]
        assert all(p.isfinite().all() for p in own)


def sent(rank, world):
    model = net()
    zero = Zero(model, BUILD["adamw"])
    n = sum(p.numel() for p in model.parameters() if p.ndim >= 2)
    x, y = data(0, rank)
    nn.functional.mse_loss(model(x), y).backward()
    with Wire() as wire:
        zero.step()
    most = max(sum(p.numel() for p in own) for own in zero.dealt)
    return n, most, [(c.kind, c.numel) for c in wire.calls if c.dtype == torch.uint8]


def test_a_byte_an_element_goes_to_the_owners_and_a_byte_comes_back(ranks):
    n, most, calls = ranks(2, sent)[0]
    count = 2  # tensors of the rank that owns most of them; their steps travel along
    assert calls == [("all-to-all", n), ("all-gather", most + -most % 4 + 4 * count)]


def skipping(rank, world, bad):
    model = net()
    zero = Zero(model, BUILD["adamw"])
    go(model, zero, rank, 2)
    before = [p.detach().clone() for p in model.parameters()]
    x, y = data(5, rank)
    nn.functional.mse_loss(model(x * bad if rank == 1 else x), y).backward()
    stepped = zero.step()
    same = all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    go(model, zero, rank, 1, 2)
    moved = not torch.equal(before[0], model[0].weight)
    return stepped, same, zero.skipped, moved


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_on_one_rank_is_a_step_that_all_skip(ranks, bad):
    assert ranks(2, skipping, bad) == [(False, True, 1, True)] * 2


def quantized(rank, world):
    model = net()
    fp8_gradients(model, min_size=1)
    zero = Zero(
        model, lambda params: low_adamw("fp8-lm", params, lr=1e-2, min_size=1, weight=LEVELS["O3"].weight)
    )
    losses = go(model, zero, rank, 15)
    return losses, [p.detach() for p in model.parameters()]


def test_level_o3_with_gradients_kept_in_8_bits_trains(ranks):
    (first, a), (_, b) = ranks(2, quantized)
    assert first[-1] < 0.8 * first[0]
    assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


def saved(rank, world, name, folder):
    model = net()
    zero = Zero(model, BUILD[name])
    go(model, zero, 0, 4)
    torch.save({"model": model.state_dict(), "zero": zero.state_dict()}, f"{folder}/{world}-{rank}.pt")
    return go(model, zero, 0, 3, 4)


def loaded(rank, world, name, folder, of):
    parts = [torch.load(f"{folder}/{of}-{r}.pt", weights_only=True) for r in range(of)]
    model = net()
    model.load_state_dict(parts[0]["model"])
    zero = Zero(model, BUILD[name])
    with pytest.raises(InputError, match="give what every rank saved"):
        zero.load_state_dict([{**parts[0]["zero"], "states": {}}])
    zero.load_state_dict([part["zero"] for part in parts])
    return go(model, zero, 0, 3, 4)


@pytest.mark.parametrize("name", ["adamw", "fp8-lm"])
def test_what_two_ranks_saved_goes_on_with_one_two_and_four(ranks, name, tmp_path):
    losses = ranks(2, saved, name, str(tmp_path))[0]
    for world in (1, 2, 4):
        for again in ranks(world, loaded, name, str(tmp_path), 2):
            assert again == losses  # all ranks see one batch, so their mean is each of them


def refused(rank, world):
    with pytest.raises(InputError, match="nothing to deal out"):
        Zero(net(), BUILD["adamw"], covers=lambda n, p: False)
    zero = Zero(net(), BUILD["adamw"])
    with pytest.raises(InputError, match="weight' has no gradient; every rank needs one of each"):
        zero.step()


def test_what_cannot_work_is_refused_in_words(ranks):
    ranks(2, refused)
