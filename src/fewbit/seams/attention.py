"""The seam between queries and keys: (K / lambda) (Q lambda)^T = K Q^T, folded where both are made.

    linears    rows of k are divided by lambda, rows of q multiplied (biases, too)
    norms      in models that norm queries and keys head by head, the gains of those norms instead

Nothing is tabled. Queries and keys are two linears with one input, or two norms that no linear reads, which
take opposite scales, one a head, without a change of the block's output; keys are those whose change at
one token is felt at others. Then the pairs of channels that the rotary embedding mixes are found by trial:
none, halves (i, i + r/2), neighbours (2i, 2i + 1), with r = head_dim or, if need be, less (partial rotary).
A head's channels that do not rotate are on their own. The scales are powers of two, which round nothing.

A few tokens hardly turn the slowest channels, so none of them alone can be told from one that does not
rotate: the layouts with most pairs come first, and no rotation at all is told by the fastest. Neighbours that
do not rotate may so be tied without need, which is safe.

Not found: fused projections of q, k and v. QServe, Lin et al. 2024, https://arxiv.org/abs/2405.04532,
section 4.2. Shapes: k [..., channels], channels = heads x d, or d where a norm has one gain for all heads.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fewbit.nn.blocks import linears, weight_of
from fewbit.seams.diagonal import gain_shift, trace
from fewbit.seams.trial import SAME, change, changed_by, checked, first, kept, powers_of_two, stirred
from fewbit.transform.chooser import Kind


@dataclass(frozen=True, kw_only=True, eq=False)
class KeySeam:
    """Modules whose output channels are queries and keys. Names are relative to the block.

    index [channels of queries]: the channel of keys that each multiplies; partner [channels of keys]: the
    channel that the rotary embedding mixes with each, or itself.
    """

    queries: str
    keys: str
    index: Tensor
    partner: Tensor
    kind: Kind = Kind.ATTENTION

    def magnitudes(self, k: Tensor) -> Tensor:
        """Largest magnitude that each channel of keys k [..., channels] can have at any position."""
        partner = self.partner.to(k.device)
        alone = partner == torch.arange(len(partner), device=k.device)
        return torch.where(alone, k.abs(), torch.hypot(k, k[..., partner]))

    def tied(self, s: Tensor) -> Tensor:
        """s [channels of keys], the larger of each pair for both."""
        return s.maximum(s[self.partner.to(s.device)])


def find_keys(block: nn.Module, call: Callable[[], object]) -> list[KeySeam]:
    """The seam of a block's attention, if there is one; ``call`` runs it once on at least two tokens."""
    call = stirred(block, call)
    made, read = trace(block, call)
    modules = linears(block)
    norms = [n for n, out in made if n not in modules and all(out is not x for x, _ in read)]
    for group in (norms, *(names for _, names in read)):
        for queries, keys in itertools.permutations(group, 2):
            for d in _head_sizes(block, queries, keys):
                seam = _try(block, call, queries, keys, d)
                if seam is not None:
                    return [seam]
    return []


@torch.no_grad()
def fold_keys(block: nn.Module, seam: KeySeam, s: Tensor, stored: torch.dtype | None) -> Callable[[], None]:
    """Divide keys by ``s`` [channels of keys] and multiply queries; returns what undoes it exactly.

    Scales of a pair must be equal. Gains and biases are rounded to ``stored``; queries take the ratio of the
    keys' old and new gain, so that only their own rounding is left.
    """
    keys, queries = block.get_submodule(seam.keys), block.get_submodule(seam.queries)
    undo = kept(p for m in (keys, queries) for p in m.parameters(recurse=False))
    exact = _scale(keys, 1 / s, stored)
    _scale(queries, (1 / exact)[seam.index.to(s.device)], stored)
    return undo


def fold_keys_checked(block: nn.Module, call, seam: KeySeam, s: Tensor, stored: torch.dtype) -> str:
    """`fold_keys`, unless it changes the block's output by more than 1e-4; else nothing, and why.

    The check is made without the rounding of gains and biases, which the fold then has.
    """
    s = seam.tied(s)
    trial, fold = (lambda: fold_keys(block, seam, s, None)), (lambda: fold_keys(block, seam, s, stored))
    return checked(stirred(block, call), trial, fold, f"the smoothing of keys at {seam.keys}")


