"""FSDP2 that gathers weights in 8 bits.

    names = fp8_gather(model)                                        # before fully_shard
    for block in model.blocks: fully_shard(block)
    fully_shard(model)
    optimizer.register_step_post_hook(lambda *_: sync_steps(model))  # one all-reduce for all weights

FSDP2 keeps a shard of every weight in its own type, and gathers the whole when a module runs. It asks the
shard (`fsdp_pre_all_gather`) what to send: here E4M3 codes of the shard, as uint8, under one step for the
*whole* tensor, agreed on before anything is quantized:

    s = 2^ceil(log2(max over ranks of max|w| / 448)),   gathered = decode(encode(shard, s)) of all ranks

so the gathered weight is, bit for bit, what quantizing the whole weight would have given. A layer of
`fewbit.train.lower` that quantizes weights by one step itself has its own format gathered, and then finds
numbers that are on its grid already; with power-of-two steps of rows or blocks they are as well. The
optimizer updates the shards, which stay wide.

Without `sync_steps` each weight asks for its largest magnitude when it is gathered: the same bits, and a
small all-reduce for every weight and pass. With it steps are those of the last update; whoever changes
weights in another way (a checkpoint that is loaded) calls it again.

FSDP2 finds these functions on a tensor subclass, so the shard is a thin one around its numbers (`Gathered`):
views and copies of it are again Gathered, all else computes with the numbers, and it is saved as a plain
tensor. Step and format live in the module.

Shapes: w [out, ...] sharded along the first dimension, rows padded to a multiple of the ranks.
Roads not taken: rows' steps (nothing to agree on, yet steps travel along and the gathered weight no longer
equals the tensor-wise one); float8 on the wire (gloo has no such type); handing the layer codes in place of
numbers (one byte less for each gathered weight, but every layer would have to know them).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from fewbit.errors import InputError
from fewbit.format import Format, Params
from fewbit.train.distributed.reduce import E4M3, check, own_format, shared_amax, shared_steps
from fewbit.train.gradients import local

_ATEN = torch.ops.aten
KEPT = {  # what FSDP2, DTensor and `nn.Module.to` make of a parameter
    _ATEN.detach.default, _ATEN.clone.default, _ATEN._to_copy.default, _ATEN.empty_like.default,
    _ATEN.new_zeros.default, _ATEN.split.Tensor, _ATEN.slice.Tensor, _ATEN.view.default, _ATEN.alias.default,
    _ATEN.as_strided.default, _ATEN._pin_memory.default,
}  # fmt: skip


class Gathered(torch.Tensor):
    """A weight, or the shard of one, that goes over the wire in 8 bits; ``numbers`` holds it, any dtype."""

    @staticmethod
    def __new__(cls, numbers: Tensor):
        return Tensor._make_wrapper_subclass(
            cls,
            numbers.shape,
            strides=numbers.stride(),
            storage_offset=numbers.storage_offset(),
            dtype=numbers.dtype,
            device=numbers.device,
            requires_grad=numbers.requires_grad,
        )

    def __init__(self, numbers: Tensor):
        self.numbers = numbers

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        plain, named = tree_map_only(cls, lambda t: t.numbers, (args, kwargs or {}))
        found = func(*plain, **named)
        if func._schema.is_mutable and isinstance(args[0], cls):
            return args[0]
        return tree_map_only(Tensor, cls, found) if func in KEPT else found

    def __tensor_flatten__(self):
        return ["numbers"], None

    @staticmethod
    def __tensor_unflatten__(inner, meta, outer_size, outer_stride):
        return Gathered(inner["numbers"])

    def __reduce_ex__(self, protocol):
        return self.numbers.__reduce_ex__(protocol)

    def __repr__(self):
        return f"Gathered({self.numbers!r})"

    def fsdp_pre_all_gather(self, mesh, outer_size, outer_stride, module, mp_policy):
        """What to send: codes of this shard, [padded rows, ...] uint8; beside it the step, which all know."""
        fmt, group, shard, step = module.gather_format, mesh.get_group(), self.numbers, module.gather_step
        if step is None:
            step = _steps([shard], fmt, group)[0]
        codes = fmt.encode(shard, Params(scale=step, zero=None)).codes.view(torch.uint8)
        missing = -(-outer_size[0] // mesh.size()) - len(codes)
        if missing:  # byte 0 is the number 0
            codes = torch.cat([codes, codes.new_zeros(missing, *codes.shape[1:])])
        return (codes,), (step, fmt)

    @torch.no_grad()
    def fsdp_post_all_gather(self, outputs, metadata, param_dtype, *, out=None):
        """The whole weight [rows, ...] in ``param_dtype``, or into ``out``."""
        (codes,), (step, fmt) = outputs, metadata
        whole = fmt.from_unit(fmt.grid.value(codes), step, None).to(param_dtype)
        if out is None:
            return whole, (whole,)
        target = local(out)
        with torch.autograd._unsafe_preserve_version_counter(target):  # FSDP2's own copies are unseen as well
            target.copy_(whole.as_strided(target.shape, target.stride()))


def fp8_gather(
    model: nn.Module, *, fmt: Format | None = None, covers: Callable[[str, nn.Module], bool] | None = None
) -> list[str]:
    """Mark weights of linear layers so that `fully_shard`, called afterwards, gathers them in 8 bits.

    fmt: None takes that of the layer's own forward product where it is such a format, `E4M3` else. covers:
    which layers (name, module), all ``nn.Linear`` and what derives from it where None. Weights tied to an
    embedding stay as they are. Returns the names of the weights. Raises ``InputError`` for a format that is
    no 8-bit float with one float32 step for a tensor, for a model that is sharded already, and where nothing
    is covered.
    """
    if fmt is not None:
        check(fmt)
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    chosen = {
        name: m
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear) and id(m.weight) not in tables and (covers is None or covers(name, m))
    }
    if not chosen:
        raise InputError(
            f"no linear layer of {type(model).__name__} is covered, so nothing would be gathered in 8 bits; "
            "give covers=lambda name, module: ..."
        )
    for name, m in chosen.items():
        if hasattr(m.weight, "to_local"):
            raise InputError(f"{name}.weight is sharded already; call fp8_gather before fully_shard")
    for m in chosen.values():
        trains = m.weight.requires_grad
        m.weight = nn.Parameter(Gathered(m.weight.detach()), requires_grad=trains)
        m.gather_format = fmt or own_format(m, "forward", "right") or E4M3
        m.register_buffer("gather_step", None, persistent=False)
    return [f"{name}.weight" for name in chosen]


@torch.no_grad()
def sync_steps(model: nn.Module) -> None:
    """Steps of all weights that are gathered in 8 bits, from their shards as they are: one all-reduce.

    Call it after every update, on all ranks. Raises ``InputError`` for a model without such weights.
    """
    by_group: dict = {}
    for m in model.modules():
        if hasattr(m, "gather_format") and hasattr(m.weight, "device_mesh"):
            mesh = m.weight.device_mesh
            mesh = mesh[mesh.mesh_dim_names[-1]] if mesh.ndim > 1 else mesh
            by_group.setdefault((mesh.get_group(), m.gather_format), []).append(m)
    if not by_group:
        raise InputError(
            f"{type(model).__name__} holds no sharded weight that is gathered in 8 bits; call fp8_gather and "
            "fully_shard first"
        )
    for (group, fmt), modules in by_group.items():
        shards = [local(m.weight).numbers for m in modules]
        for m, step in zip(modules, _steps(shards, fmt, group), strict=True):
            m.gather_step = step


def _steps(shards: list[Tensor], fmt: Format, group: dist.ProcessGroup) -> Tensor:
    """Steps of tensors from the shards of this rank, [k] float32; NaN for a tensor with NaN or Inf."""
    amax = shared_amax(shards, group)
    return torch.where(amax.isfinite(), shared_steps(amax, fmt), math.nan)
