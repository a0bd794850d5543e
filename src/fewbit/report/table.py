"""A table that sorts when the name of a column is pressed, by mouse or keyboard.

Names are buttons inside the header cells, ``aria-sort`` says what holds now; a cell shows a text and sorts by
the value behind it, so that "1.2 MB" comes after "900 kB". Cells without a value stay at the end either way.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from fewbit.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Column:
    """A name; whether the values are numbers (flush right, sorted by value, the largest first); ``digits``
    that are shown of floats; ``help`` under the mouse; ``wrap``: long text may take several lines.
    """

    name: str
    number: bool = False
    digits: int = 4
    help: str = ""
    wrap: bool = False


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A text with the value that it sorts by (None: unknown); ``marked``: set off by its ground."""

    text: str | Markup
    value: float | str | None = None
    marked: bool = False


Value = Cell | str | Markup | float | int | None


def table(
    columns: Sequence[Column],
    rows: Sequence[Sequence[Value]],
    *,
    caption: str,
    marked: Sequence[int] = (),
    sorted_by: tuple[int, str] | None = None,
) -> Markup:
    """Rows of cells under ``columns``; the first column names the row.

    caption: what the table is; marked: rows that are set off; sorted_by: (column, "ascending" or
    "descending") when the rows come in that order. Raises ``InputError`` for a row of another length.
    """
    for row in rows:
        if len(row) != len(columns):
            raise InputError(f"a row of {len(row)} cells does not fit {len(columns)} columns: {list(row)}")
    heads = Markup("").join(_head(i, c, sorted_by) for i, c in enumerate(columns))
    chosen = set(marked)
    body = Markup("\n").join(
        Markup("<tr{}>{}</tr>").format(
            Markup(' class="marked"') if i in chosen else "",
            Markup("").join(_cell(j, c, v) for j, (c, v) in enumerate(zip(columns, row, strict=True))),
        )
        for i, row in enumerate(rows)
    )
    return Markup(
        '<div class="frame" role="region" tabindex="0" aria-label="{}"><table><caption>{}</caption>\n'
        "<thead><tr>{}</tr></thead>\n<tbody>\n{}\n</tbody></table></div>"
    ).format(caption, caption, heads, body)


def _head(i: int, column: Column, sorted_by: tuple[int, str] | None) -> Markup:
    order = sorted_by[1] if sorted_by is not None and sorted_by[0] == i else "none"
    kind = Markup(' class="number"') if column.number else ""
    tip = Markup(' title="{}"').format(column.help) if column.help else ""
    return Markup('<th scope="col"{} aria-sort="{}"{}><button type="button">{}</button></th>').format(
        kind, order, tip, column.name
    )


def _cell(j: int, column: Column, value: Value) -> Markup:
    cell = value if isinstance(value, Cell) else Cell(text=shown(value, column.digits), value=_key(value))
    names = [n for n, on in (("number", column.number), ("wrap", column.wrap), ("marked", cell.marked)) if on]
    kind = Markup(' class="{}"').format(" ".join(names)) if names else ""
    key = "" if cell.value is None else cell.value
    if not column.number and cell.value is None and not isinstance(value, Cell) and value is not None:
        data = Markup("")  # sorts by its text
    else:
        data = Markup(' data-v="{}"').format(key)
    tag, scope = ("th", Markup(' scope="row"')) if j == 0 else ("td", "")
    return Markup("<{}{}{}{}>{}</{}>").format(Markup(tag), scope, kind, data, cell.text, Markup(tag))


def _key(value: Value) -> float | None:
    """What a plain number sorts by; None for text and for what is not finite."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return value


def shown(value: Value, digits: int = 4) -> str | Markup:
    """A value as a person reads it: an en dash for what is unknown, numbers in ``digits`` digits."""
    if value is None:
        return "\N{EN DASH}"
    if isinstance(value, float):
        return f"{value:.{digits}g}"
    return value if isinstance(value, str) else str(value)
