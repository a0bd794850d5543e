"""Seams where a diagonal map folds: found by running a block once, verified by its unchanged output.

    norm -> its readers      y = (x / s) (W diag(s))^T    the gain of the norm is divided by s
    linear -> its reader     the rows of the producer are divided by s: v -> o (through the softmax average,
                             grouped heads sharing one s), up -> down (through the gate's product)

Norms and readers belong together when a reader gets the very tensor that the norm returned. For the others
every linear with a fitting number of rows is tried: its rows are scaled by powers of two, which rounds
nothing, and the seam holds when the block's output stays. Nothing is tabled, so nothing is trusted: after
each fold the output is compared again, and a fold that changed it is undone and reported.

What reads the norm before a mixture of experts is its router and the first matrices of every expert, shared
ones too: one scale serves them all. Which tokens an expert gets does not change where its scores do not.

Norms are stored in the model's dtype. So the new gain is rounded first and the readers take the ratio of old
and new gain: what is stored computes what was there.

SmoothQuant: Xiao et al. 2022, https://arxiv.org/abs/2211.10438, section 4; AWQ: Lin et al. 2023,
https://arxiv.org/abs/2306.00978. Shapes: s, gain [in]; weights [out, in].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor, nn

from fewbit.nn.blocks import linears, weight_of
from fewbit.nn.experts import Experts, in_experts, routers
from fewbit.seams.trial import SAME, changed_by, checked, kept, tolerance
from fewbit.transform.chooser import Kind

NOTHING: Mapping[str, nn.Module] = MappingProxyType({})


@dataclass(frozen=True, kw_only=True, eq=False)
class Seam:
    """A producer whose output only ``readers`` see. Names are relative to the block.

    index [in]: the producer's row behind each column of the readers; None where they are the same. reads: a
    module whose input is all that the producer makes, where no reader's is.
    """

    kind: Kind
    producer: str
    readers: tuple[str, ...]
    index: Tensor | None = field(default=None, repr=False)
    reads: str = ""


def find_seams(block: nn.Module, call: Callable[[], object]) -> list[Seam]:
    """Every seam of ``block`` in the order of its forward; ``call`` runs the block once on a few tokens."""
    mixtures, modules = in_experts(block), linears(block)
    made, read = trace(block, call, mixtures | routers(block))
    seams = []
    for tensor, names in read:
        producer = next((name for name, out in made if _same(out, tensor)), None)
        if producer is not None:
            readers = [r for n in names for r in (_first(n, mixtures[n]) if n in mixtures else (n,))]
            seam = Seam(kind=Kind.NORM, producer=producer, readers=tuple(readers), reads=names[0])
            seams += [seam] if _holds(block, call, seam) else []
        elif len(names) == 1 and names[0] in modules:
            others = [n for _, group in read for n in group if n in modules]
            seam = _try_linears(block, call, names[0], others)
            seams += [] if seam is None else [seam]
    return seams


def _first(name: str, experts: Experts) -> list[str]:
    """The matrices that read the input of each of ``experts``."""
    first = (experts.names.gate, experts.names.up) if experts.has_gate else (experts.names.up,)
    return [f"{name}.{e}.{matrix}" for e in range(len(experts)) for matrix in first]


def _same(a: Tensor, b: Tensor) -> bool:
    """One tensor, or views of one as a whole."""
    return a is b or (a.data_ptr() == b.data_ptr() and a.numel() == b.numel() and a.dtype == b.dtype)


def trace(block: nn.Module, call: Callable[[], object], also: Mapping[str, nn.Module] = NOTHING):
    """[(norm, its output)] and [(tensor, linears that read it)], in the order of one ``call``.

    Names are relative to the block. ``also``: modules beside the linears whose input is looked at. Linears
    inside experts are not: what one call brings to them is chance.
    """
    made: list[tuple[str, Tensor]] = []
    read: list[tuple[Tensor, list[str]]] = []
    done: set[str] = set()

    def note(name):
        def hook(module, args, kwargs):
            x = args[0] if args else next(iter(kwargs.values()))
            if name in done:
                return
            done.add(name)
            group = next((g for t, g in read if _same(t, x)), None)
            if group is None:
                read.append((x, [name]))
            else:
                group.append(name)

        return hook

    inside = tuple(f"{n}." for n in in_experts(block))
    watched = {n: m for n, m in linears(block).items() if not n.startswith(inside)} | dict(also)
    handles = [m.register_forward_pre_hook(note(n), with_kwargs=True) for n, m in watched.items()]
    for name, module in block.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.ndim == 1:
            keep = lambda m, a, out, name=name: made.append((name, out)) if isinstance(out, Tensor) else None  # noqa: E731
            handles.append(module.register_forward_hook(keep))
    try:
        with torch.no_grad():
            call()
    finally:
        for handle in handles:
            handle.remove()
    return made, read


def _try_linears(block: nn.Module, call, reader: str, others: list[str]) -> Seam | None:
    """The linear whose rows reach ``reader`` unmixed, or None."""
    modules = linears(block)
    n = weight_of(modules[reader]).shape[1]
    for name in (n for n in others if n != reader):
        rows = weight_of(modules[name]).shape[0]
        for index in _indices(block, rows, n):
            seam = Seam(kind=Kind.LINEAR, producer=name, readers=(reader,), index=index)
            if _holds(block, call, seam):
                return seam
    return None


def _holds(block: nn.Module, call, seam: Seam) -> bool:
    """Whether the block's output stays when powers of two are folded at ``seam``."""
    weight = weight_of(block.get_submodule(seam.readers[0]))
    generator = torch.Generator().manual_seed(0)
    s = torch.randint(-2, 3, weight.shape[1:], generator=generator).exp2().to(weight.device)
    if seam.index is not None:
        s = s[seam.index.to(s.device)]
    # powers of 2 round nothing, but where the stored gain is one less than the one in use
    exact = seam.kind is not Kind.NORM or not gain_shift(block.get_submodule(seam.producer))
    changed = changed_by(call, partial(fold, block, seam, s, None))
    return changed < (SAME if exact else tolerance(weight.dtype))


