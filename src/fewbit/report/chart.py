"""Lines and points on two axes, linear or logarithmic, as SVG inside the page.

Colours are classes of the page's style sheet, so a chart follows light and dark; series differ by the shape
of their marks and the dashes of their lines as well. Each mark says its figures in a ``<title>``, which
browsers show under the mouse, and all figures stand in a table that opens below, for readers without one.

Positions are in a box of 640 x 360 units that scales with the page.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from markupsafe import Markup

from fewbit.errors import InputError
from fewbit.report.scale import Axis, Scale, number, scale
from fewbit.report.table import Column, table

WIDTH, HEIGHT = 640.0, 360.0
LEFT, RIGHT, TOP, BOTTOM = 80.0, 18.0, 14.0, 52.0
COLOURS = 6
MOST_LISTED = 400  # points whose figures are repeated in a table
_DASHES = ("", "6 4", "2 3", "9 3 2 3", "12 4", "1 4")


class Drawn(StrEnum):
    """How a series is drawn."""

    LINE = "line"
    POINTS = "points"
    BOTH = "both"


@dataclass(frozen=True, kw_only=True)
class Series:
    """Points (x, y) under one name. ``labels``: a word for each point, in its tooltip; ``written``: and
    beside it where there is room; ``colour``: 0 to 5 (the place of the series otherwise).
    """

    name: str
    points: Sequence[tuple[float, float]]
    labels: Sequence[str] = ()
    drawn: Drawn = Drawn.LINE
    written: bool = False
    colour: int | None = None

    def __post_init__(self):
        if self.labels and len(self.labels) != len(self.points):
            raise InputError(
                f"series {self.name!r} has {len(self.points)} points and {len(self.labels)} labels; give "
                "each point one, or none at all"
            )


def chart(series: Sequence[Series], *, x: Axis, y: Axis, title: str, note: str = "") -> Markup:
    """A figure of ``series``. Points that an axis cannot show (not finite; not positive on a logarithmic one)
    are left out, and the figure says how many. Raises ``InputError`` when nothing is left.
    """
    kept, lost = [], 0
    for i, s in enumerate(series):
        words = s.labels or [""] * len(s.points)
        own = [(a, b, w) for (a, b), w in zip(s.points, words, strict=True) if _shows(a, x) and _shows(b, y)]
        lost += len(s.points) - len(own)
        kept.append((s, i % COLOURS if s.colour is None else s.colour, own))
    every = [p for _, _, own in kept for p in own]
    if not every:
        raise InputError(
            f"the picture {title!r} has no point to show; give finite values, positive on log axes"
        )
    sx = scale(x, [p[0] for p in every], LEFT, WIDTH - RIGHT)
    sy = scale(y, [p[1] for p in every], HEIGHT - BOTTOM, TOP)
    inner = Markup("\n").join(
        [*frame(sx, sy), *_lines(kept, sx, sy), *_marks(kept, sx, sy, x, y), *_words(kept, sx, sy)]
    )
    if lost:
        why = "not finite, or not positive on a logarithmic axis"
        note = f"{note} {lost} point{'s' * (lost > 1)} left out: {why}.".strip()
    parts = [_legend(kept), drawing(inner, title), _listed(kept, x, y, title)]
    return figure(title, parts, note)


def figure(title: str, parts: Iterable[Markup], note: str = "") -> Markup:
    """A picture under its title, with a note below."""
    below = Markup("<p>{}</p>").format(note) if note else ""
    return Markup("<figure><figcaption>{}</figcaption>\n{}{}</figure>").format(
        title, Markup("\n").join(p for p in parts if p), below
    )


def drawing(inner: Markup, title: str, height: float = HEIGHT) -> Markup:
    """The SVG element of a picture."""
    return Markup('<svg viewBox="0 0 {:g} {:g}" role="img" aria-label="{}">\n{}\n</svg>').format(
        WIDTH, height, title, inner
    )


def frame(sx: Scale, sy: Scale) -> list[Markup]:
    """Rules, ticks and names of both axes."""
    bottom, out = sy.start, []
    for v in sy.ticks():
        at = sy(v)
        out.append(Markup('<path class="rule" d="M{:.1f} {:.1f}H{:.1f}"/>').format(sx.start, at, sx.stop))
        out.append(text(sx.start - 7, at + 4, number(v), "end", "tick"))
    for v in sx.ticks():
        at = sx(v)
        out.append(Markup('<path class="rule" d="M{:.1f} {:.1f}v5"/>').format(at, bottom))
        out.append(text(at, bottom + 20, number(v), "middle", "tick"))
    out.append(Markup('<path class="rule" d="M{:.1f} {:.1f}H{:.1f}"/>').format(sx.start, bottom, sx.stop))
    out.append(text((sx.start + sx.stop) / 2, bottom + 42, sx.axis.label, "middle"))
    middle = (sy.start + sy.stop) / 2
    out.append(
        Markup('<text text-anchor="middle" transform="translate(15 {:.1f}) rotate(-90)">{}</text>').format(
            middle, sy.axis.label
        )
    )
    return out


def text(x: float, y: float, words: str, anchor: str = "start", kind: str = "") -> Markup:
    """Words at a place."""
    own = Markup(' class="{}"').format(kind) if kind else ""
    return Markup('<text x="{:.1f}" y="{:.1f}" text-anchor="{}"{}>{}</text>').format(x, y, anchor, own, words)


def _shows(value: float, axis: Axis) -> bool:
    return math.isfinite(value) and (not axis.log or value > 0)


def _path(points: Iterable[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in points)


def _lines(kept, sx: Scale, sy: Scale) -> list[Markup]:
    out = []
    for s, colour, own in kept:
        if s.drawn is Drawn.POINTS or len(own) < 2:
            continue
        place = [(sx(a), sy(b)) for a, b, _ in own]
        out.append(
            Markup('<path class="line k{}" style="fill:none" stroke-dasharray="{}" d="{}"/>').format(
                colour, _DASHES[colour], _path(place)
            )
        )
    return out


def _marks(kept, sx: Scale, sy: Scale, x: Axis, y: Axis) -> list[Markup]:
    """A mark for each point; a series drawn as a line has marks that are only felt by the mouse."""
    out = []
    for s, colour, own in kept:
        for a, b, word in own:
            head = f"{word}\n" if word else ""
            tip = f"{s.name}\n{head}{x.label}: {number(a)}\n{y.label}: {number(b)}"
            if s.drawn is Drawn.LINE and len(own) > 1:
                one = Markup('<circle class="hit" cx="{:.1f}" cy="{:.1f}" r="6"><title>{}</title></circle>')
                out.append(one.format(sx(a), sy(b), tip))
            else:
                one = Markup('<path class="k{}" d="{}"><title>{}</title></path>')
                out.append(one.format(colour, _shape(colour, sx(a), sy(b)), tip))
    return out


def _shape(kind: int, x: float, y: float, r: float = 4.5) -> str:
    """Circle, square, triangle, diamond, triangle on its tip, bar."""
    corners = {
        1: ((-r, -r), (r, -r), (r, r), (-r, r)),
        2: ((0, -r * 1.2), (r * 1.1, r * 0.8), (-r * 1.1, r * 0.8)),
        3: ((0, -r * 1.3), (r * 1.3, 0), (0, r * 1.3), (-r * 1.3, 0)),
        4: ((0, r * 1.2), (r * 1.1, -r * 0.8), (-r * 1.1, -r * 0.8)),
        5: ((-r * 1.3, -r * 0.5), (r * 1.3, -r * 0.5), (r * 1.3, r * 0.5), (-r * 1.3, r * 0.5)),
    }
    if kind in corners:
        return _path((x + a, y + b) for a, b in corners[kind]) + "Z"
    return f"M{x - r:.1f} {y:.1f}a{r} {r} 0 1 0 {2 * r} 0a{r} {r} 0 1 0 {-2 * r} 0Z"


def _words(kept, sx: Scale, sy: Scale) -> list[Markup]:
    """Labels beside their points, each at the first place where it meets no other label and no point."""
    marks = [(sx(a), sy(b)) for s, _, own in kept if s.drawn is not Drawn.LINE for a, b, _ in own]
    taken: list[tuple[float, float, float, float]] = [(u - 4, v - 4, u + 4, v + 4) for u, v in marks]
    out = []
    for a, b, word in itertools.chain.from_iterable(own for s, _, own in kept if s.written):
        wide, u, v = 6.6 * len(word), sx(a), sy(b)
        for dx, dy, anchor in _PLACES:
            left = u + dx - (wide if anchor == "end" else wide / 2 if anchor == "middle" else 0)
            box = (left, v + dy - 9, left + wide, v + dy + 3)
            inside = box[0] > LEFT and box[2] < WIDTH - 2 and box[1] > 0 and box[3] < HEIGHT - BOTTOM
            if inside and not any(_meet(box, other) for other in taken):
                taken.append(box)
                out.append(text(u + dx, v + dy, word, anchor, "halo"))
                break
    return out


_PLACES = tuple(
    place
    for far in (8, 14, 22)
    for place in (
        *((far, 4, "start"), (far, -far + 2, "start"), (far, far + 4, "start")),
        *((0, -far, "middle"), (0, far + 8, "middle"), (-far, 4, "end"), (-far, -far + 2, "end")),
    )
)


def _meet(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _legend(kept) -> Markup:
    """The names of the series beside their marks; none for a single one."""
    if len(kept) < 2:
        return Markup("")
    items = []
    for s, colour, _ in kept:
        line = Markup('<path class="line k{}" stroke-dasharray="{}" d="M0 6H26"/>').format(
            colour, _DASHES[colour]
        )
        mark = Markup('<path class="k{}" d="{}"/>').format(colour, _shape(colour, 13, 6, 4))
        drawn = [line] * (s.drawn is not Drawn.POINTS) + [mark] * (s.drawn is not Drawn.LINE)
        key = Markup('<svg viewBox="0 0 26 12" aria-hidden="true">{}</svg>').format(Markup("").join(drawn))
        items.append(Markup("<li>{}{}</li>").format(key, s.name))
    return Markup('<ul class="legend">{}</ul>').format(Markup("").join(items))


def _listed(kept, x: Axis, y: Axis, title: str) -> Markup:
    """All figures as a table that opens; nothing for very many."""
    rows = [(s.name, word, a, b) for s, _, own in kept for a, b, word in own]
    if len(rows) > MOST_LISTED:
        return Markup("")
    named = any(r[1] for r in rows)
    columns = [
        Column(name="series"),
        *([Column(name="point")] if named else []),
        Column(name=x.label, number=True),
        Column(name=y.label, number=True),
    ]
    cells = [r if named else (r[0], *r[2:]) for r in rows]
    inside = table(columns, cells, caption=f"Figures of: {title}")
    return Markup("<details><summary>All figures</summary>{}</details>").format(inside)
