"""The report of a comparison as one HTML file: the picture of KL against bits, and the table behind it."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from fewbit.compare.rows import Comparison, Row, front
from fewbit.report import Axis, Cell, Column, Drawn, Section, Series, chart, facts, page, table

FILE = "report.html"
MOST_WRITTEN = 12  # rows off the front whose names stand in the picture; of more, the mouse and the list tell
SET_OFF = "Set off: nothing else has as few bits and as small a KL."


def report(comparison: Comparison) -> str:
    """The text of the page."""
    setup = comparison.setup
    best = front(comparison.rows)
    sections = [Section(title="In short", parts=[facts(_facts(comparison)), *_picture(comparison, best)])]
    sections.append(
        Section(title="Recipes", parts=[SET_OFF, *_tables(comparison, best), *_left_out(comparison)])
    )
    if any(row.tasks for row in comparison.rows):
        sections.append(Section(title="Tasks", parts=[_tasks(comparison), P_VALUE]))
    sections.append(Section(title="Commands", parts=[_commands(comparison)]))
    return page(f"Recipes compared on {setup['model']}", sections)


P_VALUE = (
    "Lost: answers of the original that were right and are wrong now; gained: the other way round. p is "
    "McNemar's exact test of the two numbers: how often chance alone turns answers at least as unevenly."
)


def _facts(comparison: Comparison) -> list[tuple[str, str]]:
    setup, original = comparison.setup, comparison.original
    c, p = setup["calibration"], setup["protocol"]
    rows = [("model", setup["model"])]
    if original.perplexity is not None:
        rows.append(("original", f"perplexity {original.perplexity:.4g}"))
    rows += [
        ("calibration", f"{c['samples']} windows of {c['seqlen']} tokens of {c['source']}, seed {c['seed']}"),
        (
            "evaluation",
            f"{p['windows']} windows of {p['window']} tokens of {setup['data']}, join {p['join']}",
        ),
        ("runs on", f"{setup['device']}, every recipe in a process of its own"),
    ]
    if setup["tasks"]:
        rows.append(("tasks", asked(setup)))
    if comparison.failed:
        rows.append(("failed", ", ".join(row.title for row in comparison.failed)))
    if comparison.missing:
        rows.append(("not measured yet", f"{len(comparison.missing)} rows, named below the tables"))
    return rows


def asked(setup: dict) -> str:
    """Which questions a model was asked."""
    first = "all questions" if setup["limit"] is None else f"the first {setup['limit']} questions of each"
    return f"{', '.join(setup['tasks'])}; {first}; +- is the standard error over questions"


def _picture(comparison: Comparison, best: list[Row]) -> list[str | Markup]:
    """KL against bits; the front as a line."""
    shown = [r for r in comparison.rows if r.kl is not None and r.kl > 0]
    if not shown:
        return ["No recipe has a KL above 0 to show."]
    line = [r for r in best if r in shown]
    rest = [r for r in shown if r not in best]
    few = len(rest) <= MOST_WRITTEN
    series = [
        _series(
            "nothing beats these", line, [r.name for r in line], drawn=Drawn.BOTH, written=True, colour=0
        ),
        _series("others", rest, [r.title for r in rest], drawn=Drawn.POINTS, written=few, colour=1),
    ]
    if not few:
        series.reverse()  # many others lie below the front; few give the first choice of places to its names
    return [
        chart(
            [s for s in series if s.points],
            x=Axis(label="bits per weight"),
            y=Axis(label="KL, nats per token", log=True),
            title="What each bit buys",
            note="To the left: smaller. Down: closer to the original.",
        )
    ]


def _series(name: str, rows: list[Row], labels: list[str], **drawn: Any) -> Series:
    return Series(name=name, points=[(r.bits, r.kl) for r in rows], labels=labels, **drawn)


def _tables(comparison: Comparison, best: list[Row]) -> list[Markup]:
    """All rows that have figures, beside the original: a table for each heading."""
    there = [r for r in comparison.by_bits if r.error is None]
    original = comparison.original
    names = list(dict.fromkeys(task["task"] for task in original.tasks)) if original.error is None else []
    columns = [
        Column(name="recipe"),
        Column(name="bits", number=True, help="Stored per quantized weight: codes, scales, zeros, tables"),
        Column(name="KL", number=True, help="KL(original || result), nats per token"),
        Column(name="±", number=True, help="Standard error of KL over windows", digits=2),
        Column(name="top-1 %", number=True, help="Tokens at which both hold the same one likeliest"),
        Column(name="perplexity", number=True),
        Column(name="size", number=True, help="Of the weight files"),
        *(Column(name=name, number=True, help="Share of right answers in %") for name in names),
        Column(name="CPU s", number=True, help="Of all threads, imports included"),
        Column(name="clock s", number=True, help="Of quantizing, imports left out"),
        Column(name="memory", number=True, help="Peak of the process that quantizes; on a GPU what it held"),
        Column(name="on", help="Where it was measured, and by which version of fewbit if not by this one"),
        Column(name="format", help="What the checkpoint is written in"),
    ]
    last = [original] if original.error is None else []
    tables = []
    for heading in dict.fromkeys(r.heading for r in comparison.rows):  # in the order of the file
        own = [r for r in there if r.heading == heading]
        if own:
            tables.append(
                table(
                    columns,
                    [_row(r, names) for r in (*own, *last)],
                    caption=heading or "All recipes",
                    marked=[i for i, r in enumerate(own) if r in best],
                    sorted_by=(1, "ascending"),
                )
            )
    return tables


def _row(r: Row, names: list[str]) -> list[Cell | str | float | None]:
    by_name = {task["task"]: task for task in reversed(r.tasks)}  # the first metric of each
    on = r.on if r.by_this_version else f"{r.on or ''} ({r.versions.get('fewbit', 'before')})".strip()
    return [
        r.name,
        Cell(text=f"{r.bits:.3f}", value=r.bits),
        r.kl,
        r.kl_error,
        None if r.top1 is None else Cell(text=f"{100 * r.top1:.1f}", value=r.top1),
        None if r.perplexity is None else Cell(text=f"{r.perplexity:.4g}", value=r.perplexity),
        _bytes(r.size_bytes),
        *(_share(by_name.get(name)) for name in names),
        None if r.cpu_seconds is None else Cell(text=f"{r.cpu_seconds:.0f}", value=r.cpu_seconds),
        None if r.wall_seconds is None else Cell(text=f"{r.wall_seconds:.0f}", value=r.wall_seconds),
        _bytes(r.peak_bytes),
        on,
        r.checkpoint,
    ]


def _bytes(n: int | None) -> Cell | None:
    return None if n is None else Cell(text=f"{n / 1e6:.1f} MB", value=n)


def _share(task: dict | None) -> Cell | float | None:
    """A task's first metric."""
    if task is None or task["error"] is None:
        return None if task is None else task["value"]
    return Cell(text=f"{100 * task['value']:.1f} ± {100 * task['error']:.1f}", value=task["value"])


