"""FSDP2 that gathers weights and reduces gradients in 8 bits, on 2 and 4 gloo processes."""

import math

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from fewbit.errors import InputError
from fewbit.train import fake, low_adamw, lower, stable_adamw, tensorwise
from fewbit.train.distributed import E4M3, BlockReduceScatter, Wire, fp8_gather, sync_steps
from fewbit.train.fake import Identity


@pytest.fixture(scope="module")
def ranks():
    pool = Ranks()
    yield pool
    pool.close()


class Faked(nn.Linear):
    """What a layer computes whose weight was gathered in 8 bits, in one process."""

    def forward(self, x):
        return nn.functional.linear(x, fake(self.weight, E4M3, surrogate=Identity()), self.bias)


def net(wide=30, kind=nn.Linear):
    torch.manual_seed(0)
    return nn.Sequential(kind(16, wide), nn.ReLU(), nn.LayerNorm(wide), kind(wide, 5))


def data(step, rank):
    made = torch.Generator().manual_seed(100 * step + rank)
    x = torch.randn(6, 16, generator=made)
    return x, x[:, :5].sin()


def sharded(model, **settings):
    for layer in (model[0], model[3]):
        fully_shard(layer, **settings)
    return fully_shard(model, **settings)


def steps(model, optimizer, ranks, count=5):
    """Losses of steps over the data of several ranks."""
    losses = []
    for step in range(count):
        optimizer.zero_grad()
        loss = torch.stack([nn.functional.mse_loss(model(x), y) for x, y in (data(step, r) for r in ranks)])
        loss.mean().backward()
        optimizer.step()
        losses.append(loss.mean().item())
    return losses


