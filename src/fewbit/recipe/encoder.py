"""8-bit BERT: per embedding group (PEG), 16-bit residual sums, and tables and weights of 2 to 4 bits.

    x = LayerNorm(a),   h = FFN(x),   y = x + h,   out = LayerNorm(y)

In h and y a few embedding dimensions are a hundred times wider than the rest, at a few tokens ([SEP], [CLS],
punctuation): one step for the whole tensor then leaves the other dimensions a handful of codes. Two ways out
after training:

    mixed     x, h and y keep 16 bits (65,536 levels of fixed point), all else 8
    peg       x, h and y get K steps, one for each of K equal groups of embedding dimensions; sorted by range
              first, so that wide dimensions share a group (the order is that of h, the same for x, h and y,
              or the sum would have to be reordered and rescaled)

Bondarenko, Nagel, Blankevoort 2021, "Understanding and Overcoming the Challenges of Efficient Transformer
Quantization", https://arxiv.org/abs/2109.12948: sections 3 (the outliers), 4 (mixed, PEG), 5 (low bits).
Activations are affine with static steps, weights symmetric with one step per tensor and the range of least
squared error.

The road not taken: one `Recipe` rule per module. A Recipe decides weights of layers and what they read; most
of the tensors here are outputs and sums, and their roles, not their names, are what the paper speaks of.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

import torch
from torch import Tensor, nn

from fewbit.errors import InputError
from fewbit.format.activation import Activation
from fewbit.format.block import Block, Channel, Columns, PerTensor
from fewbit.format.fit import MSE, MinMax, Range
from fewbit.format.format import Format, Zero
from fewbit.format.named import FP32
from fewbit.grid.fixed import Fixed
from fewbit.grid.integer import Int
from fewbit.nn.sites import At, Quantizer, Site, fit, observe, place
from fewbit.transform.maps import Permutation


class Role(StrEnum):
    """What a tensor is to a post-norm encoder layer, in the order of the computation."""

    EMBEDDING_SUM = "embedding_sum"  # token + position + type
    EMBEDDING = "embedding"  # its LayerNorm: the first layer's input
    QUERY = "query"
    KEY = "key"
    VALUE = "value"
    CONTEXT = "context"  # softmax(Q K^T) V, all heads
    ATTENTION = "attention"  # what the output projection writes
    ATTENTION_SUM = "attention_sum"
    X = "x"  # LayerNorm of that: input of the FFN
    GELU = "gelu"
    H = "h"  # output of the FFN
    Y = "y"  # x + h
    OUT = "out"  # LayerNorm of y: output of the layer


RESIDUAL = (Role.X, Role.H, Role.Y)

# transformers' BertModel, alone or inside a model with a head: the end of a module's name, and its sites.
BERT: dict[str, tuple[tuple[Role, At], ...]] = {
    "embeddings.LayerNorm": ((Role.EMBEDDING_SUM, At.INPUT), (Role.EMBEDDING, At.OUTPUT)),
    "attention.self.query": ((Role.QUERY, At.OUTPUT),),
    "attention.self.key": ((Role.KEY, At.OUTPUT),),
    "attention.self.value": ((Role.VALUE, At.OUTPUT),),
    "attention.output.dense": ((Role.CONTEXT, At.INPUT), (Role.ATTENTION, At.OUTPUT)),
    "attention.output.LayerNorm": ((Role.ATTENTION_SUM, At.INPUT), (Role.X, At.OUTPUT)),
    "intermediate": ((Role.GELU, At.OUTPUT),),
    "output.dense": ((Role.H, At.OUTPUT),),
    "output.LayerNorm": ((Role.Y, At.INPUT), (Role.OUT, At.OUTPUT)),
}
_NAME = re.compile(r"(?:.*\.)?(?:(embeddings\.LayerNorm)|encoder\.layer\.(\d+)\.(.+))")


@dataclass(frozen=True)
class Place:
    """A site of a model, what it is, and in which layer (-1: before the first)."""

    site: Site
    role: Role
    layer: int


@dataclass(frozen=True, kw_only=True)
class SiteRule:
    """Tensors of these roles get ``activation``, or stay float with None.

    ``sorted_by``: the columns of all of them are sorted by the range of this role's tensor in their layer
    before they are cut into groups.
    """

    roles: tuple[Role, ...] = tuple(Role)
    activation: Activation | None
    sorted_by: Role | None = None

    def __post_init__(self):
        grouped = self.activation is not None and isinstance(self.activation.format.block, Columns)
        if self.sorted_by is not None and not grouped:
            raise InputError(
                f"columns sorted by {self.sorted_by} need groups of columns to go to; give {self.activation} "
                "a Columns(n) block, or leave sorted_by out"
            )


@dataclass(frozen=True, kw_only=True)
class EncoderRecipe:
    """Formats of an encoder: ``weight`` of the layers' linears, ``embedding`` of the token table, and rules
    for activations, of which the first that names a tensor's role decides. None stays float.
    """

    name: str
    weight: Format | None = None
    embedding: Format | None = None
    rules: tuple[SiteRule, ...] = ()

    def rule_for(self, role: Role) -> SiteRule | None:
        """The first rule that names the role and gives it bits, or None."""
        rule = next((r for r in self.rules if role in r.roles), None)
        return None if rule is None or rule.activation is None else rule


def activation(
    bits: int = 8, *, block: Block = PerTensor(), range: Range = MinMax(), momentum: float | None = None
) -> Activation:
    """A static affine activation of ``bits``: integers with an integer zero up to 8, fixed point above."""
    if bits <= 8:
        grid, zero = Int(bits, signed=False), Zero.INTEGER
    else:
        grid, zero = Fixed(bits, fraction=0, signed=False), Zero.OFFSET
    own = Format(grid=grid, block=block, range=range, zero=zero, scale=FP32)
    return Activation(format=own, static=True, momentum=momentum)


def weight(bits: int = 8, *, per_row: bool = False) -> Format:
    """A symmetric weight of ``bits``, one step for the tensor or each row, range of least squared error."""
    return Format(
        grid=Int(bits), block=Channel() if per_row else PerTensor(), range=_searched(bits), scale=FP32
    )


def table(bits: int = 2) -> Format:
    """An embedding table of ``bits``: every row affine, with a step and an offset, range of least squared
    error. At 2 and 3 bits symmetric rows change sentence embeddings twice as much.
    """
    grid = Int(bits, signed=False)
    return Format(grid=grid, block=Channel(), range=_searched(bits), zero=Zero.OFFSET, scale=FP32)


def _searched(bits: int) -> MSE:
    """The search reaches far enough down for 2 bits."""
    return MSE(weighted=False, shrink=0.4 if bits > 4 else 0.05, steps=12 if bits > 4 else 40)


def w8a8(*, range: Range = MinMax(), momentum: float | None = None) -> EncoderRecipe:
    """All weights and activations in 8 bits, one step per tensor: the baseline that fails."""
    rule = SiteRule(activation=activation(range=range, momentum=momentum))
    return EncoderRecipe(name="w8a8", weight=weight(), embedding=weight(), rules=(rule,))


def mixed(*, roles: tuple[Role, ...] = RESIDUAL, base: EncoderRecipe | None = None) -> EncoderRecipe:
    """``base`` (`w8a8`) with 16 bits for ``roles``: the paper's MP-PTQ."""
    base = base or w8a8()
    rule = SiteRule(roles=roles, activation=activation(16))
    return replace(base, name=f"{base.name}+mixed", rules=(rule, *base.rules))


