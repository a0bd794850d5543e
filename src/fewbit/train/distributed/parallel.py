"""Tensor and sequence parallel linear layers whose activations travel in 8 bits.

    lower(model, tensorwise())                       # or not: plain layers serve as well
    parallelize_module(block, mesh, {
        "norm": SequenceParallel(use_local_output=True), "up": Columns(), "down": Rows(),
    })

P ranks share a pair of layers. Between pairs each holds a part of the sequence, inside a pair a part of the
features (Megatron's sequence parallelism, https://arxiv.org/abs/2205.05198), with the gathers in 8 bits (Peng
et al. 2023, "FP8-LM", https://arxiv.org/abs/2310.18313, section 2.3):

             forward                                     backward
    Columns  a = all-reduce MAX of max|x|                dx = reduce-scatter of the partial dX, wide
             X = all-gather of E4M3(x / s(a))            X gathered again for dW, from the codes of x
             Y = X W^T, W split by rows
    Rows     y = reduce-scatter of the partial X W^T     a = all-reduce MAX of max|g|
             wide, W split by columns                    G = all-gather of E5M2(g / s(a))
                                                         dX = G W, dW = G^T X

Quantizing comes before the gather and under one step for the whole sequence, so the gathered codes are those
of the whole tensor, bit for bit: a lowered layer with one step a tensor gathers in its own format and finds
its numbers on the grid. Sums travel wide: rounded partial sums would be a second error of the same size.

From forward to backward a rank keeps the codes of its own part, 1 / P of a byte for each number of X,
where the layer keeps X wide: what it saves is replaced by these codes as autograd stores it. A layer that
keeps codes (`Folded`, ``Keep.CODES``) keeps its own, of the whole X: a byte for each number.

Weights become DTensors (what optimizers and checkpoints see), products run on their local parts.

Shapes: x [..., T / P, ..., in], T along ``sequence``. Collectives are those of `torch.distributed`.
Road not taken: subclasses of torch's ColwiseParallel and RowwiseParallel. What they override is private and
changes its name between versions; `ParallelStyle` and a layer's ``forward`` do not.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel.style import ParallelStyle

from fewbit.errors import InputError
from fewbit.format import Format, Params
from fewbit.train.distributed.reduce import E4M3, E5M2, check, own_format, shared_amax, shared_steps
from fewbit.train.distributed.wire import all_gather, reduce_scatter

# -- a sequence in parts


@dataclass(frozen=True, kw_only=True)
class Part:
    """Codes of this rank's part of a sequence [..., T / P, ...] uint8 and the step that all ranks share."""

    codes: Tensor
    step: Tensor
    format: Format
    dim: int
    dtype: torch.dtype
    group: dist.ProcessGroup

    def whole(self) -> Tensor:
        """The numbers of the whole sequence [..., T, ...], gathered in 8 bits."""
        codes = gather(self.codes, self.dim, self.group)
        return self.format.from_unit(self.format.grid.value(codes), self.step, None).to(self.dtype)


def part_of(x: Tensor, dim: int, fmt: Format, group: dist.ProcessGroup) -> Part:
    """This rank's part of a sequence in codes; a NaN or Inf on any rank makes the step NaN on all."""
    amax = shared_amax([x], group)
    step = torch.where(amax.isfinite(), shared_steps(amax, fmt), math.nan)[0]
    codes = fmt.encode(x.float(), Params(scale=step, zero=None)).codes.view(torch.uint8)
    return Part(codes=codes, step=step, format=fmt, dim=dim, dtype=x.dtype, group=group)


