"""``fewbit eval --tasks``: how many questions a model answers, and which answers its bits have turned."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fewbit.cli import options
from fewbit.cli.pairs import OF_TEXTS
from fewbit.errors import InputError

if TYPE_CHECKING:
    from fewbit.io.source import Source

BATCH = 8
NAMED = 6  # turned answers that are named one by one

Tasks = Annotated[
    str | None,
    typer.Option(
        metavar="NAME,NAME",
        help="Questions to ask: tasks of lm-eval by name (their data come from the hub), or, with "
        "--task-data, of files.",
    ),
]
TaskData = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER",
        help="JSON lines of arc_easy, boolq, copa, hellaswag, lambada, openbookqa or piqa: a file each that "
        "begins with the name.",
    ),
]
Limit = Annotated[
    int | None,
    typer.Option(metavar="N", min=1, help="Only the first N questions of each task.", show_default="all"),
]
Batch = Annotated[
    int, typer.Option(metavar="N", min=1, help="Requests of a task that go through the model together.")
]


def check_task_options(ctx: typer.Context) -> None:
    """Raise ``InputError`` for options of tasks without tasks, and for options of texts beside them."""
    given = {name for name in ctx.params if _typed(ctx, name)}
    if "tasks" not in given:
        for name in ("task_data", "limit", "batch"):
            if name in given:
                raise InputError(f"--{name.replace('_', '-')} belongs to tasks; name them with --tasks")
        return
    for name in (*OF_TEXTS, "pairs"):
        if name in given:
            raise InputError(f"--tasks asks questions and has no use for --{name}; leave one out")


def _typed(ctx: typer.Context, name: str) -> bool:
    source = ctx.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def split_names(text: str) -> list[str]:
    """'piqa, copa' as a list."""
    return [part.strip() for part in text.split(",") if part.strip()]


def ask_tasks(
    source: Source,
    original: Source | None,
    names: list[str],
    folder: Path | None,
    limit: int | None,
    batch: int,
    where: str,
    dtype: Any,
    as_json: bool,
) -> None:
    """Print the scores of a model, beside those of its original."""
    from fewbit.cli.progress import Windows
    from fewbit.cli.show import print_json
    from fewbit.cli.size import bits_per_weight, size_bytes
    from fewbit.evaluate.tasks import answer, beside, open_tasks
    from fewbit.io.load import load

    start, found = time.perf_counter(), []
    with open_tasks(names, folder, limit) as tasks:
        for one in (original, source):
            if one is None:
                continue
            options.note(f"asking {one.name}")
            subject = load(one.name, where, dtype)
            asked = answer(
                subject, one.tokenizer(), tasks, limit=limit, batch=batch, progress=Windows("request")
            )
            found.append(asked)
            del subject  # one model in memory at a time
    before = found[0].scores if original is not None else [None] * len(found[-1].scores)
    rows = [beside(score, old) for score, old in zip(found[-1].scores, before, strict=True)]
    report = {
        "model": source.name,
        "against": None if original is None else original.name,
        "tasks": rows,
        "limit": limit,
        "batch": batch,
        "cut": found[-1].cut,
        "bits_per_weight": bits_per_weight(source),
        "size_bytes": size_bytes(source),
        "device": where,
        "seconds": time.perf_counter() - start,
    }
    if as_json:
        print_json(report)
    else:
        _show(report)


def _show(report: dict[str, Any]) -> None:
    """A row per metric, and below, which answers turned."""
    from fewbit.cli.show import duration, facts, number, size, some, table

    compared = report["against"] is not None
    columns = ["task", "metric", ">questions", ">score", ">+-"]
    columns += [">original", ">+-", ">lost", ">gained", ">p"] if compared else []
    cells = []
    for row in report["tasks"]:
        cell = [row["task"], row["metric"], str(row["questions"]), *score_cells(row["value"], row["error"])]
        if compared:
            cell += score_cells(row["original"], row["original_error"])
            turned = [number(None) if row[k] is None else str(len(row[k])) for k in ("lost", "gained")]
            cell += [*turned, number(row["p"])]
        cells.append(cell)
    table(columns, cells, sys.stdout)
    print()
    for row in report["tasks"]:
        for way in ("lost", "gained"):
            if row[way]:
                numbers = some([str(n) for n in row[way]], NAMED)
                print(f"{row['task']} {row['metric']} {way}: {numbers}")
    facts(_protocol(report, duration, size, compared), sys.stdout)


def _protocol(report: dict[str, Any], duration: Any, size: Any, compared: bool) -> list[tuple[str, str]]:
    rows = [("model", report["model"])]
    rows += [("original", report["against"])] if compared else []
    rows += [
        ("bits", f"{report['bits_per_weight']:.2f} per weight"),
        ("size", size(report["size_bytes"])),
        ("protocol", "lm-eval, the examples in front that each task asks for, no chat template"),
        ("", "shares in %; +- is the standard error over questions"),
    ]
    if compared:
        rows.append(("", "p: McNemar's exact test of answers lost against gained; small if not by chance"))
    if report["limit"] is not None:
        rows.append(("mind", f"only the first {report['limit']} questions of each task were asked"))
    if report["cut"]:
        rows.append(("mind", f"{report['cut']} requests are longer than the model's context: cut in front"))
    rows.append(("run", f"on {report['device']}, {duration(report['seconds'])}"))
    return rows


def score_cells(value: float, error: float | None) -> list[str]:
    """A share in per cent with its standard error; what is no share as it is."""
    from fewbit.cli.show import number

    if error is None:
        return [number(value), ""]
    return [f"{100 * value:.1f}", f"{100 * error:.1f}"]
