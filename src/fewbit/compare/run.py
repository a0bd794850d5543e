"""The comparison itself: rows one after another or several at a time, each kept as soon as it is there.

A row that was measured before, by the same folder's ``results.json``, is taken from there; one that was
interrupted begins anew, because half a run has half its time and memory. A row that fails is kept with its
sentence, does not stop the others, and is tried again by the next call. For a row that this call does not
measure, the same recipe's row from another device or other versions stands in, if the folder has one.
"""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing
from pathlib import Path
from threading import RLock
from typing import Any

import torch

from fewbit.compare.processes import Processes
from fewbit.compare.rows import Comparison, Row, parsed, read_rows, stand_in, write_rows
from fewbit.compare.schedule import Schedule
from fewbit.compare.setup import Ready, Setup, make_ready
from fewbit.errors import InputError
from fewbit.evaluate.tasks import Score, beside
from fewbit.recipe import Recipe
from fewbit.recipe.entry import Entry
from fewbit.stream.job import make_folder

ORIGINAL = "original"


class Watch:
    """Callbacks of a comparison, one at a time; this base does nothing."""

    def row(self, number: int, total: int, name: str) -> None:
        """Work on a row begins, the ``number``-th of ``total`` that are missing."""

    def step(self, name: str, what: str, done: int, total: int) -> None:
        """``done`` of ``total`` blocks, windows or requests of the row ``name`` are finished."""

    def done(self, row: Row, kept: bool) -> None:
        """A row is there; ``kept``: from an earlier call."""


def compare(
    setup: Setup,
    entries: Sequence[Entry],
    folder: str | Path,
    watch: Watch | None = None,
    schedule: Schedule | None = None,
) -> Comparison:
    """Measure ``entries`` under one ``setup``; rows go to ``results.json`` in ``folder`` as they come.

    Every row runs in a process of its own. ``schedule``: which of the missing rows are measured, how many at
    a time and until when; all, one, and without end. Raises InputError, before any work, for a setup that
    cannot be worked with, for two entries of one title or one recipe, and for a folder that holds something
    else.
    """
    watch, folder, schedule = watch or Watch(), Path(folder), schedule or Schedule()
    _check(entries)
    end = schedule.end()
    chosen = {entry.title for entry in schedule.chosen(entries)}
    known = _open(folder)
    ready = make_ready(setup)
    _make(folder)
    recipes: dict[str, Recipe | None] = {ORIGINAL: None} | {e.title: e.recipe for e in entries}
    table = _Table(ready, recipes, known)
    todo = [Row(name=ORIGINAL, key=ready.key(None))]
    todo += [
        Row(name=e.name, heading=e.heading, words=e.words, key=ready.key(e.recipe), recipe=e.recipe.to_yaml())
        for e in entries
    ]
    todo = [dataclasses.replace(row, terms=ready.terms, versions=ready.identity["versions"]) for row in todo]
    for row in todo:
        found = known.get(row.key)
        if found is not None:
            table.put(row, found)
            watch.done(table.rows[row.title], kept=True)
    missing = [row for row in todo[1:] if row.title in chosen and row.title not in table.rows]
    missing = [] if schedule.minutes == 0 else missing
    if ORIGINAL not in table.rows and (missing or table.elsewhere(todo[0]) is None):
        missing.insert(0, todo[0])
    with tempfile.TemporaryDirectory(prefix="fewbit-compare-", dir=folder) as work:
        tokens = Path(work) / "tokens.pt"
        torch.save(ready.tokens, tokens)
        bench = _Bench(ready=ready, tokens=tokens, work=Path(work), total=len(missing), end=end, watch=watch)
        with closing(bench.measured(missing, table, schedule.workers)) as finished:
            for row in finished:
                table.put(row, row)
                with bench.lock:
                    watch.done(row, kept=False)
                write_rows(folder, table.comparison(todo))
    found = table.comparison(todo)
    write_rows(folder, found)
    return found


class _Table:
    """Rows by title, as they come; ``known``: those that the folder held."""

    def __init__(self, ready: Ready, recipes: dict[str, Recipe | None], known: dict[str, Row]):
        self.rows: dict[str, Row] = {}
        self._ready, self._recipes, self._known = ready, recipes, known
        self._parsed = parsed(known.values())

    def put(self, asked: Row, row: Row) -> None:
        """A row under the name it is asked for by now."""
        self.rows[asked.title] = dataclasses.replace(
            row, name=asked.name, heading=asked.heading, words=asked.words
        )

    def elsewhere(self, asked: Row) -> Row | None:
        """The same recipe's row of another device or other versions."""
        return stand_in(self._parsed, self._recipes[asked.title], self._ready.terms)

    def comparison(self, todo: list[Row]) -> Comparison:
        """What is there now, in the order that was asked for."""
        there, missing = dict(self.rows), []
        for asked in todo:
            found = None if asked.title in there else self.elsewhere(asked)
            if found is not None:
                there[asked.title] = dataclasses.replace(
                    found, name=asked.name, heading=asked.heading, words=asked.words
                )
            elif asked.title not in there:
                missing.append(asked.title)
        original = there.pop(ORIGINAL)
        keys = {row.key for row in (original, *there.values())}
        return Comparison(
            setup=described(self._ready),
            original=original,
            rows=tuple(there[asked.title] for asked in todo[1:] if asked.title in there),
            kept=tuple(row for key, row in self._known.items() if key not in keys),
            missing=tuple(missing),
        )


