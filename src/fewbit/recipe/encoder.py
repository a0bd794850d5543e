"""8-bit BERT: 16-bit residual sums, or a step per embedding group (PEG); tables and weights of 2 to 8 bits.

    x = LayerNorm(a),   h = FFN(x),   y = x + h,   out = LayerNorm(y)

In h and y a few embedding dimensions are a hundred times wider than the rest, at a few tokens ([SEP], [CLS],
punctuation): one step for the whole tensor then leaves the other dimensions a handful of codes. Two ways out
after training:

    mixed_precision   x, h and y keep 16 bits (65,536 levels of fixed point), all else 8
    peg_encoder       x, h and y get K steps, one for each of K equal groups of embedding dimensions; sorted
                      by range first, so that wide dimensions share a group (the order is that of h, the same
                      for x, h and y, or the sum would have to be reordered and rescaled)

Bondarenko, Nagel, Blankevoort 2021, "Understanding and Overcoming the Challenges of Efficient Transformer
Quantization", https://arxiv.org/abs/2109.12948: sections 3 (the outliers), 4 (mixed, PEG), 5 (low bits).
Activations are affine with static steps, weights symmetric with one step per tensor and the range of least
squared error. Which tensors there are: ``fewbit.recipe.sites``.
"""

from __future__ import annotations

from fewbit.errors import InputError
from fewbit.format.activation import Activation
from fewbit.format.block import Block, Channel, Columns, PerTensor
from fewbit.format.fit import MSE, MinMax, Percentile, Range
from fewbit.format.format import Format, Zero
from fewbit.format.named import FP32
from fewbit.format.octav import OCTAV
from fewbit.grid.fixed import Fixed
from fewbit.grid.integer import Int
from fewbit.recipe.recipe import Recipe, Rule
from fewbit.recipe.sites import Role, SiteRule
from fewbit.recipe.weights import choice

RESIDUAL = "x,h,y"


def activation(
    bits: int = 8,
    *,
    block: Block = PerTensor(),
    range: Range = MinMax(),
    momentum: float | None = None,
    groups: int | None = None,
) -> Activation:
    """A static affine activation of ``bits``: integers with an integer zero up to 8, fixed point above."""
    if bits <= 8:
        grid, zero = Int(bits, signed=False), Zero.INTEGER
    else:
        grid, zero = Fixed(bits, fraction=0, signed=False), Zero.OFFSET
    own = Format(grid=grid, block=block, range=range, zero=zero, scale=FP32)
    return Activation(format=own, static=True, momentum=momentum, groups=groups)


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


def mixed_precision(
    *,
    residual_bits: int = 16,
    residual: str = RESIDUAL,
    activation_bits: int = 8,
    weight_bits: int | None = 8,
    embedding_bits: int | None = 8,
    per_row: bool = False,
    range: str = "minmax",
    momentum: float | None = None,
) -> Recipe:
    """BERT-like encoders in W8A8, with 16 bits for the residual sums: input, output and sum of each FFN.

    residual_bits: of the tensors that ``residual`` names (x,h,y; any of fewbit.recipe.sites.Role, joined by
    commas); 8 is W8A8 per tensor, which fails. weight_bits, embedding_bits: of the layers' linears and of the
    token table, none stays float; per_row: a step per row of both instead of one per tensor, the table's
    affine. range: of all 8-bit activations: minmax, percentile, mse, octav; momentum: a moving average of the
    ranges of batches instead, 0.9 is usual.
    """
    bits = _bits("residual_bits", residual_bits, 4, 16)
    sums = activation(bits) if bits > 8 else activation(bits, range=_fit(range), momentum=momentum)
    rule = SiteRule(roles=_roles(residual), activation=sums)
    rest = _rest(activation_bits, range, momentum)
    return _recipe("mixed_precision", (rule, rest), weight_bits, embedding_bits, per_row)


def peg_encoder(
    *,
    groups: int = 6,
    permute: bool = True,
    residual: str = RESIDUAL,
    activation_bits: int = 8,
    weight_bits: int | None = 8,
    embedding_bits: int | None = 8,
    per_row: bool = False,
    range: str = "minmax",
    momentum: float | None = None,
) -> Recipe:
    """BERT-like encoders in W8A8, with a step for each of K groups of embedding dimensions in residual sums.

    groups: K, which has to divide the dimensions; permute: sort these by their range in h first; the others
    as in mixed-precision. residual: the tensors that have groups.
    """
    if groups < 1:
        raise InputError(
            f"{groups} groups of embedding dimensions cannot be; give --set groups=6, or 1 to 64"
        )
    own = activation(_bits("activation_bits", activation_bits, 4, 8), block=Columns(1), groups=groups)
    rule = SiteRule(roles=_roles(residual), activation=own, sorted_by=Role.H if permute else None)
    rest = _rest(activation_bits, range, momentum)
    return _recipe("peg_encoder", (rule, rest), weight_bits, embedding_bits, per_row)


def _rest(bits: int, range: str, momentum: float | None) -> SiteRule:
    """The rule of all other tensors."""
    bits = _bits("activation_bits", bits, 4, 16)
    return SiteRule(activation=activation(bits, range=_fit(range), momentum=momentum))


def _recipe(
    name: str, sites: tuple[SiteRule, ...], weight_bits: int | None, embedding_bits: int | None, per_row: bool
) -> Recipe:
    """Weights and the token table beside these rules for activations."""
    rules, tokens = (), None
    if weight_bits is not None:
        rules = (Rule(weight=weight(_bits("weight_bits", weight_bits, 2, 8), per_row=per_row)),)
    if embedding_bits is not None:
        bits = _bits("embedding_bits", embedding_bits, 2, 8)
        tokens = table(bits) if per_row else weight(bits)
    return Recipe(name=name, rules=rules, sites=sites, embedding=tokens)


def _fit(name: str) -> Range:
    """A range rule by its name. The search of mse reaches past outliers of a hundred times the rest."""
    far = MSE(weighted=False, shrink=0.02, steps=50)
    return choice(
        "range", name, {"minmax": MinMax(), "percentile": Percentile(), "mse": far, "octav": OCTAV()}
    )


def _roles(names: str) -> tuple[Role, ...]:
    """Roles joined by commas; SiteRule refuses other words."""
    return tuple(name.strip().lower() for name in names.split(","))


def _bits(setting: str, bits: int, least: int, most: int) -> int:
    if not least <= bits <= most:
        raise InputError(f"{setting}={bits} is out of range: give {least} to {most}")
    return bits
