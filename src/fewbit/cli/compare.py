"""``fewbit compare``: recipes side by side, under one calibration and one evaluation."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fewbit.cli import options
from fewbit.cli.options import (
    CalibrationText,
    Device,
    Dtype,
    DtypeName,
    JoinName,
    Json,
    Model,
    Samples,
    Seed,
    Seqlen,
    Verbose,
)
from fewbit.cli.tasks import BATCH, Batch, Limit, TaskData, Tasks, split_names

if TYPE_CHECKING:
    from fewbit.compare import Comparison, Row


def compare(
    model: Model,
    recipes: Annotated[
        list[str] | None,
        typer.Option(
            "--recipe",
            "-r",
            metavar="RECIPE[:KEY=VALUE,..]",
            help="A recipe of `fewbit recipes` with its settings, as in gptq:bits=3,group_size=64; give as "
            "many as there are to compare.",
        ),
    ] = None,
    recipe_files: Annotated[
        list[Path] | None,
        typer.Option("--recipe-file", metavar="FILE", help="A recipe as YAML; may be given many times."),
    ] = None,
    row_files: Annotated[
        list[Path] | None,
        typer.Option(
            "--rows",
            metavar="FILE",
            help="Many rows as YAML: headings, and under each names with a recipe in the words of -r or as a "
            "file; may be given many times.",
        ),
    ] = None,
    workers: Annotated[
        int, typer.Option(metavar="N", help="Rows at a time, each in a process of its own.")
    ] = 1,
    only: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT", help="Measure only rows whose heading/name holds this, or another of these."
        ),
    ] = None,
    skip: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT", help="Measure no row whose heading/name holds this; may be given again."
        ),
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option(metavar="M", help="Begin no row after these; 0: measure nothing, show what is there."),
    ] = None,
    calibration: CalibrationText = options.EMBEDDED,
    samples: Samples = options.SAMPLES,
    seqlen: Seqlen = options.SEQLEN,
    seed: Seed = options.SEED,
    eval_data: Annotated[
        str,
        typer.Option(
            "--eval-data",
            metavar="FILE|NAME",
            help="The text of evaluation, as --data of eval; it should share nothing with --data.",
        ),
    ] = options.HELD_OUT,
    join: Annotated[
        JoinName, typer.Option(help="How its lines become one text, as in eval.")
    ] = JoinName.SOLID,
    window: Annotated[int, typer.Option(metavar="L", help="Tokens in a window of it.")] = options.WINDOW,
    windows: Annotated[
        int, typer.Option(metavar="N", help="Windows from its start; 0: all.")
    ] = options.WINDOWS,
    tasks: Tasks = None,
    task_data: TaskData = None,
    limit: Limit = None,
    batch: Batch = BATCH,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FOLDER",
            help="Where results.json and report.html are written, and rows are found again.",
            show_default="compare-MODEL",
        ),
    ] = None,
    page: Annotated[
        Path | None,
        typer.Option(
            "--markdown",
            metavar="FILE",
            help="Write the tables into this page too, between the comments 'fewbit compare: NAME' and "
            "'end'; NAME is that of the folder of -o.",
        ),
    ] = None,
    device: Device = None,
    dtype: Dtype = DtypeName.AUTO,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Quantize MODEL by several recipes and say what each costs and keeps.

    Every recipe runs in a process of its own. Rows are kept as they come: the same command, with recipes
    added or after an interruption, measures only what is missing. A recipe that fails is shown with its
    reason, and the exit code is 1.
    """
    options.prepare(verbose)
    from fewbit.compare import Schedule, Setup, from_file, from_rows, from_words
    from fewbit.compare import compare as run
    from fewbit.compare.markdown import check_page, publish
    from fewbit.compare.page import FILE, report
    from fewbit.evaluate import Protocol
    from fewbit.io.text import Join
    from fewbit.report import write
    from fewbit.stream.data import Calibration

    schedule = Schedule(workers=workers, minutes=minutes, only=tuple(only or ()), skip=tuple(skip or ()))
    entries = [from_words(text) for text in recipes or ()] + [from_file(path) for path in recipe_files or ()]
    entries += [entry for path in row_files or () for entry in from_rows(path)]
    setup = Setup(
        model=model,
        calibration=Calibration(source=calibration, samples=samples, seqlen=seqlen, seed=seed),
        data=eval_data,
        protocol=Protocol(window=window, windows=windows or None, join=Join(join.value)),
        tasks=tuple(split_names(tasks)) if tasks is not None else (),
        task_data=task_data,
        limit=limit,
        batch=batch,
        device=options.device_name(device),
        dtype=options.dtype_of(dtype),
    )
    folder = output or Path(f"compare-{Path(model).stem or 'model'}")
    if page is not None:
        check_page(page, folder.name)
    found = run(setup, entries, folder, _watch(workers), schedule)
    write(folder / FILE, report(found))
    if page is not None:
        publish(page, folder.name, found)
    if as_json:
        from fewbit.cli.show import print_json

        print_json(found.as_dict())
    else:
        _show(found, folder)
    if found.failed:
        raise typer.Exit(1)