@dataclasses.dataclass(kw_only=True)
class _Bench:
    """Where rows are measured: ``tokens``: the file of the windows; ``work``: a folder for checkpoints."""

    ready: Ready
    tokens: Path
    work: Path
    total: int
    end: float
    watch: Watch
    lock: Any = dataclasses.field(default_factory=RLock)

    def measured(self, rows: list[Row], table: _Table, workers: int) -> Iterator[Row]:
        """Rows as they are finished, the original alone and first: tasks are paired with its answers.

        Closed before its end, it ends every process.
        """
        processes = Processes(workers)
        with ThreadPoolExecutor(workers) as pool:
            try:
                first = int(bool(rows) and rows[0].title == ORIGINAL)
                if first:
                    yield pool.submit(self._measure, 1, rows[0], None, processes).result()
                original = table.rows[ORIGINAL] if rows else None
                jobs = [
                    pool.submit(self._in_time, number, row, original, processes)
                    for number, row in enumerate(rows[first:], first + 1)
                ]
                for job in as_completed(jobs):
                    row = job.result()
                    if row is not None:
                        yield row
            finally:
                processes.end()
                pool.shutdown(cancel_futures=True)

    def _in_time(self, number: int, row: Row, original: Row, processes: Processes) -> Row | None:
        """The row, unless it is too late to begin."""
        if processes.ended or time.monotonic() > self.end:
            return None
        try:
            return self._measure(number, row, original, processes)
        except BaseException:
            processes.end()
            raise

    def _measure(self, number: int, row: Row, original: Row | None, processes: Processes) -> Row:
        """The row with its figures, or with the sentence that says why there are none."""

        def step(what: str, done: int, total: int) -> None:
            with self.lock:
                self.watch.step(row.title, what, done, total)

        with self.lock:
            self.watch.row(number, self.total, row.title)
        folder = self.work / str(number)
        folder.mkdir()
        setup = self.ready.setup
        job = described(self.ready) | {
            "recipe": row.recipe,
            "tokens": str(self.tokens),
            "folder": str(folder),
        }
        job["calibration"]["source"] = setup.calibration.source and str(setup.calibration.source)
        kind, said = processes.run(job, step)
        shutil.rmtree(folder, ignore_errors=True)
        if kind == "failed":
            return dataclasses.replace(row, error=said)
        scores = [Score(**score) for score in said.pop("scores", [])]
        before = {} if original is None else {_key(task): Score(**_score(task)) for task in original.tasks}
        tasks = tuple(beside(score, before.get(score.key)) for score in scores)
        return dataclasses.replace(row, tasks=tasks, **said)


def _check(entries: Sequence[Entry]) -> None:
    if not entries:
        raise InputError("there is no recipe to compare; give at least one, such as gptq:bits=4")
    titles: set[str] = {ORIGINAL}
    yaml: dict[str, str] = {}
    for entry in entries:
        if entry.title in titles:
            raise InputError(f"two rows would be called {entry.title!r}; give each recipe once")
        text = entry.recipe.to_yaml()
        if text in yaml:
            raise InputError(f"{yaml[text]!r} and {entry.title!r} are the same recipe; leave one out")
        titles.add(entry.title)
        yaml[text] = entry.title


def _open(folder: Path) -> dict[str, Row]:
    """The rows that a folder holds."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; name a folder for the results with -o")
    return read_rows(folder)


def _make(folder: Path) -> None:
    make_folder(folder)
    for stray in folder.glob("fewbit-compare-*"):  # of a call that was killed
        shutil.rmtree(stray, ignore_errors=True)


def described(ready: Ready) -> dict[str, Any]:
    """The setup as plain data for people."""
    setup = ready.setup
    plain = dataclasses.asdict(setup)
    plain["calibration"]["source"] = str(setup.calibration.source or "embedded")
    plain["protocol"]["join"] = setup.protocol.join.value
    plain["protocol"]["windows"] = len(ready.tokens)
    plain["data"] = ready.text
    plain["task_data"] = None if setup.task_data is None else str(setup.task_data)
    plain["dtype"] = None if setup.dtype is None else str(setup.dtype).removeprefix("torch.")
    return plain | {"identity": ready.identity}


def _key(task: dict[str, Any]) -> str:
    return f"{task['task']} {task['metric']}"


def _score(task: dict[str, Any]) -> dict[str, Any]:
    return {field.name: task[field.name] for field in dataclasses.fields(Score)}
