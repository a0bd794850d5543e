"""Pictures of the inputs that lose most bits: |x| by token and channel, and where values fall on the grid.

Histograms count in *steps*: x / s with the step s of its token (w / s with that of its row), so the points of
the grid are the whole numbers from -127 to 127 and every picture has one axis. Where outliers set the step,
nearly everything else falls on a few points around zero.
"""

from __future__ import annotations

import torch
from markupsafe import Markup
from torch import Tensor

from fewbit.inspect.advice import advise
from fewbit.inspect.look import Inspection, Picture
from fewbit.inspect.remedies import Remedy
from fewbit.report import heat_map, histogram

LEVELS = 127  # of INT8, on each side of zero


def pictures(seen: Inspection) -> list[str | Markup]:
    """Heat map and histograms of each group that has a picture."""
    advice = advise(seen, 8)
    chosen = Remedy.CHANNEL if advice is None else advice.remedy
    out: list[str | Markup] = [
        "The inputs that lose most bits when each token has a step of its own. Upright bright lines are "
        "channels that stand out at every token; level ones are tokens that stand out. Histograms count in "
        "steps of INT8."
    ]
    for picture in seen.pictures:
        out += _one(seen, picture, chosen)
    return out


def _one(seen: Inspection, picture: Picture, chosen: Remedy) -> list[Markup]:
    name, report = picture.group.name, picture.group.input
    values = picture.first.numpy()
    words = [seen.tokens.at(t) for t in range(len(values))]
    out = [
        Markup("<h3>Input of {}</h3>").format(name),
        heat_map(
            values.astype("float64"),
            x="channel",
            y="token",
            unit="|x|",
            low=max(float(picture.first.median()), float(picture.first.max()) / 1e4, 1e-30),  # half is dark
            title=f"|x| at the first {len(values)} tokens, input of {name}",
            rows=words,
            marks=[c.index for c in report.channels],
            note=f"Triangles: the {len(report.channels)} channels that stand out." if report.channels else "",
        ),
    ]
    remedies = dict.fromkeys([Remedy.CHANNEL, chosen])
    for remedy in remedies:
        x, weights = picture.case.prepared(remedy)
        out.append(_steps(x, f"Inputs, {remedy}", "input / step of its token"))
    first = next(iter(weights))
    out.append(_steps(weights[first], f"Weights of {first}, {chosen}", "weight / step of its row"))
    return out


def _middle(middle: float) -> str:
    """Where half of the values are, as a sentence."""
    if middle == 0:
        return "More than half of all values are rounded to 0."
    return f"Half of all values lie within {middle:.0f} step{'' if middle == 1 else 's'} of zero."


def _steps(x: Tensor, title: str, label: str) -> Markup:
    """A histogram of rows in units of their own steps."""
    steps = x.abs().amax(1, keepdim=True).clamp(min=1e-30) / LEVELS
    codes = (x / steps).round().flatten()
    counts = torch.histc(codes, bins=2 * LEVELS + 1, min=-LEVELS - 0.5, max=LEVELS + 0.5)
    middle = float(codes.abs().median())
    edges = [i - LEVELS - 0.5 for i in range(2 * LEVELS + 2)]
    return histogram(
        [int(c) for c in counts],
        edges,
        x=label,
        title=title,
        grid=[float(i) for i in range(-LEVELS, LEVELS + 1)],
        grid_name="the values of INT8",
        note=_middle(middle),
    )
