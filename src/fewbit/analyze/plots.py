"""Two pictures: where the points of a format lie, and what an error costs in bits.

`number_line` shows each grid as a row of points, on a linear axis scaled to its largest value and on a
logarithmic one for magnitudes: integers are even; floats are even inside each binade and bunch near zero;
NF4 follows the quantiles of Gauss; E5M2 spends its bits on range.

`error_against_bits` shows measured mean squared errors in dB against true bits per value, scales included,
for Gauss, Laplace and Student's t, with the bound that no code beats and what the best scalar points approach
(see `fewbit.analyze.distribution`). Six decibels are one bit.

Colours are those of Okabe and Ito, which the usual colour blindnesses tell apart; markers differ as well.

matplotlib is imported inside the functions: it is the optional extra ``report``. Figures are built without
pyplot, so no window system is touched and nothing stays registered.

Road not taken: an interactive picture. A file that a README can show needs no script and no server.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from fewbit.analyze.distribution import SIDE, TABLED, Distribution, lower_bound, panter_dite
from fewbit.analyze.error import best_measured, block_error
from fewbit.errors import InputError
from fewbit.format import FP16, Format, Group
from fewbit.format.named import FORMATS
from fewbit.grid import Fixed, Float, Int, by_name
from fewbit.grid.grid import Grid

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUFFIXES = (".svg", ".png", ".pdf")
POINTS = ("int4", "e2m1", "nf4", "fp4-bnb", "e2m3", "e3m2", "int8", "e4m3fn", "e5m2")
MOST_ROWS = 40

BLACK, ORANGE, SKY, GREEN, BLUE, RED, PURPLE, GREY = (
    *("#000000", "#e69f00", "#56b4e9", "#009e73"),
    *("#0072b2", "#d55e00", "#cc79a7", "#6e6e6e"),
)


def _figure(width: float, height: float) -> Figure:
    """An empty figure with room for labels. Raises InputError where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError(
            "pictures need matplotlib, which is not installed; pip install 'fewbit[report]'"
        ) from None
    return Figure(figsize=(width, height), layout="constrained")


# -- points on a number line


def number_line(grids: Sequence[Grid] = ()) -> Figure:
    """Every finite value of each grid, one row each: linear, largest magnitude 1, and log2 of magnitudes.

    Without grids those of `POINTS`. Raises InputError for vector grids and for those of more than 16 bits.
    """
    grids = list(grids) or [by_name(name) for name in POINTS]
    if len(grids) > MOST_ROWS:
        raise InputError(f"{len(grids)} formats do not fit on one picture; name at most {MOST_ROWS}")
    values = [_values(grid) for grid in grids]
    figure = _figure(11, 1.5 + 0.42 * len(grids))
    from matplotlib.patches import Patch

    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(1.25, 1))
    colours = {grid: _colour(grid) for grid in grids}
    for row, (grid, points) in enumerate(zip(grids, values, strict=True)):
        tall = 0.62 if len(points) <= 64 else 0.5
        style = {"linewidth": 1.1 if len(points) <= 64 else 0.5, "color": colours[grid]}
        left.vlines(points / np.abs(points).max(), row - tall / 2, row + tall / 2, **style)
        magnitudes = np.unique(np.abs(points[points != 0]))
        right.vlines(np.log2(magnitudes), row - tall / 2, row + tall / 2, **style)
    for axes in (left, right):
        axes.set_ylim(len(grids) - 0.4, -0.6)
        axes.tick_params(left=False)
        axes.spines[["left", "right", "top"]].set_visible(False)
    bits = [f"{grid.name}  ({grid.bits} bit, {len(v)} values)" for grid, v in zip(grids, values, strict=True)]
    left.set_yticks(range(len(grids)), bits)
    left.set_title("every value, the largest drawn at 1", fontsize=10)
    left.set_xlabel("value / largest magnitude")
    right.set_title("magnitudes on a logarithmic axis: range", fontsize=10)
    right.set_xlabel("log2 |value|, zero left out")
    right.grid(axis="x", color="#dddddd", linewidth=0.6)
    right.set_axisbelow(True)
    there = {_kind(grid): Patch(color=_colour(grid)) for grid in grids}
    figure.legend(there.values(), there.keys(), loc="outside lower center", ncols=4, frameon=False)
    return figure


