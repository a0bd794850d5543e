"""FP8 all-reduce with a shared scale and mu, on 2 and 4 gloo processes: the claims of FP8-LM, section 2.1."""

import math

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks
from torch import nn

from fewbit.errors import InputError
from fewbit.format import Params
from fewbit.format.named import mx
from fewbit.train.distributed import (
    E4M3,
    Factor,
    Road,
    SharedScale,
    Wire,
    all_reduce_gradients,
    attach,
    mean,
    native_sum,
    shared_amax,
    shared_steps,
)
from fewbit.train.gradients import fp8_gradients, gradient

ROADS = (Road.GATHER, Road.TWO_PHASE)
SHAPES = [(33, 17), (5,), (64, 8), (1, 1)]  # 33 * 17 and 4 ranks: parts are padded


@pytest.fixture(scope="module")
def ranks():
    pool = Ranks()
    yield pool
    pool.close()


def gradients(rank, size=1.0):
    """Gradients of a rank: of each tensor the magnitudes of ranks differ."""
    made = torch.Generator().manual_seed(rank)
    return [torch.randn(s, generator=made) * size * (1 + rank) for s in SHAPES]


def mu_of(value, k=len(SHAPES)):
    return torch.full((k,), value, dtype=torch.float64)


# -- the mean


def reduced(rank, world, mu, size):
    out = {}
    for road in ROADS:
        with Wire() as wire:
            found = mean(gradients(rank, size), mu_of(mu), road=road)
        out[road] = [(q.codes, q.scale) for q in found.tensors], found.share, wire.of(torch.uint8)
    return out


@pytest.mark.parametrize(("world", "size"), [(2, 1.0), (4, 1.0), (2, 1e-8), (2, 1e4)])
def test_the_sum_in_8_bits_is_the_sum_within_one_rounding_and_the_same_bits_everywhere(ranks, world, size):
    mu = 1 / world
    found = ranks(world, reduced, mu, size)
    given = [gradients(r, size) for r in range(world)]
    for i, shape in enumerate(SHAPES):
        codes, step = found[0][Road.GATHER][0][i]
        for rank in range(world):
            for road in ROADS:
                assert torch.equal(found[rank][road][0][i][0], codes)
                assert found[rank][road][0][i][1] == step
        parts = torch.stack([g[i] for g in given])
        got = E4M3.grid.value(codes).view(shape) * step
        # each rank's rounding, that of the sum, and what falls below the least number on either side
        bound = 2**-4 * (parts.abs().mean(0) + parts.mean(0).abs()) + 2**-10 * (step * world + step)
        assert ((got - parts.mean(0)).abs() <= bound).all()
        assert (got != 0).float().mean() > 0.9


def test_two_phases_send_half_of_what_bfloat16_does_and_a_gather_only_between_two(ranks):
    n = sum(math.prod(s) for s in SHAPES)
    for world in (2, 4):
        bf16 = 2 * (world - 1) / world * 2 * n
        sent = {road: found[2] for road, found in ranks(world, reduced, 0.5, 1.0)[0].items()}
        assert sent[Road.TWO_PHASE] == pytest.approx(bf16 / 2, rel=0.01)
        assert sent[Road.GATHER] == (world - 1) * n
        assert sent[Road.best(world)] == pytest.approx(bf16 / 2, rel=0.01)


def uneven(rank, world):
    big = torch.ones(100) * (1e4 if rank == 1 else 1.0)
    amax = shared_amax([big, big.neg() * 3])
    return shared_steps(amax), amax


def test_the_shared_step_is_the_largest_of_the_ranks(ranks):
    for steps, amax in ranks(2, uneven):
        assert amax.tolist() == [1e4, 3e4]
        assert steps.tolist() == [32.0, 128.0]  # 1e4 / 448 = 22.3, 67.0; up to a power of two


def test_one_rank_of_one_agrees_with_the_format_itself(ranks):
    (found,) = ranks(1, reduced, 1.0, 1.0)
    for (codes, step), g in zip(found[Road.TWO_PHASE][0], gradients(0), strict=True):
        q = E4M3.quantize(g)
        assert torch.equal(codes, q.codes)
        assert step == q.scale