def fold_checked(block: nn.Module, call, seam: Seam, s: Tensor, stored: torch.dtype) -> str:
    """`fold`, unless the block's output changes by more than rounding explains; then a sentence says so.

    The check is made without the rounding of gain and bias to ``stored``, which the fold then has.
    """
    trial, real = (partial(fold, block, seam, s, dtype) for dtype in (None, stored))
    return checked(call, trial, real, f"the map at {seam.producer}")


def _indices(block: nn.Module, rows: int, columns: int):
    """Ways in which ``rows`` can feed ``columns``: one to one, or heads repeated in groups."""
    if rows == columns:
        yield None
    elif rows < columns and columns % rows == 0:
        sizes = {getattr(m, "head_dim", None) for m in block.modules()}
        for size in sorted(size for size in sizes if isinstance(size, int)):
            if rows % size == 0:
                heads = torch.arange(rows).view(-1, 1, size)
                yield heads.expand(-1, columns // rows, -1).flatten()


@torch.no_grad()
def fold(block: nn.Module, seam: Seam, s: Tensor, stored: torch.dtype | None) -> Callable[[], None]:
    """Divide the producer by ``s`` [in] and multiply the readers' columns; returns what undoes it exactly.

    ``stored``: the dtype in which the producer's gain and bias are written, to which they are rounded here.
    """
    producer = block.get_submodule(seam.producer)
    parameters = [*producer.parameters(recurse=False)]
    parameters += [block.get_submodule(r).weight for r in seam.readers]
    undo = kept(parameters)
    keep = (lambda v: v) if stored is None else (lambda v: v.to(stored).to(v.dtype))
    if seam.kind is Kind.NORM:
        shift = gain_shift(producer)
        gain = producer.weight.detach() + shift
        producer.weight.copy_(keep(gain / s - shift))
        new = producer.weight + shift
        s = torch.where(new == 0, s, gain / new)
        rows = s
    else:
        rows = s
        if seam.index is not None:
            rows = s.new_empty(int(seam.index.max()) + 1)
            rows[seam.index.to(s.device)] = s
        weight_of(producer).div_(rows[:, None])
    if getattr(producer, "bias", None) is not None:
        producer.bias.copy_(keep(producer.bias / rows))
    for reader in seam.readers:
        weight_of(block.get_submodule(reader)).mul_(s)
    return undo


@torch.no_grad()
def gain_shift(norm: nn.Module) -> float:
    """1 where the norm multiplies by 1 + weight (Gemma), else 0: what does it do with a weight of zero?"""
    old = norm.weight.detach().clone()
    try:
        norm.weight.zero_()
        bias = getattr(norm, "bias", None)
        x = torch.linspace(-1, 1, len(old), device=old.device, dtype=old.dtype)[None]
        out = norm(x) if bias is None else norm(x) - bias
    finally:
        norm.weight.copy_(old)
    return 1.0 if float(out.abs().max()) > 1e-3 else 0.0
