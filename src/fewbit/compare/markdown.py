"""A comparison as Markdown tables, between marks in a page that says the rest.

The marks are comments, so that the page can be read and edited around them; NAME tells the tables of several
comparisons in one page apart::

    <!-- fewbit compare: NAME -->
    <!-- end -->
"""

from __future__ import annotations

import itertools
from pathlib import Path

from fewbit.compare.rows import Comparison, Row
from fewbit.errors import InputError
from fewbit.stream.job import write_text

END = "<!-- end -->"
OLDER = " †"
BAR = "\\|"  # within a cell
_COLUMNS = "bits / weight", "KL", "±", "top-1 %", "perplexity"


def markdown(comparison: Comparison) -> str:
    """A table for each heading, then what the tables leave out."""
    shown = [row for row in comparison.rows if row.error is None]
    names = list(dict.fromkeys(task["task"] for task in comparison.original.tasks))
    parts = []
    for heading, rows in itertools.groupby(shown, key=lambda row: row.heading):
        head = ["method", *_COLUMNS, *(f"{name} %" for name in names), "s", "MB", "on"]
        rule = f"|---|{'--:|' * (len(head) - 2)}---|"
        title = [f"### {heading[0].upper()}{heading[1:]}", ""] if heading else []
        lines = [*title, _line(head), rule, *(_line(_cells(row, names)) for row in rows)]
        parts.append("\n".join(lines))
    if comparison.original.perplexity is not None:
        parts.append(f"Original: perplexity {comparison.original.perplexity:.2f}.")
    if any(not row.by_this_version for row in shown):
        parts.append("†: by an earlier version of fewbit.")
    if comparison.missing:
        parts.append(f"Not measured yet: {'; '.join(comparison.missing)}.")
    failed = [row for row in comparison.rows if row.error is not None]
    parts += [f"Failed: {row.title}: {row.error}" for row in failed]
    return "\n\n".join(parts)


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cell.replace('|', BAR) for cell in cells)} |"


def _cells(row: Row, names: list[str]) -> list[str]:
    by_name = {task["task"]: task for task in reversed(row.tasks)}  # the first metric of each
    return [
        row.name,
        f"{row.bits:.3f}",
        _number(row.kl, ".4f"),
        _number(row.kl_error, ".4f"),
        _number(row.top1 and 100 * row.top1, ".1f"),
        _number(row.perplexity, ".2f"),
        *(_number(by_name[name]["value"] * 100 if name in by_name else None, ".1f") for name in names),
        _number(row.seconds, ".0f"),
        _number(row.peak_bytes and row.peak_bytes / 1e6, ".0f"),
        f"{row.on or ''}{'' if row.by_this_version else OLDER}",
    ]


def _number(value: float | None, form: str) -> str:
    return "" if value is None else f"{value:{form}}"


def check_page(path: Path, name: str) -> None:
    """Raises InputError for a page without a place for the tables of ``name``; a new page has one."""
    if path.exists():
        _split(path, name)


def publish(path: Path, name: str, comparison: Comparison) -> None:
    """Put the tables between their marks in the page, which is made where it is missing."""
    before, after = _split(path, name) if path.exists() else ("", "\n")
    write_text(path, f"{before}{_begin(name)}\n\n{markdown(comparison)}\n\n{END}{after}")


def _begin(name: str) -> str:
    return f"<!-- fewbit compare: {name} -->"


def _split(path: Path, name: str) -> tuple[str, str]:
    """What stands before and after the marks."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise InputError(f"the page {path} cannot be read ({reason}); give a Markdown file") from None
    before, begin, rest = text.partition(_begin(name))
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise InputError(
            f"{path} has no place for the tables; put the lines {_begin(name)} and {END} where they belong"
        )
    return before, after
