"""The loss curve of a run, beside that of another, as one HTML page.

The loss of single batches jumps; drawn is its mean over windows of updates (a hundredth of the run, at least
1), and the held-out loss as it was taken. What is compared is the last held-out loss, which both runs take on
the same windows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fewbit.errors import InputError
from fewbit.report.chart import Drawn, Series, chart
from fewbit.report.page import Section, facts, page
from fewbit.report.scale import Axis
from fewbit.trainer.folder import REPORT, ROWS

Rows = Sequence[Mapping[str, Any]]


def smoothed(rows: Rows) -> list[tuple[float, float]]:
    """(step, mean loss) of successive windows of updates; skipped updates are left out."""
    kept = [r for r in rows if not r["skipped"]]
    size = max(1, len(rows) // 100)
    parts = [kept[i : i + size] for i in range(0, len(kept), size)]
    return [(float(part[-1]["step"]), sum(r["loss"] for r in part) / len(part)) for part in parts]


def held(rows: Rows) -> list[tuple[float, float]]:
    """(step, held-out loss) wherever it was taken."""
    return [(float(r["step"]), r["held"]) for r in rows if "held" in r]


def read_run(folder: Path) -> tuple[dict[str, Any], Rows]:
    """What a finished run says of itself, and its rows. Raises ``InputError`` for any other folder."""
    try:
        report = json.loads((folder / REPORT).read_text(encoding="utf-8"))
        lines = (folder / ROWS).read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        kept = report["name"], report["held"], report["job"]["text"], smoothed(rows), held(rows)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        kept = None
    if kept is None or not kept[-1]:
        raise InputError(
            f"{folder} is no finished run of fewbit train; give the folder that one wrote, such as that of a "
            "BF16 run"
        )
    return report, rows


def draw(report: Mapping[str, Any], rows: Rows, beside: tuple[Mapping[str, Any], Rows] | None = None) -> str:
    """The page of a run: what it was, and its losses, beside those of another."""
    runs = [(report, rows)] + ([] if beside is None else [beside])
    names = [r["name"] for r, _ in runs]
    if len(set(names)) < len(names):
        names[1] = f"{names[1]} (beside)"
    x, y = Axis(label="updates"), Axis(label="loss, nats per token")
    colour = 0
    series = []
    for name, (_, own) in zip(names, runs, strict=True):
        series.append(Series(name=f"{name}, training", points=smoothed(own), colour=colour))
        series.append(Series(name=f"{name}, held out", points=held(own), drawn=Drawn.BOTH, colour=colour + 1))
        colour += 2
    skipped = sum(r["skipped"] for r in rows)
    said = [
        ("run", report["name"]),
        ("model", report["model"]),
        ("text", report["data"]),
        ("held-out loss", f"{report['held']:.4f} nats per token"),
        ("skipped updates", f"{skipped} of {len(rows)}"),
    ]
    if beside is not None:
        other = beside[0]
        apart = 100 * (report["held"] / other["held"] - 1)
        said.append(("beside", f"{names[1]}: {other['held']:.4f}, so {apart:+.2f} %"))
    picture = chart(series, x=x, y=y, title="Loss over the run")
    return page(f"Training: {report['name']}", [Section(title="The run", parts=[facts(said), picture])])