def _watch(workers: int) -> Any:
    """Rows on standard error, and their steps where one is at work at a time."""
    from time import perf_counter

    from fewbit.cli.progress import Windows
    from fewbit.cli.show import duration, number
    from fewbit.compare import Watch

    class Lines(Watch):
        def __init__(self) -> None:
            self._steps: dict[str, Windows] = {}
            self._start, self._total, self._finished = perf_counter(), 0, 0

        def row(self, number: int, total: int, name: str) -> None:
            self._steps, self._total = {}, total
            options.note(f"[{number}/{total}] {name}")

        def step(self, name: str, what: str, done: int, total: int) -> None:
            if workers == 1 and (what == "block" or sys.stderr.isatty()):  # in a log, the rest is over soon
                self._steps.setdefault(what, Windows(f"  {what}"))(done, total)

        def done(self, row: Row, kept: bool) -> None:
            if kept:
                options.note(f"{row.title}: measured before")
                return
            self._finished += 1
            said = f"{row.title}: " if workers > 1 else ""
            if row.error is not None:
                options.note(f"  {said}failed: {row.error}")
            elif row.kl is not None:
                options.note(f"  {said}{row.bits:.3f} bits, KL {number(row.kl)}{self._left()}")

        def _left(self) -> str:
            """What the rows to come will take, if each takes what those before it took."""
            if self._finished == self._total:
                return ""
            seconds = (perf_counter() - self._start) / self._finished * (self._total - self._finished)
            return f"; {self._finished} of {self._total} rows, about {duration(seconds)} left"

    return Lines()


def _show(found: Comparison, folder: Path) -> None:
    """The table sorted by bits, what tasks say, and where the report is."""
    from fewbit.cli.show import facts, number, table
    from fewbit.compare import front
    from fewbit.compare.page import FILE, asked

    best = {row.title for row in front(found.rows)}
    names = list(dict.fromkeys(t["task"] for t in found.original.tasks))
    columns = ["", "recipe", ">bits", ">size", ">perplexity", ">KL", ">+-", ">top-1 %"]
    columns += [*(f">{name} %" for name in names), ">s", ">memory", "on"]
    cells = [_cells(row, row.title in best, names) for row in (*found.by_bits, found.original)]
    table(columns, cells, sys.stdout)
    print()
    _show_tasks(found)
    c, p = found.setup["calibration"], found.setup["protocol"]
    rows = [
        ("*", "no other recipe has at most its bits and at most its KL"),
        ("model", found.setup["model"]),
        ("calibration", f"{c['samples']} x {c['seqlen']} tokens of {c['source']}, seed {c['seed']}"),
        (
            "evaluation",
            f"{p['windows']} windows of {p['window']} tokens of {found.setup['data']}, join {p['join']}",
        ),
        ("", "KL in nats per token; +- is the standard error over windows"),
    ]
    if found.setup["tasks"]:
        rows.append(("tasks", asked(found.setup)))
    rows.append(("", "s: of the processor on a CPU, all threads; by the clock on a GPU"))
    rows += [("failed", f"{row.title}: {row.error}") for row in found.failed]
    if found.missing:
        said = f"{len(found.missing)} rows, measured without --minutes, --only and --skip: "
        rows.append(("missing", said + "; ".join(found.missing)))
    cut = max((row.cut for row in found.rows), default=0)
    if cut:
        rows.append(("mind", f"{number(cut)} requests of tasks are longer than the context: cut in front"))
    rows.append(("report", f"{folder / FILE}, figures in {folder / 'results.json'}"))
    facts(rows, sys.stdout)


def _cells(row: Row, best: bool, names: list[str]) -> list[str]:
    from fewbit.cli.show import number, size

    if row.error is not None:
        return ["", row.title, *["-"] * (9 + len(names))]
    by_name = {task["task"]: task for task in reversed(row.tasks)}  # the first metric of each
    return [
        "*" if best else "",
        row.title,
        f"{row.bits:.3f}",
        "-" if row.size_bytes is None else size(row.size_bytes),
        number(row.perplexity),
        number(row.kl),
        "-" if row.kl_error is None else f"{row.kl_error:.2g}",
        "-" if row.top1 is None else f"{100 * row.top1:.1f}",
        *(_share(by_name.get(name)) for name in names),
        "-" if row.seconds is None else f"{row.seconds:.0f}",
        "-" if row.peak_bytes is None else size(row.peak_bytes),
        row.on or "-",
    ]


def _share(task: dict | None) -> str:
    from fewbit.cli.tasks import score_cells

    return "-" if task is None else " +- ".join(c for c in score_cells(task["value"], task["error"]) if c)


def _show_tasks(found: Comparison) -> None:
    """Answers that turned, where tasks were asked."""
    from fewbit.cli.show import number, table
    from fewbit.cli.tasks import score_cells

    columns = ("recipe", "task", "metric", ">score", ">+-", ">original", ">lost", ">gained", ">p")
    cells = []
    for row in found.by_bits:
        for t in row.tasks:
            turned = ["-" if t[way] is None else str(len(t[way])) for way in ("lost", "gained")]
            old = "-" if t["original"] is None else score_cells(t["original"], t["original_error"])[0]
            score = score_cells(t["value"], t["error"])
            cells.append([row.title, t["task"], t["metric"], *score, old, *turned, number(t["p"])])
    if cells:
        table(columns, cells, sys.stdout)
        print()
