"""Rotations inside the heads, and in front of a linear where nothing can be folded.

    values   v <- v R per head, o's columns <- W_o R^-T per head      softmax(..) (V R) = (softmax(..) V) R
    online   x <- x T at run time, W <- W T^-T                        for what a nonlinearity hands over, and
                                                                      to mix the heads before o

Query heads that share a KV head share its R. QuaRot, Ashkboos et al. 2024, https://arxiv.org/abs/2404.00456,
section 4, stages 1b-1d; as a per-head map without online part it is R2 of SpinQuant, Liu et al. 2024,
https://arxiv.org/abs/2405.16406, section 3.1.

Which row of which linear reaches which column of o is read off a run: the output channels of a linear are set
to their own numbers, the same at every token. An average over tokens leaves them as they are, so o's input
spells out the rows, in fused and interleaved projections, too.

Not here: a rotation of queries and keys after the rotary embedding (R3), which serves the KV cache alone.
Shapes: d channels of a head; weights [out, in].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fewbit.errors import InputError
from fewbit.nn.blocks import linears, set_weight, weight_of
from fewbit.nn.linear import transform_input
from fewbit.seams.residual import Residual, restored
from fewbit.seams.trial import change, first, tolerance
from fewbit.transform import Hadamard, Map

_BASE = 32  # digits small enough for half precision


@dataclass(frozen=True, kw_only=True)
class Values:
    """Rows of ``source`` behind the columns of ``writer``: rows [h][d], one line per head of the writer."""

    source: str
    writer: str
    rows: tuple[tuple[int, ...], ...]

    @property
    def head_dim(self) -> int:
        """d."""
        return len(self.rows[0])


@torch.no_grad()
def find_values(block: nn.Module, residual: Residual, call: Callable[[], object]) -> Values | None:
    """The linear whose output is averaged over tokens, head by head, for a writer; None without one.

    The size of a head is a ``head_dim`` in the block, else the largest that leaves the block's output alone.
    """
    readers = dict.fromkeys(r for norm in residual.norms for r in norm.readers)
    named = {getattr(m, "head_dim", None) for m in block.modules()}
    for writer in residual.writers:
        for source in readers:
            rows = _rows(block, call, source, writer)
            if rows is None:
                continue
            sizes = [d for d in range(len(rows), 1, -1) if len(rows) % d == 0]
            for d in sorted(sizes, key=lambda d: d not in named):
                values = Values(source=source, writer=writer, rows=_tuples(rows.view(-1, d)))
                if _whole(rows.view(-1, d)) and _holds(block, call, values):
                    return values
    return None


@torch.no_grad()
def rotate_values(block: nn.Module, values: Values, r: Map) -> None:
    """Fold ``r`` of size d between the values' rows and the writer's columns, in float64, rounded once.

    Raises ``InputError`` for a map of another size.
    """
    if r.size != values.head_dim:
        raise InputError(f"{r} does not fit heads of {values.head_dim} channels; give a map of that size")
    source, writer = block.get_submodule(values.source), block.get_submodule(values.writer)
    rows = torch.tensor(sorted(set(values.rows)), device=source.weight.device)
    w = weight_of(source).double()
    w[rows] = r.apply(w[rows], 1)
    set_weight(source, w)
    if source.bias is not None:
        b = source.bias.double()
        b[rows] = r.apply(b[rows])
        source.bias.copy_(b)
    columns = weight_of(writer).double().unflatten(1, (-1, r.size))
    set_weight(writer, r.dual(columns).flatten(1))


@torch.no_grad()
def rotate_values_checked(block: nn.Module, values: Values, r: Map, call: Callable[[], object]) -> None:
    """`rotate_values`; the block's output must stay to 1e-4, else it is put back with an ``InputError``."""
    before = first(call()).clone()
    with restored(block):
        rotate_values(block, values, r)
        changed = change(before, first(call()))
        if not changed < tolerance(before.dtype):
            raise InputError(
                f"a rotation of the values between {values.source} and {values.writer} of "
                f"{type(block).__name__} changed its output by {changed:.1e}; leave it out for this model"
            )


@torch.no_grad()
def fold_online(linear: nn.Module, t: Map) -> None:
    """W <- W T^-T: the layer now expects x T, which ``QLinear(..., online=t)`` computes. In float64, rounded
    once.
    """
    set_weight(linear, t.dual(weight_of(linear).double()))


def _rows(block: nn.Module, call, source: str, writer: str) -> Tensor | None:
    """[in] int64: the output channel of ``source`` that each column of ``writer`` averages, or None."""
    channels = torch.arange(len(weight_of(linears(block)[source])))
    rows, place = 0, 1
    while place < len(channels):
        digits = channels // place % _BASE - _BASE // 2  # below zero, too: an activation function shows
        got: list[Tensor] = []
        handles = [
            block.get_submodule(source).register_forward_hook(
                lambda m, args, out, digits=digits: digits.to(out).expand_as(out).clone()
            ),
            block.get_submodule(writer).register_forward_pre_hook(
                lambda m, args, kwargs, got=got: got.append(args[0] if args else next(iter(kwargs.values()))),
                with_kwargs=True,
            ),
        ]
        try:
            call()
        finally:
            for handle in handles:
                handle.remove()
        x = got[0].flatten(0, -2).float().cpu()
        digit = x[0].round()
        if not ((x - digit).abs() < 0.25).all() or digit.min() < -(_BASE // 2) or digit.max() >= _BASE // 2:
            return None
        rows = rows + place * (digit.long() + _BASE // 2)
        place *= _BASE
    return rows if rows.max() < len(channels) else None


def _whole(heads: Tensor) -> bool:
    """Whether heads [h, d] are the same rows or share none."""
    own = heads.unique(dim=0)
    return own.unique().numel() == own.numel()


def _holds(block: nn.Module, call, values: Values) -> bool:
    """Whether the block's output stays when each head is rotated, and back before the writer."""
    r, rows = Hadamard(values.head_dim, seed=0), torch.tensor(sorted(set(values.rows)))

    def turn(module, args, out):
        out = out.clone()
        out[..., rows] = r.apply(out[..., rows])
        return out

    back = lambda x: r.invert(x.unflatten(-1, (-1, r.size))).flatten(-2)  # noqa: E731
    before = first(call()).clone()
    undo = transform_input(block.get_submodule(values.writer), back)
    handle = block.get_submodule(values.source).register_forward_hook(turn)
    try:
        return change(before, first(call())) < tolerance(before.dtype)
    finally:
        handle.remove()
        undo()


def _tuples(heads: Tensor) -> tuple[tuple[int, ...], ...]:
    return tuple(map(tuple, heads.tolist()))