def peg(
    *,
    hidden: int,
    groups: int = 6,
    permute: bool = True,
    roles: tuple[Role, ...] = RESIDUAL,
    base: EncoderRecipe | None = None,
) -> EncoderRecipe:
    """``base`` (`w8a8`) with ``groups`` steps along the ``hidden`` dimensions of ``roles``: PEG-PTQ.

    Raises InputError when the groups do not divide the dimensions.
    """
    if not 1 <= groups <= hidden or hidden % groups:
        fits = [k for k in (2, 3, 4, 6, 8, 12, 16, 24, 32) if hidden % k == 0]
        raise InputError(f"{groups} groups do not divide {hidden} embedding dimensions; choose from {fits}")
    base = base or w8a8()
    rule = SiteRule(
        roles=roles,
        activation=activation(block=Columns(hidden // groups)),
        sorted_by=Role.H if permute else None,
    )
    return replace(base, name=f"{base.name}+peg{groups}{'p' * permute}", rules=(rule, *base.rules))


def places(model: nn.Module) -> tuple[Place, ...]:
    """Every site of a BERT that the table names. Raises InputError for a model without any."""
    out = []
    for name, _ in model.named_modules():
        match = _NAME.fullmatch(name)
        for role, at in BERT.get(match[1] or match[3], ()) if match else ():
            out.append(Place(Site(name, at), role, -1 if match[2] is None else int(match[2])))
    if not any(p.role is Role.Y for p in out):
        raise InputError(
            f"{type(model).__name__} has no layers named as in BERT (encoder.layer.0.output.LayerNorm): "
            "expected a BertModel, alone or with a head"
        )
    return tuple(out)


def range_order(spread: Tensor) -> Permutation:
    """Columns sorted by their range max - min [d], narrowest first."""
    return Permutation(spread.argsort(stable=True))


@dataclass(frozen=True, kw_only=True)
class Placed:
    """What stands in the model: the quantizer of every site, and ``remove()``, which takes them out."""

    quantizers: Mapping[Site, Quantizer]
    remove: Callable[[], None]


def quantize_encoder(
    model: nn.Module, recipe: EncoderRecipe, batches: Sequence[Mapping[str, Tensor]]
) -> Placed:
    """Round weights and the token table in place, calibrate on the result, then set the quantizers.

    Position and type tables, biases and norms stay float (position and type are read together with the token
    in the embedding sum, which is quantized). ``batches`` are keywords of ``model``. Raises InputError for a
    model that is no BERT, and for groups that do not divide a tensor's columns.
    """
    every = places(model)
    for parameter, fmt in weights(model, recipe):
        with torch.no_grad():
            parameter.copy_(fmt.quantize(parameter).dequantize(parameter.dtype))
    rules = {p: rule for p in every if (rule := recipe.rule_for(p.role)) is not None}
    sorting = [q for p, rule in rules.items() for q in every if _sorts(q, p, rule)]
    seen = observe(model, list(dict.fromkeys(p.site for p in (*rules, *sorting))), batches) if rules else {}
    quantizers = {}
    for p, rule in rules.items():
        order = None
        if rule.sorted_by is not None:
            by = next((q for q in every if _sorts(q, p, rule)), None)
            if by is None:
                raise InputError(f"{p.site} cannot be sorted: its layer has no tensor {rule.sorted_by}")
            order = range_order(seen[by.site].spread)
        quantizers[p.site] = fit(rule.activation, seen[p.site], order)
    return Placed(quantizers=quantizers, remove=place(model, quantizers))


def weights(model: nn.Module, recipe: EncoderRecipe) -> Iterator[tuple[nn.Parameter, Format]]:
    """The matrices that the recipe rounds, with their formats: the token table, then the layers' linears."""
    if recipe.embedding is not None:
        yield model.get_input_embeddings().weight, recipe.embedding
    if recipe.weight is not None:
        for name, module in model.named_modules():
            match = _NAME.fullmatch(name)
            if isinstance(module, nn.Linear) and match and match[2] is not None:
                yield module.weight, recipe.weight


def _sorts(candidate: Place, p: Place, rule: SiteRule) -> bool:
    return candidate.role is rule.sorted_by and candidate.layer == p.layer
