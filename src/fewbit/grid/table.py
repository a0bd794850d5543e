"""Tables: any list of values as a grid. NF4 and its relatives, learned codebooks of scalars.

A code is the index into the list, in the order given; rounding is to the nearest value, and a number exactly
between two values takes the lower one (as bitsandbytes does for NF4). Values are kept in float32, as every
checkpoint stores them; the midpoints are compared exactly.

NF4 and the dynamic map: QLoRA, https://arxiv.org/abs/2305.14314. NF4's values are quantiles of N(0, 1),
forced to contain -1, 0 and 1 (`normal_quantiles`). The grid itself uses the constants that are shipped, which
differ from the formula by 2e-7, so that codes agree with existing checkpoints. AF4:
https://arxiv.org/abs/2306.06965.

Speed. `bucketize` takes 18 to 22 ns an element for 15 midpoints and 42 for 255 once they no longer fit its
branch prediction, which makes it the whole cost of a range search over NF4. From 8192 elements on, a table
over the leading 18 bits of the float32 gives the answer up to one comparison: 2.6 ns an element (one CPU
core, 1e6 elements; 66 against 318 us at 16384, 24 against 8 us at 1000). Tables too dense for that stay with
bucketize.
"""

import functools
import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

from fewbit.errors import InputError
from fewbit.grid.grid import Description, Grid, lookup

MOST_VALUES = 2**16
_CELL_SHIFT = 14  # a cell of the fast path is 2**14 neighbouring float32 numbers: 0.2 % wide
_CELLS_FROM = 8192  # elements


