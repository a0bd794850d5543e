"""Point sets: p columns share one code, whose value is one of n points of R^p. Vector quantization.

    round(x) = argmin_i |x - c_i|^2 = argmax_i (x . c_i - |c_i|^2 / 2)       x, c_i in R^p,  log2(n) / p bits

The second form is one matrix product. The points stored with the library are those of HIGGS,
https://arxiv.org/abs/2411.17525: the least mean squared error for N(0, I_p), made by
``tools/make_gaussian_points.py``; gaussian.json beside them keeps the seed and what was measured. Against the
best scalars (`lloyd_max`) of the same rate they gain what the shape of a cell in p dimensions gives: 0.0077
against 0.0095 per dimension at 4 bits and p = 2. They are read from the file when first used.

Shapes: points [n, p]; x [..., p]; codes [...]. A code is the index of the point.

The road not taken: a k-d tree. For p of 2 to 8 it visits fewer points, but it knows no batches and no GPU.
"""

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib.resources import files

import numpy as np
import torch
from torch import Tensor

from fewbit.errors import InputError
from fewbit.grid.grid import Description, Grid

MOST_POINTS = 2**16
_SCORES = 2**20  # x . c_i held at once: 4 MB
_STORED = (
    *((2, n) for n in (4, 8, 16, 32, 64, 128, 256)),
    *((p, n) for p, sizes in ((3, (64, 512, 4096)), (4, (16, 256, 4096))) for n in sizes),
)


@dataclass(frozen=True, init=False, eq=False)
class Points(Grid):
    """A grid of vectors. ``Points("corners", ((-1, -1), (-1, 1), (1, -1), (1, 1)))``.

    ``values`` is any iterable of 2 to 65536 points of one length p >= 1, finite numbers; a tensor [n, p] will
    do. It is kept as a tuple of tuples of float32 numbers. Without values, the points stored under that name.
    Two grids are equal when name and values are. Refuses anything else.
    """

    name: str
    values: tuple[tuple[float, ...], ...] = field(repr=False)

    def __init__(self, name: str, values: Iterable[Iterable[float]] | None = None):
        object.__setattr__(self, "name", name)
        if values is not None:
            object.__setattr__(self, "values", _checked(name, values))
        elif name not in _NAMES:
            raise InputError(f"no points are stored under {name!r}; give values or {', '.join(_NAMES)}")

    def __getattr__(self, key: str):
        """``values`` of a stored grid, when first asked for: importing the library reads no file."""
        if key != "values":
            raise AttributeError(f"{type(self).__name__} has no attribute {key!r}")
        with files("fewbit.grid").joinpath("data/gaussian.npz").open("rb") as file:
            array = np.load(file, allow_pickle=False)[self.name]
        object.__setattr__(self, "values", tuple(map(tuple, array.tolist())))
        return self.values

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Points) and self.name == other.name and self.values == other.values

    def __hash__(self) -> int:
        return hash(self.name)  # not the values, which would be read, and hashed at every look-up

    @property
    def width(self) -> int:
        return len(self.values[0])

    @property
    def bits(self) -> int:
        return (len(self.values) - 1).bit_length()

    @functools.cached_property
    def min(self) -> float:
        """The smallest coordinate."""
        return min(map(min, self.values))

    @functools.cached_property
    def max(self) -> float:
        """The largest coordinate."""
        return max(map(max, self.values))

    def round(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Index [...] of the point nearest to x [..., p], the lowest of equally near ones; see `Grid.round`.

        Raises InputError for another last dimension, and for a generator: only a scalar has two neighbours.
        """
        rows = rows_of(self, x, generator)
        found = nearest(rows, _values(self, rows.device, rows.dtype))
        return found.view(x.shape[:-1]).to(self.code_dtype)

    def value(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """The points [..., p] of the given indices [...]; see `Grid.value`."""
        points = _values(self, codes.device, dtype)
        return points.index_select(0, codes.to(torch.int32).reshape(-1)).view(*codes.shape, self.width)

    def _list(self) -> range:
        return range(len(self.values))

    def describe(self) -> Description:
        """Its dynamic range is that of the points' lengths, zero left out."""
        lengths = [length for point in self.values if (length := math.hypot(*point))]
        decibels = 20 * math.log10(max(lengths) / min(lengths)) if lengths else math.nan
        return self._describe(distinct=len(set(self.values)), decibels=decibels)


def rows_of(grid: Grid, x: Tensor, generator: torch.Generator | None) -> Tensor:
    """[N, p] float32 or float64, finite, of what a grid of vectors shall round; InputError if it cannot."""
    if generator is not None:
        raise InputError(
            f"{grid.name} cannot round at random: a vector has no two neighbours to choose from; "
            "round to the nearest point, or use a scalar grid"
        )
    if x.ndim == 0 or x.shape[-1] != grid.width:
        raise InputError(f"{grid.name} rounds vectors [..., {grid.width}], got shape {list(x.shape)}")
    x = x.detach() if x.dtype == torch.float64 else x.detach().float()
    return x.reshape(-1, grid.width).clamp(-1e30, 1e30)  # Inf - Inf would be NaN


def nearest(x: Tensor, points: Tensor) -> Tensor:
    """[N] int64: the row of points [n, p] nearest to each row of x [N, p], the lowest of equals.

    Both of one dtype, float32 or float64. Holds 2^20 products at a time.
    """
    half = points.square().sum(1) / 2
    rows = max(1, _SCORES // len(points))
    parts = (torch.addmm(half, part, points.T, beta=-1) for part in x.detach().split(rows))
    if x.device.type != "cpu":
        return torch.cat([scores.argmax(1) for scores in parts])
    # NumPy's argmax is vectorised, torch's is not: 0.12 against 0.47 us for 256 points, products included.
    return torch.cat([torch.from_numpy(scores.numpy().argmax(1)) for scores in parts])


def _checked(name: str, values: Iterable[Iterable[float]]) -> tuple[tuple[float, ...], ...]:
    rows = [tuple(float(v) for v in point) for point in values]
    if not 2 <= len(rows) <= MOST_POINTS or len({len(row) for row in rows}) != 1 or not rows[0]:
        raise InputError(
            f"a point set holds 2 to {MOST_POINTS} points of one length, got {len(rows)} of lengths "
            f"{sorted({len(row) for row in rows})} for {name!r}"
        )
    held = torch.tensor(rows, dtype=torch.float32, device="cpu")
    if not bool(held.isfinite().all()):
        raise InputError(f"the coordinates of points {name!r} must be finite in float32")
    return tuple(map(tuple, held.tolist()))


@functools.lru_cache(maxsize=64)
def _values(grid: Points, device: torch.device, dtype: torch.dtype) -> Tensor:
    """[n, p] the points in code order."""
    with torch.inference_mode(False):
        return torch.tensor(grid.values, dtype=torch.float32, device=device).to(dtype)


_NAMES = tuple(f"higgs-p{p}-n{n}" for p, n in _STORED)
GAUSSIAN: tuple[Points, ...] = tuple(Points(name) for name in _NAMES)
