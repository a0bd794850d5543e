"""How often values occur, with the points of a grid laid over: where a format puts its values, and where the
data are.
"""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from fewbit.errors import InputError
from fewbit.report.chart import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    drawing,
    figure,
    frame,
)
from fewbit.report.scale import Axis, number, scale

MOST_POINTS = 1024  # of a grid; more would be a solid ground
LINES = 64  # more grid points than these are drawn as short ticks on the axis


def histogram(
    counts: Sequence[int],
    edges: Sequence[float],
    *,
    x: str,
    title: str,
    grid: Sequence[float] = (),
    grid_name: str = "grid",
    log: bool = True,
    note: str = "",
) -> Markup:
    """A figure of ``counts`` [n] between ``edges`` [n + 1], ascending; ``grid``: values drawn as lines.

    log: bars grow with the logarithm of the count, so that a few far values can be seen. Raises
    ``InputError`` when counts and edges do not belong together, or nothing was counted.
    """
    if len(edges) != len(counts) + 1 or not any(counts):
        raise InputError(
            f"a histogram of {len(counts)} counts between {len(edges)} edges cannot be drawn; give n counts, "
            "not all 0, and n + 1 edges"
        )
    most = max(counts)
    sx = scale(Axis(label=x, low=edges[0], high=edges[-1]), edges, LEFT, WIDTH - RIGHT)
    y = Axis(label="how many, logarithmic", log=True, low=0.5) if log else Axis(label="how many", low=0)
    sy = scale(y, [0.5, float(most)] if log else [0.0, float(most)], HEIGHT - BOTTOM, TOP)
    bar = Markup(
        '<rect class="bar" x="{:.2f}" y="{:.1f}" width="{:.2f}" height="{:.1f}"><title>{}</title></rect>'
    )
    inner = frame(sx, sy)
    for n, a, b in zip(counts, edges, edges[1:], strict=False):
        if n:
            u, top = sx(a), sy(n)
            tip = f"{number(a)} to {number(b)}: {n}"
            inner.append(bar.format(u, top, max(0.6, sx(b) - u - 0.3), sy.start - top, tip))
    shown = [g for g in grid if edges[0] <= g <= edges[-1]]
    if len(shown) > MOST_POINTS:
        raise InputError(
            f"{len(shown)} grid points cannot be told apart in a picture; give at most {MOST_POINTS}"
        )
    if len(shown) <= LINES:
        line = Markup('<path class="grid" d="M{:.2f} {:.1f}V{:.1f}"><title>{}</title></path>')
        inner += [line.format(sx(g), sy.start, sy.stop, f"{grid_name}: {number(g)}") for g in shown]
    else:
        ticks = "".join(f"M{sx(g):.2f} {sy.start + 6:.1f}v-6" for g in shown)
        inner.append(Markup('<path class="grid" d="{}"/>').format(ticks))
    if grid:
        beside = len(grid) - len(shown)
        drawn = "Upright lines" if len(shown) <= LINES else "Ticks on the axis"
        said = f"{drawn}: {grid_name}" + (f", {beside} more lie outside the picture." if beside else ".")
        note = f"{said} {note}".strip()
    return figure(title, [drawing(Markup("\n").join(inner), title)], note)
