"""Folded layers under 8-bit gathers, in one process that is a group of its own: which formats are theirs."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import parallelize_module

from fewbit.train import LowLinear, Products, lower
from fewbit.train.distributed import E4M3, E5M2, Columns, Rows, fp8_gather, sync_steps
from fewbit.train.distributed.reduce import own_format
from fewbit.train.folded import Folded

WIDE_RANGE = torch.float8_e5m2
WAYS = [Folded(), Folded(by_rows=False), Folded(by_rows=False, gradient=WIDE_RANGE), Products()]


@pytest.fixture(scope="module", autouse=True)
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def net(how):
    torch.manual_seed(0)
    return lower(nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)), how)


def run(model):
    made = torch.Generator().manual_seed(1)
    x = torch.randn(2, 8, 16, generator=made).requires_grad_()
    y = model(x)
    y.backward(torch.randn(2, 8, 16, generator=made))
    grads = {n: p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
             for n, p in model.named_parameters()}  # fmt: skip
    return y.detach(), {"x": x.grad} | grads


def test_only_a_step_for_the_tensor_is_a_format_to_gather_in():
    layers = [LowLinear(nn.Linear(16, 16), how) for how in WAYS]
    operands = (("forward", "right"), ("forward", "left"), ("input_gradient", "left"))
    found = [[own_format(layer, *which) for layer in layers] for which in operands]
    assert found == [[None, E4M3, E4M3, None], [None, E4M3, E4M3, None], [None, E4M3, E5M2, None]]


@pytest.mark.parametrize("how", WAYS, ids=str)
def test_a_gathered_weight_is_the_weight_rounded_to_e4m3(how):
    """One step a tensor finds the codes that it makes itself; folding the step loses nothing either way."""
    alone, model = net(how), net(how)
    with torch.no_grad():
        for layer in (alone[0], alone[2]):
            layer.weight.copy_(E4M3.quantize(layer.weight).dequantize())
    assert fp8_gather(model) == ["0.weight", "2.weight"]
    for part in (model[0], model[2], model):
        fully_shard(part)
    sync_steps(model)
    (y, grads), (want, wanted) = run(model), run(alone)
    assert torch.equal(y, want)
    assert all(torch.equal(grads[name], g) for name, g in wanted.items())
    if how in WAYS[1:3]:
        assert torch.equal(y, run(net(how))[0])


@pytest.mark.parametrize("how", WAYS, ids=str)
def test_parallel_layers_round_what_is_gathered_as_the_layer_does(how):
    alone, model = net(how), net(how)
    parallelize_module(model, init_device_mesh("cpu", (1,)), {"0": Columns(), "2": Rows()})
    (y, grads), (want, wanted) = run(model), run(alone)
    wanted.pop("2.bias")  # added after the scatter: its gradient is wide
    # numbers on the grid of the tensor lie on those of its rows
    assert torch.equal(y, want) == isinstance(how, Folded)
    if how in WAYS[1:3]:
        assert all(torch.equal(grads[name], g) for name, g in wanted.items())
        return
    assert (y - want).norm() < 0.05 * want.norm()
    assert all(0 < (grads[name] - g).norm() < 0.12 * g.norm() for name, g in wanted.items())
