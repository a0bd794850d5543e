"""A run, as it is watched: a live bar on a terminal, one line per block in a pipe; always on standard error.

The time left is that of the blocks this run has solved, times the blocks to go; before the first block it is
the plan's prediction. Blocks taken over from an interrupted run cost nothing and do not count.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from fewbit.cli.options import imported, note
from fewbit.cli.show import console, duration, percent
from fewbit.cli.summary import show_plan
from fewbit.stream.planned import Plan
from fewbit.stream.progress import LayerRow, Progress


class Remaining:
    """Seconds left of a run."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self._clock = clock
        self._since = clock()
        self._predicted = 0.0
        self._spent = 0.0
        self._solved = 0
        self._to_go: int | None = None

    def start(self, predicted: float) -> None:
        """Work begins, and should take ``predicted`` seconds."""
        self._predicted, self._since = predicted, self._clock()

    def block(self, done: int, total: int, resumed: bool) -> None:
        """One more block is finished."""
        now = self._clock()
        if not resumed:
            self._spent += now - self._since
            self._solved += 1
        self._since, self._to_go = now, total - done

    def seconds(self) -> float:
        """The estimate now; never below zero."""
        since = self._clock() - self._since
        whole = self._predicted if not self._solved else self._spent / self._solved * (self._to_go or 0)
        return max(0.0, whole - since)


class Lines(Progress):
    """For a pipe or a log file."""

    def __init__(self) -> None:
        self.remaining = Remaining()
        self._rows: list[tuple[LayerRow, float]] = []

    def start(self, plan: Plan) -> None:
        """The plan, then the clock."""
        imported()
        show_plan(plan, sys.stderr)
        self.remaining.start(plan.seconds)

    def phase(self, text: str) -> None:
        """A line."""
        note(text)

    def layer(self, row: LayerRow, seconds: float) -> None:
        """Kept for the line of its block."""
        self._rows.append((row, seconds))

    def block(self, done: int, total: int, resumed: bool) -> None:
        """A line: what the block's worst layer is, how long its solvers took, how long the rest will take."""
        self.remaining.block(done, total, resumed)
        note(f"block {done}/{total}  {self._worst(resumed)}{self._left(done, total)}")
        self._rows.clear()

    def _worst(self, resumed: bool) -> str:
        if resumed or not self._rows:
            return "taken over from the interrupted run"
        row, _ = max(self._rows, key=lambda pair: pair[0].error)
        took = duration(sum(seconds for _, seconds in self._rows))
        return f"largest error {percent(row.error)} in {row.layer}, solved in {took}"

    def _left(self, done: int, total: int) -> str:
        return f", about {duration(self.remaining.seconds())} left" if done < total else ""

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class Live(Lines):
    """For a terminal: a bar of blocks and the time left; below it the layer that was solved last."""

    def __init__(self) -> None:
        super().__init__()
        from rich.console import Group
        from rich.live import Live as Screen
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as Bar
        from rich.text import Text

        self._text = ""
        self._bar = Bar(
            BarColumn(bar_width=30),
            *(TextColumn(f"{{task.fields[{f}]}}", markup=False) for f in ("count", "left")),
        )
        self._task = self._bar.add_task("blocks", total=None, count="", left="")

        def draw() -> Group:
            left = f"about {duration(self.remaining.seconds())} left"
            self._bar.update(self._task, left=left if self._running else "")
            return Group(self._bar.get_renderable(), Text(self._text, no_wrap=True, overflow="ellipsis"))

        self._running = False
        self._screen = Screen(
            get_renderable=draw,
            console=console(sys.stderr),
            transient=True,
            refresh_per_second=4,
            redirect_stdout=False,
        )

    def start(self, plan: Plan) -> None:
        """The plan above, the bar below it."""
        super().start(plan)
        self._running = True
        self._screen.start()

    def phase(self, text: str) -> None:
        """The line below the bar."""
        self._text = text

    def layer(self, row: LayerRow, seconds: float) -> None:
        """Name, error and time of the layer."""
        super().layer(row, seconds)
        self._text = f"{row.layer}  error {percent(row.error)}  {duration(seconds)}"

    def block(self, done: int, total: int, resumed: bool) -> None:
        """The bar moves."""
        self.remaining.block(done, total, resumed)
        self._rows.clear()
        self._running = done < total
        self._bar.update(self._task, completed=done, total=total, count=f"block {done}/{total}")
        self._screen.refresh()

    def __exit__(self, *_: object) -> None:
        self._screen.stop()


def watch_run() -> Lines:
    """What suits standard error: a context manager and a ``Progress``."""
    return Live() if sys.stderr.isatty() else Lines()


class Windows:
    """Progress of an evaluation: called with (windows done, windows in all); ``what`` else is counted."""

    def __init__(self, what: str = "window") -> None:
        self._what = what
        self._start = time.perf_counter()

    def __call__(self, done: int, total: int) -> None:
        left = (time.perf_counter() - self._start) / done * (total - done)
        line = f"{self._what} {done}/{total}" + (f", about {duration(left)} left" if done < total else "")
        if sys.stderr.isatty():
            print(f"\r\033[K{line}", end="" if done < total else "\r\033[K", file=sys.stderr, flush=True)
        elif done == total or done % max(1, total // 10) == 0:
            note(line)