def gather(x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    """Parts of all ranks along ``dim``."""
    rows = x.movedim(dim, 0).contiguous()
    whole = rows.new_empty(dist.get_world_size(group) * len(rows), *rows.shape[1:])
    all_gather(whole, rows, group=group)
    return whole.movedim(0, dim)


def scatter_sum(x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    """This rank's part along ``dim`` of the sum of ``x`` over ranks, in x's dtype."""
    rows, world = x.movedim(dim, 0).contiguous(), dist.get_world_size(group)
    if len(rows) % world:
        raise InputError(f"a sequence of {len(rows)} cannot be cut for {world} ranks; pad it to a multiple")
    part = rows.new_empty(len(rows) // world, *rows.shape[1:])
    reduce_scatter(part, rows, group=group)
    return part.movedim(0, dim)


class Gather(torch.autograd.Function):
    """x, a part -> the whole sequence from 8 bits; backward: reduce-scatter, wide."""

    @staticmethod
    def forward(ctx, x: Tensor, part: Part) -> Tensor:
        ctx.dim, ctx.group = part.dim, part.group
        return part.whole()

    @staticmethod
    def backward(ctx, g: Tensor):
        return scatter_sum(g, ctx.dim, ctx.group), None


class Scatter(torch.autograd.Function):
    """Partial sums of the whole sequence -> a part of the sum, wide; backward: gather from 8 bits."""

    @staticmethod
    def forward(ctx, y: Tensor, dim: int, fmt: Format, group: dist.ProcessGroup) -> Tensor:
        ctx.dim, ctx.format, ctx.group = dim, fmt, group
        return scatter_sum(y, dim, group)

    @staticmethod
    def backward(ctx, g: Tensor):
        return part_of(g, ctx.dim, ctx.format, ctx.group).whole(), None, None, None


class Copied(torch.autograd.Function):
    """A parameter that every rank applies to its own part: backward sums over the ranks."""

    @staticmethod
    def forward(ctx, p: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return p.view_as(p)

    @staticmethod
    def backward(ctx, g: Tensor):
        g = g.clone()
        dist.all_reduce(g, group=ctx.group)
        return g, None


def kept_as(x: Tensor, part: Part) -> torch.autograd.graph.saved_tensors_hooks:
    """Context in which autograd keeps ``part`` where it would keep ``x``, the whole that was gathered."""
    at, numel, dtype = x.data_ptr(), x.numel(), x.dtype  # not x itself, which would live on

    def pack(t: Tensor):
        same = not isinstance(t, DTensor) and (t.data_ptr(), t.numel(), t.dtype) == (at, numel, dtype)
        return (part, t.shape, t.stride()) if same and numel else t

    def unpack(kept):
        if isinstance(kept, Tensor):
            return kept
        own, shape, stride = kept
        # the memory order of x, whichever way the layer looked at it
        return own.whole().contiguous().as_strided(shape, stride)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


# -- the styles


class Columns(ParallelStyle):
    """Splits a linear layer by its outputs; takes a part of the sequence, gives a part of the features.

    sequence: the axis of x that is split. fmt: of the gathered input, None for the layer's own where it has
    one step a tensor, `E4M3` else. The input may be a DTensor or a local part. Raises ``InputError`` for
    other modules, sizes that the ranks do not divide, and formats with other than one step a tensor.
    """

    def __init__(self, *, sequence: int = 1, fmt: Format | None = None):
        super().__init__()
        self.sequence, self.format = sequence, fmt

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        fmt = _format(self.format, module, "forward", E4M3)
        run, group = _split(module, device_mesh, 0, self), device_mesh.get_group()

        def forward(x: Tensor | DTensor) -> Tensor:
            x = _local(x, device_mesh, self.sequence)
            part = part_of(x.detach(), self.sequence, fmt, group)
            whole = Gather.apply(x, part).contiguous()
            with kept_as(whole, part):
                return run(whole, module.bias)

        module.forward = forward
        return module


class Rows(ParallelStyle):
    """Splits a linear layer by its inputs; takes a part of the features, gives a part of the sequence.

    Arguments and refusals as of `Columns`; fmt: of the gathered gradient, `E5M2` where the layer has none.
    """

    def __init__(self, *, sequence: int = 1, fmt: Format | None = None):
        super().__init__()
        self.sequence, self.format = sequence, fmt

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        fmt = _format(self.format, module, "input_gradient", E5M2)
        run, group = _split(module, device_mesh, 1, self), device_mesh.get_group()

        def forward(x: Tensor) -> Tensor:
            y = Scatter.apply(run(x, None), self.sequence, fmt, group)
            if module.bias is None:
                return y
            return y + Copied.apply(module.bias.to_local(), group).to(y.dtype)

        module.forward = forward
        return module


def _format(given: Format | None, layer: nn.Module, product: str, other: Format) -> Format:
    """What is gathered: as asked for, as the layer quantizes it itself, or ``other``."""
    if given is not None:
        check(given)
        return given
    return own_format(layer, product, "left") or other


def _split(
    module: nn.Module, mesh: DeviceMesh, dim: int, style: ParallelStyle
) -> Callable[[Tensor, DTensor | None], Tensor]:
    """Make DTensors of the parameters, weight split along ``dim``; returns what runs the layer on local ones.

    That is the layer's own arithmetic (`nn.Linear`'s, `LowLinear`'s) under parameters that are handed in.
    """
    name = type(style).__name__
    if not isinstance(module, nn.Linear):
        raise InputError(f"{name} splits linear layers, got {type(module).__name__}; choose another style")
    if mesh.ndim != 1:
        raise InputError(f"{name} needs a mesh of one dimension, got {mesh.ndim}; give mesh['tp']")
    if module.weight.shape[dim] % mesh.size():
        raise InputError(
            f"{name} cannot split a weight {list(module.weight.shape)} along dimension {dim} for "
            f"{mesh.size()} ranks; use a number of ranks that divides it"
        )
    own = dict(module.named_parameters(recurse=False))
    for n, p in own.items():
        place = Shard(dim) if n == "weight" else Shard(0) if dim == 0 else Replicate()
        spread = distribute_tensor(p.detach(), mesh, [place])
        module.register_parameter(n, nn.Parameter(spread, requires_grad=p.requires_grad))
    inner = copy.copy(module)  # shares settings and buffers; its parameters are those of each call
    inner._parameters = dict(module._parameters)
    # local sides, for layers that check their input
    inner.out_features, inner.in_features = module.weight.to_local().shape

    def run(x: Tensor, bias: DTensor | None) -> Tensor:
        given = {"weight": module.weight.to_local()}
        inner._parameters["bias"] = bias
        if bias is not None:
            given["bias"] = bias.to_local()
        return torch.func.functional_call(inner, given, (x,))

    return run


def _local(x: Tensor | DTensor, mesh: DeviceMesh, sequence: int) -> Tensor:
    """The local part of a sequence."""
    return x.redistribute(mesh, [Shard(sequence)]).to_local() if isinstance(x, DTensor) else x