def _tasks(comparison: Comparison) -> Markup:
    """Every metric of every row beside the original's."""
    columns = [
        Column(name="recipe"),
        Column(name="task"),
        Column(name="metric"),
        Column(name="questions", number=True),
        Column(name="score", number=True),
        Column(name="original", number=True),
        Column(name="lost", number=True),
        Column(name="gained", number=True),
        Column(name="p", number=True, digits=2),
    ]
    rows = []
    for r in comparison.by_bits:
        for t in r.tasks:
            old = {"task": t["task"], "value": t["original"], "error": t["original_error"]}
            turned = [None if t[way] is None else len(t[way]) for way in ("lost", "gained")]
            rows.append(
                [
                    r.title,
                    t["task"],
                    t["metric"],
                    t["questions"],
                    _share(t),
                    None if t["original"] is None else _share(old),
                    *turned,
                    t["p"],
                ]
            )
    return table(columns, rows, caption="Answers, beside those of the original")


def _left_out(comparison: Comparison) -> list[str]:
    said = [f"{row.title} failed: {row.error}" for row in comparison.failed]
    if comparison.missing:
        said.append(f"Not measured yet: {'; '.join(comparison.missing)}.")
    return said


def _commands(comparison: Comparison) -> Markup:
    """What makes each checkpoint."""
    columns = [Column(name="recipe"), Column(name="command", wrap=True)]
    c = comparison.setup["calibration"]
    text = f"--data {c['source']} --samples {c['samples']} --seqlen {c['seqlen']} --seed {c['seed']}"
    rows = [
        [r.title, f"fewbit quantize {comparison.setup['model']} {r.words} {text} -o OUT"]
        for r in comparison.by_bits
    ]
    return table(columns, rows, caption="Commands that write the checkpoints")
