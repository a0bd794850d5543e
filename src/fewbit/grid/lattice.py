"""Lattice codebooks: E8P, 65536 points of R^8 from 256 patterns, and residual (additive) codes.

    value(c) = sign_c * abs[c >> 8] +- 1/4,        abs: entries 1/2, 3/2, 5/2;  sign_c: from c & 255

The unshifted points are half-integer with an even sum: D8 + 1/2, a coset of E8, the densest packing of R^8.
The 256 patterns are the 227 of squared norm up to 10 and 29 of norm 12, those and in the order that the
paper's checkpoints have. Seven signs are stored; the eighth makes the sum even, and its place carries the
shift, which doubles the points. 2 bits a weight at 0.0914 on N(0, 1), where the best scalars have
0.1175. QuIP#, Tseng et al. 2024, https://arxiv.org/abs/2402.04396, section 4.2 and appendix C.

    Residual:  value = first + second / gain,        second codes (x - first) * gain        (section 4.3)

Exact encoding. For each shift, of y = x - shift the magnitudes are matched with patterns and the signs are
those of y. The 227 are all permutations of seven, so the best order is that of the sorted |y|: seven sums.
The other 29 are tried one by one. Where the number of negative y is not that of the pattern's parity, one
entry of 1/2 takes the other sign, which costs least at the least |y|; an entry of 3/2 never does, since +1/2
in its place is a pattern too, and nearer.

Shapes: x [..., 8]; codes [...]; y [2, N, 8] for both shifts.

Road not taken: products with the 1366 points that can be nearest once signs are removed (the reference's
encoder). The same codes, 12 us a vector against 1.2 to 2.5 here on a CPU core.
"""

import functools
import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fewbit.errors import InputError
from fewbit.grid.grid import Description, Grid
from fewbit.grid.points import Points, rows_of

# The patterns of norm 12: where their three entries of 1/2 stand; the others are 3/2.
_LISTED = (
    "123 023 013 012 367 357 347 356 346 345 267 257 247 256 246 "
    "245 167 157 147 156 146 045 067 057 047 056 046 014 237"
)
_BIT = (0, 4, 1, 5, 2, 6, 3, 7)  # which bit of the sign byte belongs to each coordinate
_RUNS = ((), (1,), (1, 1), (1, 1, 1), (1, 1, 1, 1), (2,), (2, 1))  # entries - 1/2 of the seven, sorted