@dataclass(frozen=True)
class Table(Grid):
    """A grid of listed values. ``Table("ternary", (-1, 0, 1))``.

    ``values`` is any iterable of 2 to 65536 finite numbers, sorted or not, repetitions allowed (the first of
    equal values is the one that `round` chooses); it is kept as a tuple of float32 numbers. Refuses anything
    else.
    """

    name: str
    values: tuple[float, ...]

    def __init__(self, name: str, values: Iterable[float]):
        values = tuple(torch.tensor([float(v) for v in values], dtype=torch.float32, device="cpu").tolist())
        if not 2 <= len(values) <= MOST_VALUES:
            raise InputError(f"a table holds 2 to {MOST_VALUES} values, got {len(values)} for {name!r}")
        if not all(math.isfinite(v) for v in values):
            raise InputError(f"the values of table {name!r} must be finite in float32, got {values}")
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "values", values)

    @property
    def bits(self) -> int:
        return (len(self.values) - 1).bit_length()

    @functools.cached_property
    def min(self) -> float:
        return min(self.values)

    @functools.cached_property
    def max(self) -> float:
        return max(self.values)

    def round(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Index of the nearest value, ties to the lower value; see `Grid.round`. NaN becomes the largest."""
        x = x.detach()
        if x.dtype != torch.float64:
            x = x.float()
        points, cuts, order = _sorted(self, x.device, x.dtype)
        if generator is not None:
            rank = _stochastic_rank(x, points, generator)
        elif x.dtype == torch.float32 and x.numel() >= _CELLS_FROM and _cells(self, x.device) is not None:
            base = lookup(_cells(self, x.device), (x.view(torch.int32) >> _CELL_SHIFT) & (2**18 - 1))
            rank = base + (x > lookup(cuts, base))
        else:
            rank = torch.bucketize(x.contiguous(), cuts[:-1], out_int32=True)  # it warns of strided input
        return rank.to(self.code_dtype) if order is None else lookup(order, rank)

    def value(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """The values at the given indices; see `Grid.value`."""
        return lookup(_values(self, codes.device, dtype), codes)

    def snap(self, x: Tensor) -> Tensor:
        """The nearest value, see `Grid.snap`; compiled, comparisons in a chain, which fuse."""
        if not torch.compiler.is_compiling() or len(self.values) > 16:
            return super().snap(x)
        ranked, wide = sorted(self.values), x.double()  # in float64 a midpoint is exact
        nearest = torch.full_like(x, ranked[0])
        for low, high in itertools.pairwise(ranked):
            nearest = torch.where(wide > (low + high) / 2, high, nearest)
        return nearest

    def _list(self) -> range:
        return range(len(self.values))

    def describe(self) -> Description:
        smallest = min((abs(v) for v in self.values if v), default=math.nan)
        decibels = 20 * math.log10(max(self.max, -self.min) / smallest)
        return self._describe(distinct=len(set(self.values)), decibels=decibels)


def _stochastic_rank(x: Tensor, points: Tensor, generator: torch.Generator) -> Tensor:
    """Rank of the neighbour below x or of the one above, with mean x; outside the range the nearest end."""
    x, points = x.double().contiguous(), points.double()
    below = (torch.bucketize(x, points, right=True) - 1).clamp_(0, len(points) - 2)
    low, high = lookup(points, below), lookup(points, below + 1)
    u = torch.rand(x.shape, generator=generator, dtype=x.dtype, device=x.device)
    return below + (u < (x - low) / (high - low))


@functools.lru_cache(maxsize=256)
def _values(grid: Table, device: torch.device, dtype: torch.dtype) -> Tensor:
    """[n] the values in code order."""
    return torch.tensor(grid.values, dtype=torch.float32, device=device).to(dtype)


@functools.lru_cache(maxsize=256)
def _sorted(grid: Table, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
    """Distinct values ascending [n]; the cut above each [n], the last one Inf; and codes by rank, None if
    0..n-1.

    x belongs to the first rank whose cut is not below it. A cut is the midpoint rounded down to ``dtype``,
    which for x of that dtype compares exactly as the midpoint does: x > midpoint iff x > its rounding down.
    """
    first: dict[float, int] = {}
    for code, value in enumerate(grid.values):
        first.setdefault(value, code)  # 0.0 and -0.0 are one key
    ranked = sorted(first)
    points = torch.tensor(ranked, dtype=torch.float64, device="cpu")
    middle = torch.cat([(points[1:] + points[:-1]) / 2, points.new_tensor([math.inf])])
    cuts = middle.to(dtype)
    cuts = torch.where(cuts > middle, torch.nextafter(cuts, cuts.new_tensor(-math.inf)), cuts)
    codes = [first[value] for value in ranked]
    order = None
    if codes != list(range(len(codes))):
        order = torch.tensor(codes, dtype=grid.code_dtype, device=device)
    return points.to(dtype).to(device), cuts.to(device), order


@functools.lru_cache(maxsize=256)
def _cells(grid: Table, device: torch.device) -> Tensor | None:
    """[2**18] int32: rank of the lowest float32 with these leading bits; None if a cell holds two cuts."""
    _, cuts, _ = _sorted(grid, torch.device("cpu"), torch.float32)
    start = torch.arange(2**18, device="cpu") << _CELL_SHIFT
    ends = torch.stack([start, start + 2**_CELL_SHIFT - 1]).to(torch.int32).view(torch.float32)
    ends[1] = torch.where(ends[1].isnan(), ends[0], ends[1])  # the cells that begin with +-Inf
    ranks = torch.bucketize(ends, cuts[:-1], out_int32=True)
    lowest, highest = ranks.aminmax(dim=0)
    return lowest.to(device) if bool((highest - lowest <= 1).all()) else None


def normal_quantiles(bits: int) -> tuple[float, ...]:
    """The values of a NormalFloat of ``bits`` bits: 2^(bits-1) - 1 negative, 0, and 2^(bits-1) positive ones.

    Evenly spaced quantiles of N(0, 1) on each side, scaled to [-1, 1]. The outermost probability averages
    'half a bin from the edge' of a code with 2^bits levels and of one with a level less, so that the ends are
    finite.
    """
    if not 2 <= bits <= 8:
        raise InputError(f"a NormalFloat has 2 to 8 bits, got {bits!r}")
    n = 2**bits
    edge = 1 - (1 / (2 * n) + 1 / (2 * (n - 1))) / 2
    quantile = NormalDist().inv_cdf

    def side(count: int) -> list[float]:  # `count` quantiles from the edge down to, and without, the median
        return [quantile(edge + (0.5 - edge) * i / count) / quantile(edge) for i in range(count)]

    return tuple(sorted([-v for v in side(n // 2 - 1)] + [0.0] + side(n // 2)))


def dynamic_map() -> tuple[float, ...]:
    """The 256 values of the signed dynamic map that double quantization stores block scales in, ascending.

    For i = 0..6 the means of 2^i equal intervals of [0.1, 1], times 10^(i - 6), with both signs; 0; and 1.
    """
    positive = [
        10.0 ** (i - 6) * (0.1 + 0.9 * (2 * j + 1) / 2 ** (i + 1)) for i in range(7) for j in range(2**i)
    ]
    return tuple(sorted([-v for v in positive] + [0.0] + positive + [1.0]))


def lloyd_max(bits: int) -> tuple[float, ...]:
    """The 2^bits values with the least mean squared error for N(0, 1), ascending, mirrored exactly.

    Quantizing for Minimum Distortion (Max, 1960, eq. 5 and 6): borders b_i = (c_i + c_{i+1}) / 2, and each
    c_i the mean of its cell,

        c_i = m_i,   m_i = (phi(b_{i-1}) - phi(b_i)) / (Phi(b_i) - Phi(b_{i-1}))

    solved for the positive half by Newton's method, whose Jacobian is tridiagonal, from the quantiles of
    N(0, 3). Five steps reach 1e-12; Lloyd's own iteration takes thousands at 8 bits.
    """
    if not 1 <= bits <= 8:
        raise InputError(f"a Lloyd-Max table has 1 to 8 bits, got {bits!r}")
    n = 2 ** (bits - 1)
    c = [NormalDist(0, math.sqrt(3)).inv_cdf(0.5 + (i + 0.5) / (2 * n)) for i in range(n)]
    for _ in range(8):
        b = [0.0, *((low + high) / 2 for low, high in itertools.pairwise(c)), math.inf]
        phi = [math.exp(-v * v / 2) / math.sqrt(2 * math.pi) for v in b]
        tail = [math.erfc(v / math.sqrt(2)) / 2 for v in b]
        mass = [tail[i] - tail[i + 1] for i in range(n)]
        m = [(phi[i] - phi[i + 1]) / mass[i] for i in range(n)]
        # dm_i / dc_{i+1} and dm_i / dc_{i-1}: half of what a border moves, each side for its neighbour.
        up = [(b[i + 1] - m[i]) * phi[i + 1] / mass[i] / 2 if i + 1 < n else 0.0 for i in range(n)]
        down = [(m[i] - b[i]) * phi[i] / mass[i] / 2 if i else 0.0 for i in range(n)]
        diagonal = [1 - up[i] - down[i] for i in range(n)]
        delta = [m[i] - c[i] for i in range(n)]
        for i in range(1, n):  # eliminate downwards, substitute upwards
            diagonal[i] -= down[i] / diagonal[i - 1] * up[i - 1]
            delta[i] += down[i] / diagonal[i - 1] * delta[i - 1]
        for i in reversed(range(n)):
            delta[i] = (delta[i] + (up[i] * delta[i + 1] if i + 1 < n else 0.0)) / diagonal[i]
        c = [v + change for v, change in zip(c, delta, strict=True)]
    return (*(-v for v in reversed(c)), *c)


NF2 = Table("nf2", normal_quantiles(2))
NF3 = Table("nf3", normal_quantiles(3))
NF4 = Table(
    "nf4",
    (
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ),
)
AF4 = Table(
    "af4",  # for blocks of 64; made for the absolute error of absmax-scaled Gaussian blocks
    (
        *(-1.0, -0.69441008, -0.51243739, -0.3736951, -0.25607552, -0.14982478, -0.04934812, 0.0),
        *(0.04273164, 0.12934483, 0.21961274, 0.31675666, 0.42563882, 0.55496234, 0.72424863, 1.0),
    ),
)
_FP4_BNB = tuple(v / 12 for v in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0))
# bitsandbytes' fp4: not E2M1, and in its own code order. Code 8 is a second zero, which rounding never
# chooses.
FP4_BNB = Table("fp4-bnb", (*_FP4_BNB, *(-v for v in _FP4_BNB)))
DYNAMIC8 = Table("dynamic8", dynamic_map())
MICRO = Table("micro1", (0.5, 1.0))  # the 1-bit scale of a pair in shared microexponents (MX9, MX6, MX4)
LLOYD: tuple[Table, ...] = tuple(Table(f"lloyd{bits}", lloyd_max(bits)) for bits in range(1, 9))
# The 2^b odd integers about 0, without a zero: evenly spaced, and balanced at 2 bits (QuEST)
MIDRISE: tuple[Table, ...] = tuple(Table(f"midrise{b}", range(1 - 2**b, 2**b, 2)) for b in range(1, 9))

TABLES: tuple[Table, ...] = (NF2, NF3, NF4, AF4, FP4_BNB, DYNAMIC8, MICRO, *LLOYD, *MIDRISE)