def _values(grid: Grid) -> np.ndarray:
    if grid.width > 1:
        raise InputError(
            f"{grid.name} has points of {grid.width} coordinates, which a number line cannot show"
        )
    if grid.bits > 16:
        raise InputError(
            f"{grid.name} has 2^{grid.bits} codes, too many to draw; name a format of up to 16 bits"
        )
    values = grid.value(grid.codes(), torch.float64)
    return np.unique(values[values.isfinite()].numpy())


_KINDS = {"integers": BLUE, "fixed point": SKY, "floats": RED, "tables": GREEN}


def _kind(grid: Grid) -> str:
    return {Int: "integers", Fixed: "fixed point", Float: "floats"}.get(type(grid), "tables")


def _colour(grid: Grid) -> str:
    return _KINDS[_kind(grid)]


# -- error against bits

_SCALARS = (
    ("integers, even steps", [f"uint{b}" for b in range(1, 9)], BLUE, "o"),
    ("floats", ["e2m1", "e3m0", "e2m3", "e3m2", "e4m3fn", "e5m2"], RED, "s"),
    ("NormalFloat", ["nf2", "nf3", "nf4"], GREEN, "^"),
    ("Lloyd-Max, made for Gauss", [f"lloyd{b}" for b in range(1, 9)], BLACK, "_"),
    (
        "vectors of 2 to 4, made for Gauss",
        [
            *("higgs-p2-n8", "higgs-p2-n16", "higgs-p2-n32", "higgs-p2-n64", "higgs-p2-n128"),
            *("higgs-p2-n256", "higgs-p3-n64", "higgs-p4-n256", "higgs-p3-n512"),
        ],
        PURPLE,
        "D",
    ),
)
# Where the label of a block format stands, bits and dB: between 4 and 6 bits the points lie close together.
_BLOCKS = {
    "mx4": (5.0, -9.0), "msfp12": (5.6, -11.5), "mxfp4-even": (5.9, -14.0), "nvfp4": (6.2, -16.5),
    "nf4-dq": (2.3, -28.0), "mx6": (6.9, -19.5), "mxfp6-e2m3": (7.1, -22.0), "mxfp8-e4m3": (7.7, -27.8),
    "mx9": (8.6, -41.5),
}  # fmt: skip
_FLOATS = {"e5m2": (7.5, -24.2), "e4m3fn": (8.3, -34.2)}


def block_formats() -> dict[str, Format]:
    """The block formats drawn: named ones, and integers of 2 to 8 bits in groups of 32 with FP16 steps."""
    integers = {
        f"int{b} g32": Format(grid=Int(b, narrow=True), block=Group(32), scale=FP16) for b in range(2, 9)
    }
    return {name: FORMATS[name] for name in _BLOCKS} | integers


def error_against_bits(samples: int = 1 << 16) -> Figure:
    """Measured errors of families of formats in dB against bits per value, a panel for each distribution."""
    figure = _figure(14, 7.4)
    panels = figure.subplots(1, len(TABLED), sharex=True, sharey=True)
    for axes, law in zip(panels, TABLED, strict=True):
        _theory(axes, law)
        for label, names, colour, marker in _SCALARS:
            at = {name: _grid_point(name, law, samples) for name in names}
            bar = marker == "_"
            style = {"linewidth": 1.4 if bar else 0, "zorder": 3, "label": label}
            axes.scatter(*zip(*at.values(), strict=True), 90 if bar else 26, colour, marker, **style)
            _labels(axes, at, _FLOATS, colour)
        _draw_blocks(axes, law)
        heavy = "heavy tails: Student t, 5 degrees of freedom"
        axes.set_title(heavy if law is Distribution.STUDENT else str(law), fontsize=11)
        axes.set_xlabel("bits per value, scales included")
        axes.grid(color="#e4e4e4", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["right", "top"]].set_visible(False)
    panels[0].set_ylabel("mean squared error, dB (0 dB: the variance of the data)")
    panels[0].set(xlim=(0.7, 9.5), ylim=(-56, 0))
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    return figure