@dataclass(frozen=True)
class E8P(Grid):
    """QuIP#'s lattice codebook: width 8, 16 bits, points of rms 1.094 and entries up to 2.75.

    A code is the index of the pattern times 256 plus the sign byte, int16 that holds the bit pattern.
    """

    name = "e8p"
    bits = 16
    width = 8
    code_dtype = torch.int16
    min, max = -2.75, 2.75

    def round(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Codes [...] of the points nearest to x [..., 8]; see `Grid.round`.

        Of equally near points: the shift of +1/4 before -1/4, the pattern of lower norm, the larger entry at
        the lower coordinate. Raises InputError for another last side, and for a generator.
        """
        rows = rows_of(self, x, generator)
        parts = rows.split(1 << (12 if x.device.type == "cpu" else 16))
        return torch.cat([_encode(part) for part in parts]).view(x.shape[:-1]).to(torch.int16)

    def value(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """The points [..., 8] of codes [...]; see `Grid.value`."""
        index = codes.to(torch.int32).reshape(-1) & 0xFFFF
        return _points(codes.device, dtype).index_select(0, index).view(*codes.shape, 8)

    def describe(self) -> Description:
        """Its dynamic range is that of the points' lengths."""
        shortest, longest = _points(torch.device("cpu"), torch.float64).norm(dim=1).aminmax()
        return self._describe(distinct=2**16, decibels=20 * math.log10(longest / shortest))


@dataclass(frozen=True)
class Residual(Grid):
    """Two codes that add up: ``first + second / gain``; the second one codes what the first one left.

    ``name``: found by `by_name` if it is one of RESIDUALS. Raises InputError for grids of different widths,
    more than 62 bits and a gain that is not positive.
    """

    first: Grid
    second: Grid
    gain: float
    name: str = ""

    def __post_init__(self):
        if self.first.width != self.second.width or self.bits > 62 or not 0 < self.gain < math.inf:
            raise InputError(
                f"{self.first} + {self.second} / {self.gain} is no residual code: that takes grids of one "
                f"width, here {self.first.width} and {self.second.width}, up to 62 bits and a positive gain"
            )
        object.__setattr__(self, "name", self.name or f"{self.first}+{self.second}/{self.gain:g}")

    @property
    def bits(self) -> int:
        return self.first.bits + self.second.bits

    @property
    def width(self) -> int:
        return self.first.width

    @property
    def min(self) -> float:
        return self.first.min + self.second.min / self.gain

    @property
    def max(self) -> float:
        return self.first.max + self.second.max / self.gain

    def round(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The nearest point of the first grid, then of the second; a generator is the second one's."""
        x = x.detach() if x.dtype == torch.float64 else x.detach().float()
        first = self.first.round(x)
        second = self.second.round((x - self.first.value(first, x.dtype)) * self.gain, generator)
        low, high = self.first.to_unsigned(first).long(), self.second.to_unsigned(second).long()
        return (low | high << self.first.bits).to(self.code_dtype)

    def value(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """``first + second / gain``, added in float32, or float64 where that is asked for."""
        fields, wide = self.to_unsigned(codes).long(), torch.promote_types(dtype, torch.float32)
        first = self.first.from_unsigned(fields & (2**self.first.bits - 1))
        second = self.second.from_unsigned(fields >> self.first.bits)
        return (self.first.value(first, wide) + self.second.value(second, wide) / self.gain).to(dtype)

    def describe(self) -> Description:
        """``distinct`` counts pairs of points: sums may coincide."""
        pairs = self.first.describe().distinct * self.second.describe().distinct
        return self._describe(distinct=pairs, decibels=None)


def patterns() -> Tensor:
    """[256, 8] float32: the magnitudes in the reference's order."""
    ball = [p for p in itertools.product((1, 3, 5), repeat=8) if sum(v * v for v in p) <= 40]
    listed = [tuple(3 - 2 * (str(i) in halves) for i in range(8)) for halves in _LISTED.split()]
    return torch.tensor(ball + listed, device="cpu") / 2


@functools.lru_cache(maxsize=16)
def _points(device: torch.device, dtype: torch.dtype) -> Tensor:
    """[65536, 8] in code order: 2 MB in float32, read faster than signs can be worked out."""
    with torch.inference_mode(False):
        base, byte = patterns(), torch.arange(256, device="cpu")
        base[:, 7] *= 1 - 2 * (base.sum(1) % 2)  # stored vectors have an even sum
        bits = byte[:, None] >> torch.tensor(_BIT, device="cpu") & 1
        odd = bits.sum(1, keepdim=True) % 2
        bits[:, :1] ^= odd
        return (base[:, None] * (1 - 2 * bits) + (0.25 - 0.5 * odd)).view(-1, 8).to(device, dtype)


@functools.lru_cache(maxsize=16)
def _tables(device: torch.device) -> tuple[Tensor, ...]:
    """What `_encode` looks up, int64: powers of 3 [8] and the index of a pattern whose entries - 1/2 are the
    digits of a number [3^8]; the seven classes [7, 8] and their half squared norms [7]; the places of 1/2 in
    the listed ones [29, 3]; weights of the sign bits [8].
    """
    with torch.inference_mode(False):
        powers, index = 3 ** torch.arange(8, device="cpu"), torch.zeros(3**8, dtype=torch.long, device="cpu")
        index[((patterns() - 0.5).long() * powers).sum(1)] = torch.arange(256, device="cpu")
        runs = torch.tensor([(*run, *[0] * (8 - len(run))) for run in _RUNS], device="cpu")
        halves = torch.tensor([[int(i) for i in each] for each in _LISTED.split()], device="cpu")
        norms = ((runs + 0.5).square().sum(1) / 2).long()
        return tuple(
            t.to(device) for t in (powers, index, runs, norms, halves, 1 << torch.tensor(_BIT, device="cpu"))
        )


def _encode(x: Tensor) -> Tensor:
    """Codes [N] int64 of the nearest points to x [N, 8]. See the top of the file."""
    powers, index, runs, norms, halves, weights = _tables(x.device)
    y = torch.stack([x - 0.25, x + 0.25])
    a, negative = y.abs(), y < 0
    odd, total = negative.sum(-1) % 2, a.sum(-1)
    ordered, order = a.sort(stable=True, descending=True)

    top, least = ordered.unbind(-1), ordered[..., 7]
    one, two, three, four = itertools.accumulate(top[:4])
    ball = torch.stack([torch.zeros_like(one), one, two, three, four, 2 * one, two + one])  # [7, 2, N]
    ball += total / 2 - norms[:, None, None]
    parity = runs.sum(1) % 2  # of the sum of a pattern's entries, 4 + those of the run
    ball -= (parity[:, None, None] != odd) * least
    best, which = ball.max(0)

    at = a.permute(2, 0, 1).flatten(1)
    u, v, w = (at.index_select(0, place).view(29, 2, len(x)) for place in halves.T)  # [29, 2, N]
    listed = (1.5 * total - 6) - (u + v + w + torch.minimum(torch.minimum(u, v), w) * (1 - odd))
    best_listed = listed.amax(0)

    score = torch.maximum(best, best_listed)  # y . c - |c|^2 / 2 = (|x|^2 - |x - value|^2) / 2 + shift sum(x)
    lower = score[1] - x.sum(-1) / 4 > score[0] + x.sum(-1) / 4

    def chosen(t: Tensor) -> Tensor:  # [2, N] or [2, N, k] of the better shift
        return torch.where(lower if t.ndim == 2 else lower[:, None], t[1], t[0])

    a, negative, order, odd, which = map(chosen, (a, negative, order, odd, which))
    outer = chosen(best_listed > best)
    places = halves[torch.where(lower, listed[:, 1], listed[:, 0]).argmax(0)]  # [N, 3]
    digits = torch.where(outer, powers.sum() - powers[places].sum(1), (runs[which] * powers[order]).sum(1))
    flip = torch.where(outer, places.gather(1, a.gather(1, places).argmin(1)[:, None])[:, 0], order[:, 7])
    parity = torch.where(outer, 1, parity[which])
    signs = (negative * weights).sum(1) ^ torch.where(parity != odd, weights[flip], 0) ^ parity << 7
    return index[digits] << 8 | (signs ^ lower)


# Squared norm up to 2: 0, two entries of +-1, eight of +-1/2 with an even sum; and 15 of the 16 of +-2.
_ONE_BIT = (
    *(p for p in itertools.product((-1, 0, 1), repeat=8) if sum(map(abs, p)) in (0, 2)),
    *(p for p in itertools.product((-0.5, 0.5), repeat=8) if sum(p) % 2 == 0),
    *(tuple(2 * s * (i == j) for j in range(8)) for i, s in [*itertools.product(range(8), (1, -1))][:-1]),
)
RESIDUALS: tuple[Residual, ...] = (
    Residual(E8P(), Points("e8-n256", _ONE_BIT), 2.04, "e8p-3b"),
    Residual(E8P(), E8P(), 3.45, "e8p-4b"),
)
