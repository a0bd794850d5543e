"""How figures look to a person: sizes, durations, aligned facts and tables.

On a terminal rich wraps to its width; in a pipe nothing is wrapped, so that paths and commands can be copied
and searched. Text is never read as markup: a shape such as [576, 64] is a shape.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Sequence
from typing import IO

from rich.console import Console
from rich.table import Table

PIPE_WIDTH = 400


def console(stream: IO[str]) -> Console:
    """A rich console on ``stream``."""
    width = None if stream.isatty() else PIPE_WIDTH
    return Console(file=stream, width=width, markup=False, highlight=False, emoji=False)


def print_json(data: dict) -> None:
    """One JSON object on standard output. Inf and NaN become null: JSON has no word for them."""
    print(json.dumps(_finite(data), indent=2, allow_nan=False))


def _finite(value: object) -> object:
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def facts(rows: Iterable[tuple[str, str]], stream: IO[str] | None = None) -> None:
    """Labels and what they say, aligned."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for label, text in rows:
        table.add_row(label, text)
    _print(table, stream or sys.stdout)


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], stream: IO[str] | None = None) -> None:
    """Columns under their names; a name that begins with ">" is of numbers, set flush right."""
    out = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for name in columns:
        out.add_column(name.lstrip(">"), justify="right" if name.startswith(">") else "left", overflow="fold")
    for row in rows:
        out.add_row(*row)
    _print(out, stream or sys.stdout)


def _print(renderable: object, stream: IO[str]) -> None:
    target = console(stream)
    with target.capture() as captured:
        target.print(renderable)
    # Cells are padded to the width of their column; blanks at line ends help nobody.
    stream.write("".join(line.rstrip() + "\n" for line in captured.get().splitlines()))
    stream.flush()


def size(nbytes: float) -> str:
    """Bytes in decimal units: '98.5 MB'."""
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if nbytes < 999.95 or unit == "TB":
            break
        nbytes /= 1000
    return f"{nbytes:.0f} {unit}" if unit == "bytes" else f"{nbytes:.1f} {unit}"


def duration(seconds: float) -> str:
    """'8 s', '2 min 10 s', '1 h 05 min'."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes == 0:
        return f"{rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def percent(share: float) -> str:
    """A share as '0.21 %', with two significant digits where two decimals would not show them."""
    value = 100 * share
    return f"{value:.2f} %" if value >= 0.1 or value == 0 else f"{value:.2g} %"


def number(value: float | None) -> str:
    """A figure in four significant digits, or a dash."""
    return "-" if value is None else f"{value:.4g}"


def some(names: Sequence[str], most: int = 4) -> str:
    """The first few names, and how many more there are."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")
