"""Quantizers at named places of a model that are not inputs of linears: outputs of modules, residual sums.

    x ~ Q(x)       Q: an `Activation` with stored steps, or dynamic ones

Where a linear reads x, `QLinear` rounds it. What a residual adds, what a LayerNorm reads and what a linear
writes have no linear behind them, yet integer hardware holds them in few bits too, and in BERT it is there
that 8 bits fail (Bondarenko, Nagel, Blankevoort 2021, "Understanding and Overcoming the Challenges of
Efficient Transformer Quantization", https://arxiv.org/abs/2109.12948, section 3). A site is the input or the
output of a module; a forward hook replaces the tensor by what its codes mean. A residual sum is the input of
the norm that reads it.

With groups, columns are sorted before they are cut into groups, so that those with large ranges share a step
(section 4, "per-embedding-group"); a step is kept for every column of a group, so that nothing is gathered.

Ranges of static steps come from a few batches (`observe`): over all of them, or their moving average; tokens
under the attention mask are left out, for [PAD] is no input.

The quantizer of a site is a module of its own below the one it belongs to (``X.output_site``): its steps go
where the model goes, and into its state dict. The road not taken: a module around X instead. Sums have no
module to wrap, and every name below X would change.

Shapes: b sentences, t tokens, d columns (embedding dimensions), n rows of a sample.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from enum import StrEnum

import torch
from torch import Tensor, nn

from fewbit.errors import InputError
from fewbit.format.activation import Activation
from fewbit.format.block import Columns, PerTensor
from fewbit.format.format import Params
from fewbit.nn.linear import change_input
from fewbit.nn.stored import Stored


class At(StrEnum):
    """Which tensor of a module."""

    INPUT = "input"
    OUTPUT = "output"


@dataclass(frozen=True)
class Site:
    """The first input, or the output, of the module with this full name: one float tensor [..., d]."""

    module: str
    at: At = At.OUTPUT

    def __str__(self) -> str:
        return f"{self.module}:{self.at}"

    @property
    def child(self) -> str:
        """Name of the quantizer below the module."""
        return f"{self.at}_site"


class Quantizer(Stored):
    """How the tensor of a site is rounded: the Activation, and its steps when static.

    Buffers ``scale`` and ``zero`` [groups of columns, or 1] are the steps, None for dynamic ones.
    """

    def __init__(self, activation: Activation, params: Params | None = None):
        """Raises InputError where steps and Activation do not go together."""
        super().__init__()
        if activation.static is not (params is not None):
            raise InputError(
                f"{activation} {'needs' if activation.static else 'takes no'} stored steps; fit() makes "
                "those of a static one"
            )
        self.activation = activation
        for name in ("scale", "zero"):
            part = getattr(params, name, None)
            self.register_buffer(name, None if part is None else torch.atleast_1d(part))

    @property
    def params(self) -> Params | None:
        """The steps of a static Activation, in the shapes that its Format has for them."""
        if not self.activation.static:
            return None
        whole = isinstance(self.activation.format.block, PerTensor)
        scale, zero = (p.reshape(()) if whole and p is not None else p for p in (self.scale, self.zero))
        return Params(scale=scale, zero=zero)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., d] -> what its codes mean, in x's dtype."""
        return self.activation(x, self.params)

    def extra_repr(self) -> str:
        return str(self.activation)


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What calibration saw at a site, float32.

    low, high [batches, d]: extremes of each column in each batch; rows [n, d]: a sample of tokens; tokens:
    how many there were.
    """

    low: Tensor
    high: Tensor
    rows: Tensor
    tokens: int

    @property
    def spread(self) -> Tensor:
        """Range max - min of each column over all batches [d]."""
        return self.high.amax(0) - self.low.amin(0)


def observe(
    model: nn.Module, sites: Sequence[Site], batches: Sequence[Mapping[str, Tensor]], *, rows: int = 512
) -> dict[Site, Seen]:
    """Run ``model(**batch)`` over the batches and gather what each site sees.

    A batch with an ``attention_mask`` [b, t] has its masked tokens left out. ``rows``: tokens kept of each
    site in all, for range rules that need more than extremes. Raises InputError for a site that the model
    does not have, does not reach, or whose tensor does not hold a row for every token.
    """
    if not batches or rows < 1:
        raise InputError(f"calibration got {len(batches)} batches and {rows} rows; give at least one of each")
    for site in sites:
        _module(model, site)
    found: dict[Site, list[Tensor]] = {site: [] for site in sites}
    mask: Tensor | None = None

    def look(site: Site, x: Tensor) -> None:
        if mask is not None:
            if x.shape[:-1] != mask.shape:
                raise InputError(
                    f"{site} has shape {list(x.shape)} where the mask has {list(mask.shape)}: expected one "
                    "row per token; choose a site of shape [sentences, tokens, columns]"
                )
            x = x[mask]
        if not x.numel():
            raise InputError(f"{site} saw a batch without tokens; leave empty batches out")
        x = x.detach().reshape(-1, x.shape[-1]).float()
        found[site].append(x)

    undo = [_hook(model, site, lambda x, site=site: look(site, x)) for site in found]
    seen: dict[Site, list[tuple[Tensor, Tensor, Tensor, int]]] = {site: [] for site in found}
    share = -(-rows // len(batches))
    try:
        with torch.no_grad():
            for batch in batches:
                given = batch.get("attention_mask")
                mask = None if given is None else given.bool()
                model(**batch)
                for site, parts in found.items():
                    if not parts:
                        raise InputError(f"{site} was not reached by the model; name a module that it calls")
                    seen[site].append(_summary(torch.cat(parts), share))
                    parts.clear()
    finally:
        for each in undo:
            each()
    out = {}
    for site, summaries in seen.items():
        low, high, sample, tokens = zip(*summaries, strict=True)
        out[site] = Seen(
            low=torch.stack(low), high=torch.stack(high), rows=torch.cat(sample), tokens=sum(tokens)
        )
    return out


def _summary(x: Tensor, share: int) -> tuple[Tensor, Tensor, Tensor, int]:
    """Extremes and an even sample of x [tokens, d]."""
    keep = torch.linspace(0, len(x) - 1, min(share, len(x))).long()
    low, high = torch.aminmax(x, dim=0)
    return low, high, x[keep], len(x)


def fit(activation: Activation, seen: Seen, order: Tensor | None = None) -> Quantizer:
    """The quantizer of a site from what calibration saw there.

    Static steps follow the format's range rule over all batches, or with ``activation.momentum`` m the
    average m * old + (1 - m) * new of the batches' extremes, which starts at the first. ``order`` [d] int64:
    the columns as ``activation.groups`` equal groups are cut from them; without it, by their own range.
    Raises InputError for groups that do not divide the columns.
    """
    if not activation.static:
        return Quantizer(activation)
    if activation.momentum is not None:
        low, high = (_moving_average(v, activation.momentum) for v in (seen.low, seen.high))
        return Quantizer(activation, activation.fit_range(low, high))
    low, high = seen.low.amin(0), seen.high.amax(0)
    if activation.groups is None:
        return Quantizer(activation, activation.fit(seen.rows, low, high))
    order = seen.spread.argsort(stable=True) if order is None else order
    size, back = check_groups(activation, len(order)), order.argsort()
    cut = replace(activation, groups=None, format=replace(activation.format, block=Columns(size)))
    p = cut.fit(seen.rows[:, order], low[order], high[order])
    scale, zero = (None if v is None else v.repeat_interleave(size)[back] for v in (p.scale, p.zero))
    return Quantizer(activation, Params(scale=scale, zero=zero))


def check_groups(activation: Activation, columns: int) -> int:
    """Columns in each group. Raises InputError for groups that are not equal."""
    groups = activation.groups or 1
    if groups > columns or columns % groups:
        fits = [k for k in (2, 3, 4, 6, 8, 12, 16, 24, 32) if columns % k == 0]
        raise InputError(f"{groups} groups do not divide {columns} embedding dimensions; choose from {fits}")
    return columns // groups


def _moving_average(v: Tensor, momentum: float) -> Tensor:
    """v [batches, d] -> [d]."""
    mean = v[0]
    for new in v[1:]:
        mean = momentum * mean + (1 - momentum) * new
    return mean


def place(model: nn.Module, quantizers: Mapping[Site, Quantizer]) -> Callable[[], None]:
    """Make the tensors of these sites pass through their quantizers; returns what undoes it.

    Raises InputError for a site that the model does not have, before anything is placed.
    """
    for site in quantizers:
        _module(model, site)
    undo = []
    for site, quantizer in quantizers.items():
        _module(model, site).add_module(site.child, quantizer)
        undo.append(_hook(model, site, None))

    def remove() -> None:
        for each in undo:
            each()
        for site in quantizers:
            delattr(_module(model, site), site.child)

    return remove


def _module(model: nn.Module, site: Site) -> nn.Module:
    modules = dict(model.named_modules())
    if site.module not in modules:
        near = get_close_matches(site.module, modules, n=1)
        raise InputError(
            f"the model has no module {site.module!r} for the site {site}"
            + (f"; did you mean {near[0]!r}?" if near else "; named_modules() lists them")
        )
    return modules[site.module]


def _hook(
    model: nn.Module, site: Site, change: Callable[[Tensor], Tensor | None] | None
) -> Callable[[], None]:
    """Put ``change`` at a site; where it returns None the tensor stays as it is. Without it, the quantizer
    that is placed there, looked up at each call, so that a copy of the model has its own.
    """

    def checked(module: nn.Module, x: Tensor) -> Tensor:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            got = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise InputError(f"{site} is not one float tensor but {got}; choose another module")
        new = getattr(module, site.child)(x) if change is None else change(x)
        return x if new is None else new

    module = _module(model, site)
    if site.at is At.OUTPUT:
        return module.register_forward_hook(lambda module, args, out: checked(module, out)).remove

    def before(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return change_input(lambda x: checked(module, x), args, kwargs)

    return module.register_forward_pre_hook(before, with_kwargs=True).remove
