"""Weights stored as payloads while they train: bytes, the same learning, files, copies, the way back."""

import copy
import io

import pytest
import torch
from tiny import tiny, tiny_ids
from torch import nn

from fewbit.errors import InputError
from fewbit.format import BF16, format_by_name
from fewbit.train import LEVELS, O1, O2, O3, PRODUCTS, Guard, Level, Products, gradient, lower
from fewbit.train.narrow import NarrowLinear, narrow, value, widen
from fewbit.train.states import Held, one_step, quantize

E4M3 = one_step("e4m3fn")


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def model(dtype=torch.float32):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64)).to(dtype)


def learn(net, optimizer, steps, first=0):
    guard, losses = Guard(optimizer, max_norm=1.0), []
    for t in range(first, first + steps):
        x = randn(32, 64, seed=t).to(net[0].bias.dtype)
        loss = (net(x) - x.flip(-1)).float().square().mean()
        optimizer.zero_grad()
        loss.backward()
        guard.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(("name", "whole"), [("O1", 11), ("O2", 6), ("O3", 7)])
def test_nothing_wide_is_left_of_a_covered_parameter(name, whole):
    """Gradient, m, v, master and the weight that computes, as storage: at O2 all of it is 6 bytes."""
    net = nn.Sequential(nn.Linear(256, 256, bias=False)).bfloat16()
    optimizer = LEVELS[name].optimizer(net, narrow=Products())
    net(torch.ones(1, 256).bfloat16()).sum().backward()
    optimizer.step()
    (p,) = net.parameters()
    held = [h for h in optimizer.state[p].values() if isinstance(h, Held)]
    assert p.grad is None
    kept = [gradient(p).codes, p.data, *(h.codes for h in held)]
    assert sum(t.untyped_storage().nbytes() for t in kept) == whole * p.numel()


def test_the_layer_multiplies_what_the_format_stores():
    net = model()
    rounded = quantize(net[0].weight, E4M3).dequantize()
    other = copy.deepcopy(net)
    narrow(net, E4M3)
    assert net[0].weight.dtype == torch.float8_e4m3fn
    with torch.no_grad():
        other[0].weight.copy_(rounded)
    x = randn(8, 64).requires_grad_()
    y, z = net[0](x), other[0](x)
    assert torch.equal(y, z)
    (dx,) = torch.autograd.grad(y.square().sum(), x)
    net[0](x).square().sum().backward()
    other[0](x).square().sum().backward()
    assert torch.equal(net[0].weight.grad, other[0].weight.grad)
    assert net[0].weight.grad.dtype == torch.float32
    assert torch.equal(dx, x.grad / 2)


def test_the_master_is_taken_from_the_wide_weight():
    net = model(torch.bfloat16)
    wide = net[0].weight.detach().clone()
    optimizer = O3.optimizer(net, narrow=Products())
    assert torch.equal(optimizer.state[net[0].weight]["master"].read().bfloat16(), wide)
    assert torch.equal(value(net[0].weight), quantize(wide, E4M3).dequantize())


@pytest.mark.parametrize("level", [O1, O2, O3])
def test_stored_narrow_or_rounded_in_place_a_level_learns_alike(level):
    plain, low = model(), model()
    losses = learn(plain, level.optimizer(plain, lr=3e-3), 40)
    assert learn(low, level.optimizer(low, lr=3e-3, narrow=Products()), 40) == pytest.approx(losses, rel=0.02)
    assert losses[-1] < 0.6 * losses[0]


def test_products_in_few_bits_go_with_narrow_weights():
    low, wide = model(torch.bfloat16), model(torch.bfloat16)
    losses = learn(low, O3.optimizer(low, lr=3e-3, narrow=PRODUCTS["rowwise"]()), 40)
    lower(wide, PRODUCTS["rowwise"]())
    assert losses == pytest.approx(learn(wide, O3.optimizer(wide, lr=3e-3), 40), rel=0.05)


@pytest.mark.parametrize("level", [O2, O3])
def test_a_resumed_run_is_the_same_run_bit_for_bit(level):
    def start():
        net = model(torch.bfloat16)
        return net, level.optimizer(net, lr=1e-2, narrow=Products())

    net, optimizer = start()
    learn(net, optimizer, 5)
    file = io.BytesIO()
    torch.save([net.state_dict(), optimizer.state_dict()], file)
    file.seek(0)
    whole = learn(net, optimizer, 5, first=5)
    other, again = start()
    for one, saved in zip((other, again), torch.load(file, weights_only=True), strict=True):
        one.load_state_dict(saved)
    assert learn(other, again, 5, first=5) == whole
    for name, t in net.state_dict().items():
        assert torch.equal(t.float(), other.state_dict()[name].float())


def test_files_hold_payload_and_step_and_wide_ones_load():
    net, wide = narrow(model(), E4M3), model().state_dict()
    saved = net.state_dict()
    assert saved["0.weight"].dtype == torch.float8_e4m3fn
    assert saved["0.weight_scale"].shape == ()
    with torch.no_grad():
        net[0].weight.data.zero_()
    net.load_state_dict(wide, strict=False)
    assert torch.equal(value(net[0].weight), quantize(wide["0.weight"], E4M3).dequantize())


def test_dtypes_of_payloads_survive_casts_and_copies():
    net = narrow(model(), E4M3).bfloat16()
    assert (net[0].weight.dtype, net[0].weight_scale.dtype) == (torch.float8_e4m3fn, torch.float32)
    assert net[0].bias.dtype == torch.bfloat16
    twin = copy.deepcopy(net)
    twin(randn(4, 64).bfloat16()).sum().backward()
    assert twin[0].weight.grad.dtype == torch.bfloat16
    assert torch.equal(value(twin[0].weight), value(net[0].weight))
    with torch.autocast("cpu", torch.bfloat16):
        assert net.float()(randn(4, 64)).dtype == torch.bfloat16


def test_the_way_back_gives_linears_on_the_same_parameters():
    net = model()
    params = list(net.parameters())
    narrow(net, one_step("fp16"))
    kept = value(net[0].weight)
    widen(net)
    assert type(net[0]) is nn.Linear
    assert all(a is b for a, b in zip(params, net.parameters(), strict=True))
    assert torch.equal(net[0].weight, kept)
    net(randn(4, 64)).sum().backward()
    assert net[0].weight.grad.dtype == torch.float32


def test_a_llama_trains_with_narrow_weights():
    net = tiny("llama").train()
    optimizer = O3.optimizer(net, narrow=Products(), lr=3e-3, min_size=1)
    assert sum(isinstance(m, NarrowLinear) for m in net.modules()) == 14
    ids, losses = tiny_ids(2), []
    for _ in range(4):
        loss = net(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_what_cannot_be_stored_narrow_is_refused_and_left_as_it_was():
    net = model()
    for fmt in (BF16, format_by_name("nf4"), format_by_name("nvfp4")):
        with pytest.raises(InputError, match=r"a weight that trains"):
            narrow(net, fmt)
    with pytest.raises(InputError, match="wide inputs and no history"):
        narrow(net, E4M3, products=PRODUCTS["delayed"]())
    tied = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    tied[1].weight = tied[0].weight
    with pytest.raises(InputError, match="the weight of 0 is tied"):
        narrow(tied, E4M3, params=[tied[0].weight])
    with pytest.raises(InputError, match="holds 0 of the weights"):
        narrow(nn.Sequential(nn.Tanh()), E4M3)
    with pytest.raises(InputError, match="keeps no weight in a Format"):
        Level(gradient=E4M3).optimizer(net, narrow=Products())
    assert all(type(m) is not NarrowLinear for m in net.modules())
