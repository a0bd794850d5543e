"""The report of a comparison as one HTML file: the picture of KL against bits, and the table behind it."""

from __future__ import annotations

from markupsafe import Markup

from fewbit.compare.rows import Comparison, Row, front
from fewbit.report import Axis, Cell, Column, Drawn, Section, Series, chart, facts, page, table

FILE = "report.html"


def report(comparison: Comparison) -> str:
    """The text of the page."""
    setup = comparison.setup
    best = front(comparison.rows)
    sections = [Section(title="In short", parts=[facts(_facts(comparison)), *_picture(comparison, best)])]
    sections.append(Section(title="Recipes", parts=[_table(comparison, best), *_failed(comparison)]))
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
        rows.append(("failed", ", ".join(row.name for row in comparison.failed)))
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
    series = [_series("nothing beats these", line, Drawn.BOTH), _series("others", rest, Drawn.POINTS)]
    return [
        chart(
            [s for s in series if s.points],
            x=Axis(label="bits per weight"),
            y=Axis(label="KL, nats per token", log=True),
            title="What each bit buys",
            note="To the left: smaller. Down: closer to the original.",
        )
    ]


def _series(name: str, rows: list[Row], drawn: Drawn) -> Series:
    return Series(
        name=name,
        points=[(r.bits, r.kl) for r in rows],
        labels=[r.name for r in rows],
        drawn=drawn,
        written=True,
    )


def _table(comparison: Comparison, best: list[Row]) -> Markup:
    """All rows that have figures."""
    there = [r for r in comparison.by_bits if r.error is None]
    first = comparison.original.tasks if comparison.original.error is None else ()
    names = list(dict.fromkeys(task["task"] for task in first))
    columns = [
        Column(name="recipe"),
        Column(name="bits", number=True, help="Stored per quantized weight: codes, scales, zeros, tables"),
        Column(name="size", number=True, help="Of the weight files"),
        Column(name="KL", number=True, help="KL(original || result), nats per token"),
        Column(name="±", number=True, help="Standard error of KL over windows", digits=2),
        Column(name="top-1 %", number=True, help="Tokens at which both hold the same one likeliest"),
        Column(name="perplexity", number=True),
        *(Column(name=name, number=True, help="Share of right answers in %") for name in names),
        Column(name="CPU s", number=True, help="Of all threads, imports included"),
        Column(name="clock s", number=True, help="Of quantizing, imports left out"),
        Column(name="memory", number=True, help="Peak of the process that quantizes; on a GPU what it held"),
        Column(name="format", help="What the checkpoint is written in"),
    ]
    rows = []
    for r in (*there, comparison.original):
        if r.error is not None:
            continue
        by_name = {task["task"]: task for task in reversed(r.tasks)}
        rows.append(
            [
                r.name,
                Cell(text=f"{r.bits:.3f}", value=r.bits),
                _bytes(r.size_bytes),
                r.kl,
                r.kl_error,
                None if r.top1 is None else Cell(text=f"{100 * r.top1:.1f}", value=r.top1),
                None if r.perplexity is None else Cell(text=f"{r.perplexity:.4g}", value=r.perplexity),
                *(_share(by_name.get(name)) for name in names),
                None if r.cpu_seconds is None else Cell(text=f"{r.cpu_seconds:.0f}", value=r.cpu_seconds),
                None if r.wall_seconds is None else Cell(text=f"{r.wall_seconds:.0f}", value=r.wall_seconds),
                _bytes(r.peak_bytes),
                r.checkpoint,
            ]
        )
    marked = [i for i, r in enumerate(there) if r in best]
    return table(
        columns,
        rows,
        caption="Set off: nothing else has as few bits and as small a KL",
        marked=marked,
        sorted_by=(1, "ascending"),
    )


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
                    r.name,
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


def _failed(comparison: Comparison) -> list[str]:
    return [f"{row.name} failed: {row.error}" for row in comparison.failed]


def _commands(comparison: Comparison) -> Markup:
    """What makes each checkpoint."""
    columns = [Column(name="recipe"), Column(name="command", wrap=True)]
    c = comparison.setup["calibration"]
    text = f"--data {c['source']} --samples {c['samples']} --seqlen {c['seqlen']} --seed {c['seed']}"
    rows = [
        [r.name, f"fewbit quantize {comparison.setup['model']} {r.words} {text} -o OUT"]
        for r in comparison.by_bits
    ]
    return table(columns, rows, caption="Commands that write the checkpoints")
