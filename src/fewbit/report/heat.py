"""A matrix as a picture: one coloured cell for each value, on axes that say what rows and columns are.

The cells are a PNG inside the page, written here: eight bits a cell, each a place in a palette of 256 colours
(PNG Specification, third edition, https://www.w3.org/TR/png-3/, sections 5 and 11), and deflated by zlib. A
matrix of 128 x 768 takes some 30 kB; as rectangles of SVG it would take 8 MB. Wider ones are reduced by the
*largest* value of neighbouring columns, since what is looked for is large.

Dark is small and bright is large, in light pages and dark ones alike.
"""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections.abc import Sequence

import numpy as np
from markupsafe import Markup

from fewbit.errors import InputError
from fewbit.report.chart import HEIGHT, LEFT, RIGHT, TOP, WIDTH, drawing, figure, text
from fewbit.report.scale import number

MOST = 768  # cells along an axis
POINTED = 40  # largest cells that say their figures under the mouse
_ANCHORS = (
    (6, 7, 24),
    (45, 24, 95),
    (125, 36, 122),
    (205, 66, 92),
    (246, 133, 63),
    (250, 208, 92),
    (255, 252, 220),
)


def palette() -> np.ndarray:
    """256 colours [256, 3] uint8, lighter and lighter."""
    at = np.linspace(0, len(_ANCHORS) - 1, 256)
    columns = [np.interp(at, range(len(_ANCHORS)), c) for c in zip(*_ANCHORS, strict=True)]
    return np.stack(columns, axis=1).round().astype(np.uint8)


def png(cells: np.ndarray, colours: np.ndarray) -> bytes:
    """A PNG of ``cells`` [rows, columns] uint8, each an index into ``colours`` [256, 3] uint8."""
    rows, columns = cells.shape
    lines = np.concatenate([np.zeros((rows, 1), np.uint8), cells], axis=1)  # each line: filter type 0

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", columns, rows, 8, 3, 0, 0, 0)
    body = zlib.compress(lines.tobytes(), 9)
    parts = (b"IHDR", head), (b"PLTE", colours.tobytes()), (b"IDAT", body), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*p) for p in parts)


def heat_map(
    values: np.ndarray,
    *,
    x: str,
    y: str,
    unit: str,
    title: str,
    log: bool = True,
    low: float | None = None,
    rows: Sequence[str] = (),
    columns: Sequence[str] = (),
    marks: Sequence[int] = (),
    note: str = "",
) -> Markup:
    """A figure of ``values`` [rows, columns], finite, with a bar of its colours.

    x, y: what columns and rows are; unit: what a value is; log: colours follow its logarithm, from ``low``
    (by default 1/1000 of the largest) on; rows, columns: words for each, used under the mouse (else their
    number); marks: columns that get a triangle on top. Raises ``InputError`` for what is no finite matrix.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 2 or not values.size or not np.isfinite(values).all():
        raise InputError(f"the picture {title!r} needs a finite matrix, got one of shape {values.shape}")
    high = float(values.max())
    if low is None:
        low = high / 1000 if log else float(values.min())
    if log and not low > 0:
        raise InputError(f"the picture {title!r} has no positive value, which a logarithmic scale needs")
    span = (math.log(high) - math.log(low) if log else high - low) or 1.0
    small = _reduce(_reduce(values, 1), 0)
    at = (np.log(np.maximum(small, low)) - math.log(low)) / span if log else (small - low) / span
    cells = (255 * at.clip(0, 1)).round().astype(np.uint8)
    n, m = values.shape
    bottom, right = HEIGHT - 100, WIDTH - RIGHT
    box = (LEFT, TOP + 12, right - LEFT, bottom - TOP - 12)
    inner = [_image(cells, box), *_axes(n, m, box, x, y), *_marked(marks, columns, m, box)]
    inner += _pointed(values, rows, columns, x, y, unit, box)
    inner += _bar(low, high, log, unit, box)
    return figure(title, [drawing(Markup("\n").join(inner), title)], note)


def _reduce(values: np.ndarray, axis: int) -> np.ndarray:
    """At most ``MOST`` cells along an axis, each the largest of those it stands for."""
    n = values.shape[axis]
    if n <= MOST:
        return values
    starts = np.arange(MOST) * n // MOST
    return np.maximum.reduceat(values, starts, axis=axis)


def _image(cells: np.ndarray, box: tuple[float, ...]) -> Markup:
    data = base64.b64encode(png(cells, palette())).decode()
    one = Markup(
        '<image x="{:g}" y="{:g}" width="{:g}" height="{:g}" preserveAspectRatio="none" '
        'href="data:image/png;base64,{}"/>'
    )
    return one.format(*box, data)


def _axes(n: int, m: int, box: tuple[float, ...], x: str, y: str) -> list[Markup]:
    left, top, wide, tall = box
    out = [text(left + (i + 0.5) / m * wide, top + tall + 18, str(i), "middle", "tick") for i in _steps(m, 8)]
    out += [text(left - 7, top + (i + 0.5) / n * tall + 4, str(i), "end", "tick") for i in _steps(n, 6)]
    out.append(text(left + wide / 2, top + tall + 36, x, "middle"))
    turned = Markup('<text text-anchor="middle" transform="translate(15 {:.1f}) rotate(-90)">{}</text>')
    return [*out, turned.format(top + tall / 2, y)]


def _steps(n: int, wanted: int) -> range:
    """Round places among n."""
    raw = max(1, n / wanted)
    power = 10 ** math.floor(math.log10(raw))
    return range(0, n, next(k * power for k in (1, 2, 5, 10) if k * power >= raw))


def _marked(marks: Sequence[int], columns: Sequence[str], m: int, box: tuple[float, ...]) -> list[Markup]:
    left, top, wide, _ = box
    one = Markup('<path class="k1" d="M{:.1f} {:.1f}l-4 -8h8Z"><title>{}</title></path>')
    return [one.format(left + (i + 0.5) / m * wide, top - 2, _word(columns, i)) for i in marks]


def _word(words: Sequence[str], i: int) -> str:
    return words[i] if len(words) else str(i)


def _pointed(values, rows, columns, x, y, unit, box) -> list[Markup]:
    """The largest cells say what they are."""
    n, m = values.shape
    left, top, wide, tall = box
    w, h = max(4.0, wide / m), max(4.0, tall / n)
    one = Markup(
        '<rect class="hit" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"><title>{}</title></rect>'
    )
    out = []
    for flat in np.argsort(values, axis=None)[::-1][:POINTED]:
        i, j = divmod(int(flat), m)
        tip = f"{y}: {_word(rows, i)}\n{x}: {_word(columns, j)}\n{unit}: {number(float(values[i, j]))}"
        place = (left + (j + 0.5) / m * wide - w / 2, top + (i + 0.5) / n * tall - h / 2)
        out.append(one.format(*place, w, h, tip))
    return out


def _bar(low: float, high: float, log: bool, unit: str, box: tuple[float, ...]) -> list[Markup]:
    """The colours from small to large below the picture."""
    left, top, wide, tall = box
    at = (left + wide * 0.3, top + tall + 50, wide * 0.4, 10.0)
    ends = [text(at[0] - 7, at[1] + 9, number(low), "end", "tick")]
    ends.append(text(at[0] + at[2] + 7, at[1] + 9, number(high), "start", "tick"))
    name = f"{unit}, logarithmic" if log else unit
    under = text(left + wide / 2, at[1] + 28, name, "middle")
    return [_image(np.arange(256, dtype=np.uint8)[None], at), *ends, under]