def _scale(module: nn.Module, s: Tensor, stored: torch.dtype | None) -> Tensor:
    """Multiply the module's output channels by s [channels]; the factors as they became by rounding."""
    keep = (lambda v: v) if stored is None else (lambda v: v.to(stored).to(v.dtype))
    bias = getattr(module, "bias", None)
    if module.weight.ndim == 1:
        shift = gain_shift(module)
        old = module.weight + shift
        module.weight.copy_(keep(old * s - shift))
        new = module.weight + shift
        s = torch.where((old == 0) | (new == 0), s, new / old)
    else:
        weight_of(module).mul_(s[:, None])
    if bias is not None:
        bias.copy_(keep(bias * s))
    return s


def _head_sizes(block: nn.Module, queries: str, keys: str) -> list[int]:
    """Sizes of a head that a module names and that tile both outputs."""
    rows = [_channels(block, name) for name in (queries, keys)]
    named = {getattr(m, "head_dim", None) for m in block.modules()}
    sizes = sorted(d for d in named if isinstance(d, int) and d > 0)
    return [d for d in sizes if rows[1] % d == 0 and rows[0] % rows[1] == 0]


def _channels(block: nn.Module, name: str) -> int:
    module = block.get_submodule(name)
    return len(module.weight) if module.weight.ndim == 1 else weight_of(module).shape[0]


def _try(block: nn.Module, call, queries: str, keys: str, d: int) -> KeySeam | None:
    """The seam between two modules with heads of d channels, or None."""
    rows, columns = _channels(block, queries), _channels(block, keys)
    like, heads = block.get_submodule(keys).weight, columns // d
    of_heads = torch.arange(columns).view(heads, 1, d)
    index = of_heads.expand(-1, rows // columns, -1).flatten()
    plain = KeySeam(queries=queries, keys=keys, index=index, partner=torch.arange(columns))
    s = powers_of_two(heads, 1, like).clamp(min=1).mul(2).repeat_interleave(d)  # one a head, and never 1
    if not changed_by(call, lambda: fold_keys(block, plain, s, None)) < SAME:
        return None
    if changed_by(call, lambda: _once(block.get_submodule(keys), s)) < SAME:
        return None  # a norm behind takes any scale away
    if not _felt_elsewhere(block, call, keys) or _felt_elsewhere(block, call, queries):
        return None
    for layout in _layouts(d):
        partner = (torch.arange(columns).view(heads, d)[:, :1] + layout).flatten()
        seam = KeySeam(queries=queries, keys=keys, index=index, partner=partner)
        s = seam.tied(powers_of_two(columns, 0, like))
        if changed_by(call, lambda seam=seam, s=s: fold_keys(block, seam, s, None)) < SAME:
            return seam
    return None


def _layouts(d: int) -> Iterator[Tensor]:
    """Partners [d] of the channels of a head, by falling number of pairs but for none at all, the first."""
    own = torch.arange(d)
    yield own
    for r in range(d - d % 2, 0, -2):
        yield torch.cat([own[:r].roll(r // 2), own[r:]])
        yield torch.cat([own[:r].view(-1, 2).flip(1).flatten(), own[r:]])


@torch.no_grad()
def _once(module: nn.Module, s: Tensor) -> Callable[[], None]:
    undo = kept(module.parameters(recurse=False))
    _scale(module, s, None)
    return undo


@torch.no_grad()
def _felt_elsewhere(block: nn.Module, call, name: str) -> bool:
    """Whether another output at the first token changes what the block returns at others."""
    before = first(call())
    tokens = before.shape[-2]

    def hook(module, args, out):  # [batch, tokens, ...], or [batch, heads, tokens, d]
        axis = 1 if out.shape[1] == tokens or out.ndim < 4 else 2
        out = out.clone()
        out.select(axis, 0).mul_(-2)
        return out

    handle = block.get_submodule(name).register_forward_hook(hook)
    try:
        after = first(call())
    finally:
        handle.remove()
    return change(before[..., 1:, :], after[..., 1:, :]) > SAME