# -- mu


def saturating(rank, world):
    """One of 10,000 entries of the sum at the end: 0.01 %; a second tensor where none is."""
    spread = torch.linspace(-200, 200, 10_000)
    one = spread.clone()
    one[7] = 400.0
    lone = spread.clone()
    lone[7] = 400.0 if rank else 0.0
    mu = mu_of(1.0, 2)
    rule, seen = Factor(), []
    for _ in range(2):
        found = mean([one, lone], mu)
        mu = rule.next(mu, found.share)
        seen.append((mu.tolist(), found.share.tolist()))
    return seen


def test_mu_halves_where_the_sum_saturates_and_doubles_after_a_thousand_clean_steps(ranks):
    first, second = ranks(2, saturating)
    assert first == second
    (mu, share), (after, then) = first
    assert share[0] == pytest.approx(1e-4, rel=0.01)
    assert share[1] == 0
    assert mu == [0.5, 1.0]
    assert then == [0, 0]
    assert after[0] == pytest.approx(0.5 * 2**0.001)
    rule, mu = Factor(), mu_of(0.25, 1)
    for _ in range(1000):
        mu = rule.next(mu, torch.tensor([1e-5]))  # at the threshold, not above
    assert mu.item() == pytest.approx(0.5, rel=1e-3)
    for _ in range(2000):
        mu = rule.next(mu, torch.tensor([0.0]))
    assert mu.item() == 1.0  # never above: single ranks would clip


def factors(rank, world):
    g = [torch.randn(200, generator=torch.Generator().manual_seed(3))]  # all ranks alike
    out = {}
    for mu in (0.25, 0.0625):
        q = mean(g, mu_of(mu, 1)).tensors[0]
        out[mu] = q.codes, q.dequantize()
    return out


def test_mu_changes_the_bytes_and_not_the_gradient(ranks):
    found = ranks(2, factors)[0]
    assert not torch.equal(found[0.25][0], found[0.0625][0])
    large = found[0.25][1].abs() > 2**-6 * found[0.25][1].abs().max()
    assert torch.equal(found[0.25][1][large], found[0.0625][1][large])


# -- DDP


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.LayerNorm(64), nn.Linear(64, 4))


def data(step, rank, n=8):
    made = torch.Generator().manual_seed(100 * step + rank)
    x = torch.randn(n, 16, generator=made)
    return x, x[:, :4].sin()


def train(rank, world, low, steps=20, bad=None):
    model = net()
    ddp = nn.parallel.DistributedDataParallel(model, bucket_cap_mb=0.002)  # several buckets
    state = attach(ddp) if low else None
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for step in range(steps):
        x, y = data(step, rank)
        if bad is not None and step == 3 and rank == 1:
            x = x * bad
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(ddp(x), y)
        loss.backward()
        losses.append(loss.item())
        before = [p.detach().clone() for p in model.parameters()]
        if state is None or state.finite():
            optimizer.step()
        else:
            assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
            assert all(g.grad.isnan().any() for g in (model[0].weight, model[3].weight))
    test = torch.stack([nn.functional.mse_loss(model(x), y) for x, y in (data(999, r) for r in range(4))])
    return [p.detach() for p in model.parameters()], test.mean().item(), state and state.state_dict()


@pytest.mark.parametrize("world", [2, 4])
def test_ddp_in_8_bits_trains_as_in_float32_and_its_replicas_agree_to_the_bit(ranks, world):
    low, wide = ranks(world, train, True), ranks(world, train, False)
    for params, _, state in low[1:]:
        assert all(torch.equal(a, b) for a, b in zip(params, low[0][0], strict=True))
        assert state == low[0][2]
    assert low[0][1] == pytest.approx(wide[0][1], rel=0.01)
    mu = low[0][2]["mu"]
    assert set(mu) == {"0.weight", "3.weight"}
    assert all(0 < value <= 1 for value in mu.values())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_on_one_rank_is_a_step_that_all_skip_and_report(ranks, bad):
    first, second = ranks(2, train, True, 6, bad)
    assert all(torch.equal(a, b) for a, b in zip(first[0], second[0], strict=True))
    assert all(p.isfinite().all() for p in first[0])
    assert first[2] == second[2]
    assert (first[2]["steps"], first[2]["skipped"]) == (6, 1)


