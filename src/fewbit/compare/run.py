"""The comparison itself: rows one after another, each kept as soon as it is there.

A row that was measured before, by the same folder's ``results.json``, is taken from there; one that was
interrupted begins anew, because half a run has half its time and memory. A row that fails is kept with its
sentence, does not stop the others, and is tried again by the next call.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fewbit.compare.rows import Comparison, Row, read_rows, write_rows
from fewbit.compare.setup import Ready, Setup, make_ready
from fewbit.errors import InputError, WriteError
from fewbit.evaluate.tasks import Score, beside
from fewbit.recipe.entry import Entry

ORIGINAL = "original"


class Watch:
    """Callbacks of a comparison; this base does nothing."""

    def row(self, number: int, total: int, name: str) -> None:
        """Work on a row begins."""

    def step(self, what: str, done: int, total: int) -> None:
        """``done`` of ``total`` blocks, windows or requests of the row are finished."""

    def done(self, row: Row, kept: bool) -> None:
        """A row is there; ``kept``: from an earlier call."""


def compare(
    setup: Setup, entries: Sequence[Entry], folder: str | Path, watch: Watch | None = None
) -> Comparison:
    """Measure all ``entries`` under one ``setup``; rows go to ``results.json`` in ``folder`` as they come.

    Every row runs in a process of its own. Raises InputError, before any work, for a setup that cannot be
    worked with, for two entries of one name or one recipe, and for a folder that holds something else.
    """
    watch, folder = watch or Watch(), Path(folder)
    _check(entries)
    known = _open(folder)
    ready = make_ready(setup)
    _make(folder)
    keys = {e.name: ready.key(e.recipe) for e in entries}
    rows: dict[str, Row] = {}
    with tempfile.TemporaryDirectory(prefix="fewbit-compare-", dir=folder) as work:
        tokens = Path(work) / "tokens.pt"
        torch.save(ready.tokens, tokens)
        todo = [Row(name=ORIGINAL, key=ready.key(None))]
        todo += [
            Row(name=e.name, key=keys[e.name], words=e.words, recipe=e.recipe.to_yaml()) for e in entries
        ]
        for number, row in enumerate(todo, 1):
            found = known.get(row.key)
            if found is not None:
                row = dataclasses.replace(found, name=row.name, words=row.words)
            else:
                watch.row(number, len(todo), row.name)
                row = _measure(row, ready, tokens, Path(work), rows.get(ORIGINAL), watch)
            rows[row.name] = row
            watch.done(row, kept=found is not None)
            write_rows(folder, _comparison(ready, todo, rows, known))
    return _comparison(ready, todo, rows, known)


def _check(entries: Sequence[Entry]) -> None:
    if not entries:
        raise InputError("there is no recipe to compare; give at least one, such as gptq:bits=4")
    names: set[str] = {ORIGINAL}
    yaml: dict[str, str] = {}
    for entry in entries:
        if entry.name in names:
            raise InputError(f"two rows would be called {entry.name!r}; give each recipe once")
        text = entry.recipe.to_yaml()
        if text in yaml:
            raise InputError(f"{yaml[text]!r} and {entry.name!r} are the same recipe; leave one out")
        names.add(entry.name)
        yaml[text] = entry.name


def _open(folder: Path) -> dict[str, Row]:
    """The rows that a folder holds."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; name a folder for the results with -o")
    return read_rows(folder)


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WriteError(
            f"cannot make the folder {folder}: {error.strerror}; choose another with -o"
        ) from None
    for stray in folder.glob("fewbit-compare-*"):  # of a call that was killed
        shutil.rmtree(stray, ignore_errors=True)


def _comparison(ready: Ready, todo: list[Row], rows: dict[str, Row], known: dict[str, Row]) -> Comparison:
    """What is there now; rows to come are no part of it."""
    there = [rows[row.name] for row in todo if row.name in rows]
    keys = {row.key for row in there}
    return Comparison(
        setup=described(ready),
        original=there[0],
        rows=tuple(there[1:]),
        kept=tuple(row for key, row in known.items() if key not in keys),
    )


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


def _measure(row: Row, ready: Ready, tokens: Path, work: Path, original: Row | None, watch: Watch) -> Row:
    """The row with its figures, or with the sentence that says why there are none."""
    job = described(ready) | {"recipe": row.recipe, "tokens": str(tokens), "folder": str(work)}
    job["calibration"]["source"] = ready.setup.calibration.source and str(ready.setup.calibration.source)
    kind, said = _worker(job, watch)
    for left in work.glob("checkpoint*"):
        shutil.rmtree(left, ignore_errors=True)
    if kind == "failed":
        return dataclasses.replace(row, error=said)
    scores = [Score(**score) for score in said.pop("scores", [])]
    before = {} if original is None else {_key(task): Score(**_score(task)) for task in original.tasks}
    tasks = tuple(beside(score, before.get(score.key)) for score in scores)
    return dataclasses.replace(row, tasks=tasks, **said)


def _key(task: dict[str, Any]) -> str:
    return f"{task['task']} {task['metric']}"


def _score(task: dict[str, Any]) -> dict[str, Any]:
    return {field.name: task[field.name] for field in dataclasses.fields(Score)}


def _worker(job: dict[str, Any], watch: Watch) -> tuple[str, Any]:
    """Run a job in a process of its own: ("row", figures) or ("failed", sentence)."""
    words = [sys.executable, "-P", "-W", "ignore", "-m", "fewbit.compare.worker"]
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        process.stdin.write(json.dumps(job))
        process.stdin.close()
        for line in process.stdout:
            kind, *said = json.loads(line)
            if kind == "step":
                watch.step(*said)
            else:
                return kind, said[0]
        code = process.wait()
    finally:
        process.kill()  # no harm to one that has ended
        process.wait()
    if code < 0:
        name = signal.Signals(-code).name
        memory = ", as happens when memory runs out" if name == "SIGKILL" else ""
        return "failed", f"the process of this row was ended by {name}{memory}"
    return "failed", f"the process of this row left with code {code} and no result"
