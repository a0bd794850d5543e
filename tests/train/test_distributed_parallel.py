"""Tensor and sequence parallel layers with 8-bit gathers, on 2 and 4 gloo processes."""

import math
import weakref

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import SequenceParallel, parallelize_module

from fewbit.errors import InputError
from fewbit.format.named import mx
from fewbit.train import lower, tensorwise
from fewbit.train.distributed import E4M3, E5M2, Columns, Rows, Wire
from fewbit.train.distributed.parallel import gather, kept_as, part_of


@pytest.fixture(scope="module")
def ranks():
    pool = Ranks()
    yield pool
    pool.close()


class Rounded(torch.autograd.Function):
    """Numbers rounded forward, their gradient rounded backward; None leaves one as it is."""

    @staticmethod
    def forward(ctx, x, forward, backward):
        ctx.backward = backward
        return x if forward is None else forward.quantize(x).dequantize()

    @staticmethod
    def backward(ctx, g):
        return g if ctx.backward is None else ctx.backward.quantize(g).dequantize(), None, None


class Block(nn.Module):
    """A residual pair; ``alone``: with the roundings of the gathers, in one process."""

    def __init__(self, alone=False):
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)
        self.alone = alone

    def forward(self, x):
        h = self.norm(x)
        h = Rounded.apply(h, E4M3, None) if self.alone else h
        y = nn.functional.gelu(self.up(h))
        if not self.alone:
            return x + self.down(y)
        # the bias is added after the scatter, so its gradient is wide
        y = nn.functional.linear(y, self.down.weight)
        return x + Rounded.apply(y, None, E5M2) + self.down.bias


def batch(tokens=8):
    made = torch.Generator().manual_seed(7)
    return torch.randn(2, tokens, 16, generator=made), torch.randn(2, tokens, 16, generator=made)


def single(low=False):
    block = lower(Block(), tensorwise()) if low else Block(alone=True)
    x, g = batch()
    x.requires_grad_()
    y = block(x)
    y.backward(g)
    return y.detach(), x.grad, {n: p.grad for n, p in block.named_parameters()}


def parallel(rank, world, low):
    block = lower(Block(), tensorwise()) if low else Block()
    mesh = init_device_mesh("cpu", (world,))
    styles = {"norm": SequenceParallel(use_local_output=True), "up": Columns(), "down": Rows()}
    parallelize_module(block, mesh, styles)
    x, g = (t.chunk(world, 1)[rank].clone() for t in batch())
    x.requires_grad_()
    with Wire() as wire:
        y = block(x)
        y.backward(g)
    group = mesh.get_group()
    whole = [gather(t.detach(), 1, group) for t in (y, x.grad)]
    grads = {n: p.grad.full_tensor() for n, p in block.named_parameters()}
    local = [tuple(p.to_local().shape) for p in block.parameters()]
    return *whole, grads, local, [(c.kind, str(c.dtype), c.numel) for c in wire.calls]


def away(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("world", [2, 4])
def test_the_pair_is_the_single_process_pair_with_the_same_roundings(ranks, world):
    y, dx, grads = single()
    for out, dx_, found, local, _ in ranks(world, parallel, False):
        assert away(out, y) < 1e-6
        assert away(dx_, dx) < 1e-6
        for name, g in grads.items():
            assert away(found[name], g) < 1e-6, name
        # norm and its bias, up and its bias, down and its bias
        assert local == [(16,), (16,), (32 // world, 16), (32 // world,), (16, 32 // world), (16,)]


def test_lowered_layers_run_in_parallel_and_gather_in_their_own_format(ranks):
    y, dx, grads = single(low=True)
    found = ranks(2, parallel, True)
    for out, dx_, got, _, _ in found:
        assert away(out, y) < 0.02  # a rank fits one step to its half of the features
        assert away(dx_, dx) < 0.05
        assert all(away(got[n], g) < 0.12 for n, g in grads.items())
        assert torch.equal(out, found[0][0])


def test_gathers_move_a_byte_an_element_forward_and_backward(ranks):
    calls = ranks(2, parallel, False)[0][4]
    n = 2 * 8 * 16 // 2  # what a rank holds of x, and of the gradient
    assert [c for c in calls if c[0] == "all-gather"] == [("all-gather", "torch.uint8", n)] * 3
    assert [c for c in calls if c[0] == "reduce-scatter"] == [("reduce-scatter", "torch.float32", 2 * n)] * 2
    assert sum(c[2] for c in calls if c[0] == "all-reduce") == 2 + 16  # two largest magnitudes, the bias


def parts(rank, world):
    x, _ = batch(24)
    x[:, :3] *= 100  # the largest number is on one rank
    part = part_of(x.chunk(world, 1)[rank], 1, E4M3, dist.group.WORLD)
    whole = E4M3.quantize(x)
    return (
        torch.equal(gather(part.codes, 1, dist.group.WORLD), whole.codes),
        part.step == whole.scale,
        torch.equal(part.whole(), whole.dequantize()),
        part.codes.dtype == torch.uint8,
    )


@pytest.mark.parametrize("world", [2, 4])
def test_gathering_what_is_quantized_is_quantizing_what_is_gathered(ranks, world):
    assert all(all(found) for found in ranks(world, parts))


def test_what_autograd_keeps_of_the_whole_sequence_is_its_part():
    """The gathered numbers die with forward, and are gathered again for the weight gradient alone."""
    asked = []

    class Stub:
        def whole(self):
            asked.append(1)
            return torch.full((2, 6, 4), 3.0)

    for layer in (nn.Linear(4, 8), lower(nn.Linear(4, 8), tensorwise())):
        asked.clear()
        x = torch.randn(2, 6, 4).requires_grad_().clone()
        gone = weakref.ref(x)
        with kept_as(x, Stub()):
            y = layer(x)
        del x
        assert gone() is None
        assert not asked
        y.sum().backward()
        assert asked == [1]
        assert torch.allclose(layer.weight.grad, torch.full((8, 4), 36.0))
    with kept_as(torch.randn(2, 6, 4), Stub()):
        y = layer(torch.randn(2, 6, 4))  # another tensor stays itself
    y.sum().backward()
    assert asked == [1]


def lost(rank, world):
    layer = parallelize_module(nn.Linear(16, 32), init_device_mesh("cpu", (world,)), Columns())
    x = torch.randn(2, 4, 16)
    if rank == 1:
        x[0, 0, 0] = math.nan
    return layer(x).isnan().all().item()


def test_nan_on_one_rank_is_nan_on_all(ranks):
    assert ranks(2, lost) == [True, True]


def refused(rank, world):
    mesh = init_device_mesh("cpu", (world,))
    with pytest.raises(InputError, match="Columns splits linear layers, got LayerNorm"):
        parallelize_module(nn.LayerNorm(16), mesh, Columns())
    with pytest.raises(InputError, match=r"cannot split a weight \[31, 16\] along dimension 0 for 2 ranks"):
        parallelize_module(nn.Linear(16, 31), mesh, Columns())
    with pytest.raises(InputError, match="one float32 step for a tensor"):
        parallelize_module(nn.Linear(16, 32), mesh, Rows(fmt=mx("e5m2")))
    layer = parallelize_module(nn.Linear(16, 32), mesh, Rows())
    with pytest.raises(InputError, match="a sequence of 7 cannot be cut for 2 ranks"):
        layer(torch.ones(1, 7, 8))


def test_what_cannot_be_split_is_refused_in_words(ranks):
    ranks(2, refused)