def lone(rank, world, bad):
    grads, mu = gradients(0), mu_of(0.5)
    if rank == 1:
        grads[0][3, 2] = bad
    found = mean(grads, mu)
    after = Factor().next(mu, found.share)
    return [q.dequantize() for q in found.tensors], found.finite.item(), after


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_number_that_is_none_makes_its_tensor_nan_everywhere_and_leaves_mu(ranks, bad):
    for tensors, finite, mu in ranks(2, lone, bad):
        assert not finite
        assert tensors[0].isnan().all()
        assert all(t.isfinite().all() for t in tensors[1:])
        assert mu[0] == 0.5
        assert (mu[1:] > 0.5).all()


def resumed(rank, world):
    state = SharedScale(net(), factor=Factor(initial=0.125))
    saved = state.state_dict()
    fresh = SharedScale(net())
    fresh.load_state_dict(saved)
    with pytest.raises(InputError, match=r"differ in 1 parameters, such as '0.weight'"):
        SharedScale(net(), covers=lambda n, p: n == "3.weight").load_state_dict(saved)
    with pytest.raises(InputError, match="no parameter"):
        SharedScale(net(), covers=lambda n, p: False)
    return fresh.state_dict() == saved and fresh.mu.tolist() == [0.125, 0.125]


def test_the_state_of_the_hook_is_saved_and_loaded(ranks):
    assert ranks(2, resumed) == [True, True]


# -- gradients that are kept in 8 bits


def kept(rank, world):
    model = net()
    fp8_gradients(model, min_size=1)
    x, y = data(0, rank)
    nn.functional.mse_loss(model(x), y).backward()
    local = model[0].weight.low_grad.dequantize()
    state = SharedScale(model)
    with Wire() as wire:
        all_reduce_gradients(model, state)
    assert model[0].weight.grad is None
    q = gradient(model[0].weight)
    return local, q.dequantize(), model[2].weight.grad, wire.of(torch.uint8), q.codes.element_size()


def test_gradients_kept_in_8_bits_are_reduced_without_a_wide_one(ranks):
    (a, got, norm, nbytes, size), (b, other, other_norm, _, _) = ranks(2, kept)
    assert torch.equal(got, other)
    assert torch.equal(norm, other_norm)
    mean_of = (a + b) / 2
    assert ((got - mean_of).abs() <= 2**-3 * (a.abs() + b.abs()) / 2 + 2**-9 * mean_of.abs().max()).all()
    assert nbytes == 16 * 64 + 64 * 4
    assert size == 1


# -- what cannot work


def refused(rank, world):
    assert not native_sum(torch.device("cpu"))
    with pytest.raises(InputError, match=r"'gloo' has no working sum of e4m3fn; take Road\.TWO_PHASE"):
        mean([torch.ones(4)], mu_of(1.0, 1), road=Road.NATIVE)
    with pytest.raises(InputError, match="one float32 step for a tensor, got"):
        mean([torch.ones(32)], mu_of(1.0, 1), fmt=mx("e4m3fn"))
    dist.barrier()


def test_what_the_backend_cannot_do_is_refused_in_words(ranks):
    ranks(2, refused)
    for wrong in ({"initial": 2.0}, {"threshold": 1.0}, {"window": 0}, {"most": 0.0}):
        with pytest.raises(InputError, match="is no rule"):
            Factor(**wrong)


def test_a_sum_of_64_ranks_is_exact_before_its_only_rounding():
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[E4M3.grid.value(codes).isfinite()]
    values = E4M3.grid.value(codes)
    order = torch.randperm(64 * len(codes), generator=torch.Generator().manual_seed(0)) % len(codes)
    rows = values[order].view(64, -1)
    total = torch.zeros(rows.shape[1])
    for row in rows:
        total += row
    assert torch.equal(total.double(), rows.double().sum(0))
    assert torch.equal(E4M3.encode(values, Params(scale=torch.ones(()), zero=None)).codes, codes)
