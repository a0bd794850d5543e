"""Product and Products: in which formats a linear layer multiplies, forward and backward.

    forward          y  = x W^T       x [m, k],   W [n, k]       sums over k, the inputs
    input gradient   dx = G W         G [m, n],   W^T [k, n]     sums over n, the outputs
    weight gradient  dW = G^T x       G^T [n, m], x^T [k, m]     sums over m, the tokens

All three are A B^T, with A and B laid out so that their last axis is summed over. So a `Format` says all
there is to say of an operand: ``Channel`` is "row-wise", ``Group(128)`` are blocks along the sum, ``Block2d``
serves a weight and its transpose. What one product sums over, the next does not: a copy of x for the weight
gradient is quantized again from the wide x, unless blocks are the same either way (one step a tensor, square
tiles), where codes are transposed.

The seam. A faster road may take the place of each of these by itself; all else is written in terms of them:

    cast(x, how)               x [r, c] -> codes and steps, padded with zeros so that blocks tile: `QTensor`
    copies(x, along, across)   the same of x and of x^T, where one reading of x could make both
    multiply(a, b, shape)      a b^T, wide or quantized, zeros cut off        roads: ``fewbit.kernel.scaled``

NaN or Inf in a block makes its step NaN, so that whatever it is multiplied with is NaN: a saturating cast
would turn an overflow into a large and plausible number, and no loss scaler would notice.

Micikevicius et al. 2022, "FP8 Formats for Deep Learning", https://arxiv.org/abs/2209.05433. A Hadamard map R
with random signs along the sum, (A R)(B R)^T = A B^T, spreads outliers before rounding: NVIDIA 2025,
"Pretraining Large Language Models with NVFP4", https://arxiv.org/abs/2509.25149. Stochastic rounding draws
from torch's default generator of the device, so that a run which restores it repeats its bits.

Road not taken: a class per recipe. torchao's three, TransformerEngine's four and SwitchBack's three differ in
the fields here and in nothing else.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from enum import StrEnum

import torch
from torch import Tensor
from torch.nn import functional as F

from fewbit.errors import InputError
from fewbit.format import (
    AbsMax,
    Block2d,
    Channel,
    Format,
    Group,
    Params,
    PerTensor,
    PowerOfTwo,
    QTensor,
    Zero,
)
from fewbit.format.affine import raw_step
from fewbit.grid.floating import E5M2
from fewbit.kernel import scaled
from fewbit.transform.hadamard import Hadamard

SIGNS = 0  # seed of the signs of the Hadamard maps: one vector for the whole run, the same on every rank


@dataclass(frozen=True, kw_only=True)
class Cast:
    """How an operand is quantized: its format (None: it stays wide), the size of the Hadamard map along its
    last axis (0: none), how it is rounded, and the multiples that its sides are padded to.
    """

    format: Format | None = None
    hadamard: int = 0
    stochastic: bool = False
    tile: tuple[int, int] = (1, 1)

    def turns(self, other: Cast) -> bool:
        """True where the transpose of this copy is the other one: the same numbers, blocks alike either
        way.
        """
        own = self.format
        if own is None or own != other.format or self.hadamard or other.hadamard:
            return False
        if self.stochastic or other.stochastic or self.tile != other.tile[::-1]:
            return False
        block, nested = own.block, own.scale
        square = isinstance(block, Block2d) and block.rows == block.cols
        return (square or block == PerTensor()) and (nested.scale is None or nested.block == PerTensor())


@dataclass(frozen=True, kw_only=True)
class Product:
    """One product A B^T of a linear layer: the formats of its operands, or of neither (it stays wide).

    left, right: formats without zeros, of scalars, in blocks `PerTensor`, `Channel`, `Group` or `Block2d`;
    hadamard: size of the Hadamard map along the sum, a power of 2, 0 for none; stochastic: whether left and
    right round stochastically; fast: short sums of tensor cores, of about 14 bits on Hopper. Raises
    ``InputError`` for what cannot be multiplied.
    """

    left: Format | None = None
    right: Format | None = None
    hadamard: int = 0
    stochastic: tuple[bool, bool] = (False, False)
    fast: bool = False

    def __post_init__(self):
        pair = [f for f in (self.left, self.right) if f is not None]
        if len(pair) == 1:
            raise InputError(f"one operand is {pair[0]} and the other wide; give both a format, or neither")
        if not pair and (self.hadamard or any(self.stochastic) or self.fast):
            raise InputError("a wide product has no Hadamard map, rounding or fast sums; give formats")
        for fmt in pair:
            _check(fmt)
        if self.hadamard < 0 or self.hadamard & (self.hadamard - 1) or self.hadamard == 1:
            raise InputError(f"a Hadamard map of {self.hadamard} is none; use 16, another power of 2, or 0")
        if pair and all(f.grid == E5M2 for f in pair):
            raise InputError("no tensor core multiplies E5M2 by E5M2; give one operand in E4M3")

    @property
    def wide(self) -> bool:
        """True where nothing is quantized."""
        return self.left is None

    @property
    def casts(self) -> tuple[Cast, Cast]:
        """How the left and the right operand are made."""
        if self.wide:
            return Cast(), Cast()
        (top, own), (low, other) = _tile(self.left), _tile(self.right)
        along = math.lcm(scaled.ALIGNED, own, other, max(1, self.hadamard))
        made = Cast(hadamard=self.hadamard)
        tiles = (math.lcm(scaled.ALIGNED, top), along), (math.lcm(scaled.ALIGNED, low), along)
        return (
            replace(made, format=self.left, stochastic=self.stochastic[0], tile=tiles[0]),
            replace(made, format=self.right, stochastic=self.stochastic[1], tile=tiles[1]),
        )


class Keep(StrEnum):
    """What of the input is held from forward to backward."""

    WIDE = "wide"  # x as it came
    CODES = "codes"  # x as the forward product saw it: half of bfloat16's bytes, or less


@dataclass(frozen=True, kw_only=True)
class Products:
    """How a linear layer computes: its three products, what it keeps for backward, how steps are found.

    history: 0, steps are fitted to the tensor at hand; H > 0, to the largest of the last H amaxes (delayed
    scaling, see ``amaxes``), which wants one step a tensor everywhere. Raises ``InputError`` for what does
    not go together.
    """

    forward: Product = Product()
    input_gradient: Product = Product()
    weight_gradient: Product = Product()
    keep: Keep = Keep.WIDE
    history: int = 0

    def __post_init__(self):
        if self.keep is Keep.CODES and (self.forward.wide or self.forward.hadamard):
            raise InputError("codes to keep need a quantized forward product without a map; use Keep.WIDE")
        if self.history < 0:
            raise InputError(f"a history of {self.history} amaxes is impossible; use 16, or 0 for none")
        if not self.history:
            return
        three = self.forward, self.input_gradient, self.weight_gradient
        formats = [f for p in three for f in (p.left, p.right) if f is not None]
        if any(p.hadamard for p in three) or any(f.block != PerTensor() for f in formats):
            raise InputError("delayed scaling needs one step a tensor everywhere, and no Hadamard map")


def steps(fmt: Format, x: Tensor, amax: Tensor | None = None) -> Params:
    """Steps of x [r, c] by the format's range rule; NaN for blocks with NaN or Inf, which ``Format.fit``
    refuses. amax: largest magnitudes of the blocks [*scale_shape], where they are known.
    """
    amax = fmt.block.split(x).abs().amax(-1) if amax is None else amax
    bad = ~amax.isfinite()
    lo, hi = fmt.range(amax.masked_fill(bad, 0).unsqueeze(-1), fmt, None)
    raw = raw_step(fmt, lo, hi)
    scale = fmt.store(raw, raw)
    if isinstance(scale, QTensor):
        nan = scale.format.grid.round(amax - amax)  # where it is bad; a constant NaN trips the compiler
        return Params(scale=replace(scale, codes=torch.where(bad, nan, scale.codes)), zero=None)
    return Params(scale=scale.masked_fill(bad, math.nan), zero=None)


def cast(x: Tensor, how: Cast, amax: Tensor | None = None) -> QTensor | Tensor:
    """The copy of x [r, c] that a product asks for, its sides padded with zeros to multiples of ``how.tile``.

    Steps are fitted to x, or to ``amax`` [], where that is given; in float32, or float64 where x is.
    """
    fmt = how.format
    if fmt is None:
        return x
    x = x if x.dtype == torch.float64 else x.float()
    rows, columns = (-n % t for n, t in zip(x.shape, how.tile, strict=True))
    if rows or columns:
        x = F.pad(x, (0, columns, 0, rows))
    if how.hadamard:
        x = (x.unflatten(-1, (-1, how.hadamard)) @ _mixing(how.hadamard, x)).flatten(-2)
    return fmt.encode(x, steps(fmt, x, amax), _generator(x.device) if how.stochastic else None)


def copies(
    x: Tensor, along: Cast | None, across: Cast | None, amax: Tensor | None = None
) -> tuple[QTensor | Tensor | None, QTensor | Tensor | None]:
    """The copies of x [r, c] and of x^T that two products ask for; None for one that none asks for."""
    first = None if along is None else cast(x, along, amax)
    if across is None:
        return first, None
    if along is not None and along.turns(across):
        return first, turned(first)
    return first, cast(x.t(), across, amax)


def turned(q: QTensor) -> QTensor:
    """The transpose of a matrix whose blocks are alike either way, see `Cast.turns`."""
    scale = q.scale
    if isinstance(scale, QTensor) and len(scale.shape) == 2:
        scale = replace(scale, codes=scale.codes.t(), shape=scale.shape[::-1])
    elif isinstance(scale, Tensor) and scale.ndim == 2:
        scale = scale.t()
    return replace(q, codes=q.codes.t(), scale=scale, shape=q.shape[::-1])


def multiply(
    a: QTensor | Tensor,
    b: QTensor | Tensor,
    shape: tuple[int, int],
    dtype: torch.dtype,
    fast: bool = False,
) -> Tensor:
    """a b^T, both wide or both quantized and padded alike, cut to ``shape`` [m, n], in ``dtype``."""
    if isinstance(a, QTensor):
        y = scaled.multiply(a, b, dtype, fast)
    else:
        with torch.autocast(a.device.type, enabled=False):
            y = (a @ b.t()).to(dtype)
    return y if y.shape == shape else y[: shape[0], : shape[1]]


def product(a: Tensor, b: Tensor, how: Product) -> Tensor:
    """a b^T [m, n] of a [m, k] and b [n, k], wide, as ``how`` says, in the dtype of a."""
    left, right = how.casts
    return multiply(cast(a, left), cast(b, right), (len(a), len(b)), a.dtype, how.fast)


def _check(fmt: Format) -> None:
    kind = Channel | PerTensor | Group | Block2d
    scalar = fmt.scale is not None and fmt.grid.width == 1 and fmt.codebook is None
    if not scalar or fmt.zero is not Zero.NONE or not isinstance(fmt.block, kind):
        raise InputError(
            f"operands of products have steps and no zeros, per tensor, row, group or tile, got {fmt}; use "
            "e4m3fn, int8-narrow or another such grid"
        )
    if not isinstance(fmt.range, AbsMax | PowerOfTwo):
        raise InputError(
            f"steps of operands come from the largest magnitude, got {type(fmt.range).__name__}; use "
            "AbsMax() or PowerOfTwo()"
        )
    while fmt is not None:  # computed once and here: torch.compile traces no locks of cached properties
        _, fmt = (fmt.reach, fmt.grid.max, fmt.grid.min, fmt.grid.least), fmt.scale


def _tile(fmt: Format) -> tuple[int, int]:
    """Multiples of rows and columns at which blocks of ``fmt``, and those of its steps, begin."""
    block, rows, columns = fmt.block, 1, 1
    if isinstance(block, Group):
        columns = block.size
    elif isinstance(block, Block2d):
        rows, columns = block.rows, block.cols
    if fmt.scale is None or fmt.scale.scale is None:
        return rows, columns
    own = _tile(fmt.scale)
    return rows * own[0], columns * own[1]


def _mixing(size: int, like: Tensor) -> Tensor:
    """R [size, size]: random signs, then the orthonormal Hadamard matrix; a constant of a compiled graph."""
    if torch.compiler.is_compiling():
        return torch.tensor(_entries(size), dtype=like.dtype, device=like.device)
    return Hadamard(size, seed=SIGNS).apply(torch.eye(size, dtype=like.dtype, device=like.device))


@torch.compiler.assume_constant_result
def _entries(size: int) -> list[list[float]]:
    return Hadamard(size, seed=SIGNS).apply(torch.eye(size, dtype=torch.float64)).tolist()


def _generator(device: torch.device) -> torch.Generator:
    """Torch's own for the device: what ``torch.manual_seed`` seeds and checkpoints restore."""
    if device.type != "cuda" or torch.compiler.is_compiling():  # a graph finds its own
        return torch.default_generator
    index = torch.cuda.current_device() if device.index is None else device.index
    return torch.cuda.default_generators[index]