def gathered(rank, world, wide, synced, low):
    model = lower(net(wide), tensorwise()) if low else net(wide)
    names = fp8_gather(model)
    assert names == ["0.weight", "3.weight"]
    sharded(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    if synced:
        optimizer.register_step_post_hook(lambda *_: sync_steps(model))
    losses = steps(model, optimizer, [rank])
    model.unshard()  # the root; its layers gather when they run
    model[0].unshard()
    whole = model[0].weight.detach().clone()
    model[0].reshard()
    full = model[0].weight.detach().full_tensor()
    return losses, whole, full, type(full), optimizer.state[model[0].weight]["exp_avg"].full_tensor()


@pytest.mark.parametrize(("world", "wide"), [(2, 32), (2, 30), (4, 30)])  # 5 outputs: never even
@pytest.mark.parametrize("low", [False, True], ids=["linear", "lowered"])
def test_sharded_training_with_an_8_bit_gather_is_the_single_process_run(ranks, world, wide, low):
    model = lower(net(wide), tensorwise()) if low else net(wide, Faked)
    alone = steps(model, torch.optim.AdamW(model.parameters(), lr=1e-2), range(world))
    dynamic, synced = (ranks(world, gathered, wide, s, low) for s in (False, True))
    losses = torch.tensor([found[0] for found in synced]).mean(0)
    # a lowered layer fits the gradient's one step to the tokens of its own rank
    assert torch.allclose(losses, torch.tensor(alone), rtol=2e-2 if low else 1e-5)
    fmt = model[0].products.forward.right if low else E4M3
    for one, other in zip(dynamic, synced, strict=True):
        assert one[0] == other[0]
        assert all(torch.equal(a, b) for a, b in zip(one[1:3], other[1:3], strict=True))
        assert torch.equal(one[1], synced[0][1])  # the same bits on every rank
        assert torch.equal(one[1], fmt.quantize(one[2]).dequantize())  # as if the whole had been quantized
        assert not torch.equal(one[1], one[2])
        assert one[3] is torch.Tensor


def bytes_of(rank, world, low):
    model = net(32)
    if low:
        fp8_gather(model)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    sharded(model, mp_policy=policy)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    with Wire() as wire:
        losses = steps(model, optimizer, [rank], 1)
    sent = [c for c in wire.calls if c.kind == "all-gather"]
    return losses, [(str(c.dtype), c.nbytes) for c in sent]


def test_the_gather_sends_half_of_what_bfloat16_does(ranks):
    (wide, other), (low, sent) = ranks(2, bytes_of, False)[0], ranks(2, bytes_of, True)[0]
    assert low == pytest.approx(wide, rel=0.05)
    by_gather = list(zip(other, sent, strict=True))
    layers = [(a, b) for a, b in by_gather if b[0] == "torch.uint8"]
    assert len(layers) == 4  # two layers, forward and backward
    bias = {16 * 32 // 2: 32 // 2, 32 * 3: 3}  # what a rank sends of each weight: of its bias beside it
    for (_, wide_bytes), (_, low_bytes) in layers:
        weight = next(n for n, b in bias.items() if wide_bytes == 2 * (n + b))
        assert low_bytes == weight + 2 * bias[weight]


def damaged(rank, world):
    model = net()
    fp8_gather(model)
    sharded(model)
    if rank == 1:
        model[0].weight.detach().to_local().fill_(math.nan)
    sync_steps(model)
    return model(data(0, 0)[0]).isnan().all().item()


def test_nan_in_one_shard_is_nan_on_all_ranks(ranks):
    assert ranks(2, damaged) == [True, True]


# -- checkpoints


def saved(rank, world, folder):
    from torch.distributed.checkpoint import save

    model = net()
    fp8_gather(model)
    sharded(model)
    steps(model, torch.optim.SGD(model.parameters(), lr=1e-2), [0], 2)
    save({"model": model.state_dict()}, checkpoint_id=folder)
    weight = model[0].weight.detach().full_tensor().clone()
    return weight, steps(model, torch.optim.SGD(model.parameters(), lr=1e-2), [0], 2)


def loaded(rank, world, folder):
    from torch.distributed.checkpoint import load

    model = net(30)
    with torch.no_grad():
        model[0].weight.zero_()
    fp8_gather(model)
    sharded(model)
    found = {"model": model.state_dict()}
    load(found, checkpoint_id=folder)
    model.load_state_dict(found["model"])
    weight = model[0].weight.detach().full_tensor().clone()
    return weight, steps(model, torch.optim.SGD(model.parameters(), lr=1e-2), [0], 2)


def test_a_checkpoint_of_two_ranks_goes_on_with_one_and_with_four(ranks, tmp_path):
    weight, losses = ranks(2, saved, str(tmp_path / "two"))[0]
    for world in (1, 4):
        for again, after in ranks(world, loaded, str(tmp_path / "two")):
            assert torch.equal(again, weight)
            assert after == pytest.approx(losses, rel=1e-5)


# -- reduce-scatter


def reduced(rank, world, n, bad):
    made = torch.Generator().manual_seed(rank)
    x = torch.randn(world * n, generator=made) * torch.logspace(-6, 2, world * n)
    if bad and rank == 1:
        x[5] = math.inf
    out = torch.empty(n)
    with Wire() as wire:
        BlockReduceScatter()(out, x, dist.group.WORLD, dist.ReduceOp.AVG)
    return x, out, wire.nbytes


@pytest.mark.parametrize(("world", "n"), [(2, 1024), (4, 300)])
def test_the_block_reduce_scatter_is_the_mean_within_one_rounding_for_a_byte_an_element(ranks, world, n):
    found = ranks(world, reduced, n, False)
    parts = torch.stack([x for x, _, _ in found])
    got = torch.cat([out for _, out, _ in found])
    size = parts.abs().mean(0)
    tops = torch.nn.functional.pad(parts.abs().view(world, world, n), (0, -n % 128))
    steps = (tops.unflatten(-1, (-1, 128)).amax(-1) / 448).repeat_interleave(128, -1)[..., :n]
    assert ((got - parts.mean(0)).abs() <= 2**-4 * size + 2**-9 * steps.mean(0).reshape(-1)).all()
    whole = n + -n % 128
    assert found[0][2] == (world - 1) * whole * (1 + 1 / 128)
    assert whole > 1000 or found[0][2] <= 1.3 * (world - 1) * n


def test_a_block_with_inf_arrives_as_nan_and_no_other(ranks):
    first, second = ranks(2, reduced, 256, True)
    assert first[1][:128].isnan().all()
    assert first[1][128:].isfinite().all()
    assert second[1].isfinite().all()


def both(rank, world, low):
    model = net(32)
    if low:
        fp8_gather(model)
    sharded(model)
    if low:
        for module in (model[0], model[3], model):
            module.set_custom_reduce_scatter(BlockReduceScatter())
    return steps(model, torch.optim.AdamW(model.parameters(), lr=1e-2), [rank], 20)


def test_weights_and_gradients_in_8_bits_train_as_in_float32(ranks):
    low, wide = ([sum(r[i] for r in ranks(2, both, x)) / 2 for i in (0, -1)] for x in (True, False))
    assert low[1] < 0.7 * low[0]
    assert low[1] == pytest.approx(wide[1], rel=0.03)


# -- optimizers in Formats over shards


OPTIMIZERS = {
    "stable-adamw": lambda params: stable_adamw(params, lr=2e-2, clip=0.7),
    "fp8-lm": lambda params: low_adamw("fp8-lm", params, lr=1e-2, min_size=1),
}


def optimized(rank, world, name):
    model = net()
    fp8_gather(model)
    sharded(model)
    optimizer = OPTIMIZERS[name](model.parameters())
    optimizer.register_step_post_hook(lambda *_: sync_steps(model))
    losses = steps(model, optimizer, [rank], 8)
    rms = [value.item() for value in optimizer.rms.values()]
    weight = model[0].weight.detach().full_tensor()
    kept = optimizer.state_dict()["state"][0]
    return losses, rms, weight, "Gathered" in repr(kept)


@pytest.mark.parametrize("world", [2, 4])
def test_the_clip_of_stable_adamw_is_that_of_the_whole_tensor(ranks, world):
    model = net(30, Faked)
    optimizer = OPTIMIZERS["stable-adamw"](model.parameters())
    alone = steps(model, optimizer, range(world), 8)
    found = ranks(world, optimized, "stable-adamw")
    losses = torch.tensor([own for own, _, _, _ in found]).mean(0)
    assert torch.allclose(losses, torch.tensor(alone), rtol=1e-4)
    rms = [value.item() for value in optimizer.rms.values()]
    assert max(rms) > 0.7  # something was clipped
    for _, own, weight, wrapped in found:
        assert own == pytest.approx(rms, rel=1e-3)
        assert torch.allclose(weight, model[0].weight, rtol=1e-3, atol=1e-4)
        assert not wrapped


def test_the_states_of_fp8_lm_work_on_shards(ranks):
    found = ranks(2, optimized, "fp8-lm")
    assert torch.equal(found[0][2], found[1][2])
    assert sum(own[-1] for own, _, _, _ in found) < 0.8 * sum(own[0] for own, _, _, _ in found)
    assert not any(wrapped for _, _, _, wrapped in found)


# -- what cannot work


def refused(rank, world):
    model = net()
    with pytest.raises(InputError, match="no linear layer of Sequential is covered"):
        fp8_gather(model, covers=lambda name, m: False)
    with pytest.raises(InputError, match="call fp8_gather and fully_shard first"):
        sync_steps(model)
    sharded(model)
    with pytest.raises(InputError, match="call fp8_gather before fully_shard"):
        fp8_gather(model)
    with pytest.raises(InputError, match="summed or averaged"):
        BlockReduceScatter()(torch.ones(4), torch.ones(8), None, dist.ReduceOp.MAX)


def test_what_cannot_be_gathered_is_refused_in_words(ranks):
    ranks(2, refused)
