"""Which rows of a comparison are measured by one call, how many at a time, and until when."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from fewbit.errors import InputError
from fewbit.recipe.entry import Entry


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """``workers``: rows at a time; ``minutes``: no row begins after them, None for no end; ``only``: what a
    title must hold one of, ``skip``: none of, in capitals or not (all rows, and none left out).
    """

    workers: int = 1
    minutes: float | None = None
    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()

    def __post_init__(self):
        if self.workers < 1:
            raise InputError(f"got {self.workers} workers; give 1 or more rows at a time")
        if self.minutes is not None and not self.minutes >= 0:
            raise InputError(f"got {self.minutes} minutes; give 0 or more, or leave them out")

    def chosen(self, entries: Sequence[Entry]) -> list[Entry]:
        """The entries that are measured where they are missing. Raises InputError where no title fits."""
        only, skip = ([text.casefold() for text in texts] for texts in (self.only or ("",), self.skip))
        titles = [(entry, entry.title.casefold()) for entry in entries]
        kept = [e for e, title in titles if _any(only, title) and not _any(skip, title)]
        if not kept:
            raise InputError(
                f"no row is left by only {', '.join(self.only) or 'all'} and skip "
                f"{', '.join(self.skip) or 'none'}; titles read like {entries[0].title!r}"
            )
        return kept

    def end(self) -> float:
        """When the last row may begin, by `time.monotonic`."""
        return float("inf") if self.minutes is None else time.monotonic() + 60 * self.minutes


def _any(texts: Sequence[str], title: str) -> bool:
    return any(text in title for text in texts)
