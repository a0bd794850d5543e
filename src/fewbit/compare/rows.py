"""Rows of a comparison, which of them nothing beats, and the file that keeps them.

A row is on the front (V. Pareto) when no other has at most its bits and at most its KL, and less of one. Two
KLs that differ by less than their errors are still ordered: the errors stand beside them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import fewbit
from fewbit.errors import InputError
from fewbit.recipe import Recipe, from_yaml
from fewbit.stream.job import write_text

RESULTS = "results.json"
CPU = "CPU"
_FORMAT = "fewbit compare 1"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One recipe, measured. All figures are None where ``error`` says why there are none.

    bits: stored per quantized weight, scales, zeros and tables counted; size_bytes: of the weight files; kl:
    nats per token, with its standard error over windows; top1: 0 to 1; tasks: dicts of
    `fewbit.evaluate.tasks.beside`; cut: requests of tasks that are longer than the context; cpu_seconds: of
    all threads of a process that quantizes and does nothing else, imports included; wall_seconds: by the
    clock, without them; peak_bytes: of that process up to then, its largest resident size on a CPU, what it
    had allocated on a GPU. words: the options of ``fewbit quantize`` that ask for the recipe.

    The original's row has no recipe, words or KL; its bits and bytes are those of a plain checkpoint.
    """

    name: str
    key: str
    words: str = ""
    recipe: str | None = None
    error: str | None = None
    bits: float | None = None
    size_bytes: int | None = None
    perplexity: float | None = None
    nll_error: float | None = None
    kl: float | None = None
    kl_error: float | None = None
    top1: float | None = None
    tasks: tuple[dict[str, Any], ...] = ()
    cut: int = 0
    cpu_seconds: float | None = None
    wall_seconds: float | None = None
    peak_bytes: int | None = None
    checkpoint: str | None = None
    heading: str = ""
    terms: str = ""
    on: str | None = None
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """Heading and name in one."""
        return f"{self.heading}/{self.name}" if self.heading else self.name

    @property
    def seconds(self) -> float | None:
        """Of the processor on a CPU, by the clock elsewhere."""
        return self.cpu_seconds if self.on in (None, CPU) else self.wall_seconds

    @property
    def by_this_version(self) -> bool:
        """Whether this version of fewbit measured it."""
        return self.versions.get("fewbit") == fewbit.__version__

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What was asked for, in that order. ``setup``: plain data for people; ``kept``: rows of earlier calls
    into the same folder that are not shown now; ``missing``: titles of what no row is there for.
    """

    setup: dict[str, Any]
    original: Row
    rows: tuple[Row, ...]
    kept: tuple[Row, ...] = ()
    missing: tuple[str, ...] = ()

    @property
    def by_bits(self) -> list[Row]:
        """Rows with the fewest bits first, the failed ones at the end."""
        return sorted(self.rows, key=lambda r: (r.error is not None, r.bits or 0, r.kl or 0))

    @property
    def failed(self) -> list[Row]:
        """Rows without figures."""
        return [row for row in (self.original, *self.rows) if row.error is not None]

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON; ``front``: names of the rows that nothing beats."""
        return {
            "format": _FORMAT,
            "setup": self.setup,
            "original": self.original.as_dict(),
            "rows": [row.as_dict() for row in self.rows],
            "front": [row.title for row in front(self.rows)],
            "missing": list(self.missing),
            "kept": [row.as_dict() for row in self.kept],
        }


def front(rows: Sequence[Row]) -> list[Row]:
    """The rows that nothing beats in both bits and KL, the fewest bits first."""
    known = [r for r in rows if r.error is None and r.bits is not None and r.kl is not None]

    def beaten(r: Row) -> bool:
        return any(o.bits <= r.bits and o.kl <= r.kl and (o.bits, o.kl) != (r.bits, r.kl) for o in known)

    return sorted((r for r in known if not beaten(r)), key=lambda r: r.bits)


def write_rows(folder: Path, comparison: Comparison) -> None:
    """Put ``results.json`` in its folder; it is whole at every moment."""
    write_text(folder / RESULTS, json.dumps(comparison.as_dict(), indent=1) + "\n")


def read_rows(folder: Path) -> dict[str, Row]:
    """Rows with figures by their key. Raises InputError for a file that is not ours."""
    path = folder / RESULTS
    if not path.exists():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["format"] != _FORMAT:
            raise ValueError(data["format"])
        rows = [
            Row(**{**r, "tasks": tuple(r["tasks"])}) for r in (data["original"], *data["rows"], *data["kept"])
        ]
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(
            f"{path} is not what fewbit compare writes; choose another folder with -o, or remove it"
        ) from None
    return {row.key: row for row in rows if row.error is None}


def stand_in(known: Iterable[tuple[Row, Recipe | None]], recipe: Recipe | None, terms: str) -> Row | None:
    """The row of the same recipe under the same terms that was measured elsewhere or by other versions.

    Of several the one by this version of fewbit, then the one of a GPU, then the last.
    """
    best = None
    for row, own in known:
        if row.terms == terms and own == recipe and (best is None or _rank(row) >= _rank(best)):
            best = row
    return best


def _rank(row: Row) -> tuple[bool, bool]:
    return row.by_this_version, row.on != CPU


def parsed(rows: Iterable[Row]) -> list[tuple[Row, Recipe | None]]:
    """Rows beside their recipes, None for an original's; without those whose recipe is not read any more."""
    found = []
    for row in rows:
        with suppress(InputError):
            found.append((row, None if row.recipe is None else from_yaml(row.recipe)))
    return found