def _grid_point(name: str, law: Distribution, samples: int) -> tuple[float, float]:
    """Bits per value and error in dB of a grid at its best step."""
    grid = by_name(name)
    return grid.bits / grid.width, _db(best_measured(grid, law, samples)[1])


def _theory(axes: Axes, law: Distribution) -> None:
    bits = np.array([0.5, 9.5])
    bound = [_db(lower_bound(law, b)) for b in bits]
    axes.plot(bits, bound, color=GREY, label="no code is below (Shannon)", zorder=1)
    axes.fill_between(bits, bound, -70, color="#f0f0f0", zorder=0)
    scalar = [_db(panter_dite(law, b)) for b in bits]
    label = "best scalars, many bits (Panter-Dite)"
    axes.plot(bits, scalar, color=GREY, linestyle="--", label=label, zorder=1)


def _draw_blocks(axes: Axes, law: Distribution) -> None:
    shape = (SIDE, SIDE)
    at = {n: (f.bits_per_weight(shape), _db(block_error(f, law))) for n, f in block_formats().items()}
    named = {name: at[name] for name in _BLOCKS}
    rest = [place for name, place in at.items() if name not in _BLOCKS]
    axes.scatter(*zip(*rest, strict=True), 30, SKY, "v", label="integers, blocks of 32, FP16 steps", zorder=3)
    axes.scatter(*zip(*named.values(), strict=True), 44, ORANGE, "P", label="block formats", zorder=4)
    _labels(axes, named, _BLOCKS, "#7a5200")


def _labels(axes: Axes, at: dict, where: dict, colour: str) -> None:
    """Names beside thin lines to their points."""
    line = {"arrowstyle": "-", "color": "#9a9a9a", "linewidth": 0.6, "shrinkA": 0, "shrinkB": 3}
    for name in where.keys() & at.keys():
        place = {"xy": at[name], "xytext": where[name], "va": "center", "fontsize": 8, "color": colour}
        axes.annotate(name, **place, arrowprops=line, zorder=5)


def _db(error: float) -> float:
    return 10 * math.log10(error)


# -- files


def save(figure: Figure, path: Path) -> None:
    """Write a figure as .svg, .png or .pdf; the file appears when it is complete.

    Raises InputError for another suffix, a folder that is not there, and a path that cannot be written.
    """
    import matplotlib

    check_path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    date = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(path.suffix.lower(), {})
    # Text stays text in SVG: it can be searched, and the file is small. The salt makes ids repeatable.
    settings = {"svg.fonttype": "none", "svg.hashsalt": "fewbit"}
    try:
        with matplotlib.rc_context(settings):
            figure.savefig(partial, format=path.suffix.lower()[1:], dpi=160, metadata=date)
        os.replace(partial, path)
    except OSError as error:
        raise InputError(
            f"the picture {path} cannot be written ({error.strerror}); give another path"
        ) from None
    finally:
        partial.unlink(missing_ok=True)


def check_path(path: Path) -> None:
    """Refuse what `save` would refuse before anything is computed."""
    if path.suffix.lower() not in SUFFIXES:
        raise InputError(
            f"a picture is written as {', '.join(SUFFIXES)}, got {str(path)!r}; name it picture.svg"
        )
    if not path.parent.is_dir():
        raise InputError(f"folder {path.parent} for the picture does not exist; make it first")
    if path.is_dir():
        raise InputError(f"{path} is a folder; give the name of a file, such as {path}/picture.svg")
