"""Every layer in one picture and one table."""

from __future__ import annotations

from markupsafe import Markup

from fewbit.inspect.look import GroupReport, Inspection, LayerReport
from fewbit.inspect.remedies import ALPHA, Remedy
from fewbit.report import Axis, Cell, Column, Drawn, Series, chart, table

CHANNELS = 12  # named in a row


def ranges(seen: Inspection) -> Markup:
    """How far inputs reach against how far weights do, a point for each layer."""
    series = []
    for name, behind in (("behind norms", True), ("behind other layers", False)):
        own = [(g, layer) for g in seen.groups if (g.norm is not None) is behind for layer in g.layers]
        points = [(reach(layer.largest, layer.rms), reach(g.input.largest, g.input.rms)) for g, layer in own]
        labels = [layer.name for _, layer in own]
        series.append(Series(name=name, points=points, labels=labels, drawn=Drawn.POINTS))
    return chart(
        series,
        x=Axis(label="weights: largest over rms", log=True),
        y=Axis(label="inputs: largest over rms", log=True),
        title="Range of inputs against range of weights",
        note="About 5 is what normal values reach. High: inputs need a remedy; far right: weights do.",
    )


def layers(seen: Inspection) -> Markup:
    """The table of all layers."""
    columns = [
        Column(name="layer"),
        Column(name="block", number=True),
        Column(name="input largest", number=True),
        Column(name="input rms", number=True),
        Column(name="kurtosis", number=True, help="of its input; 3 for normal values"),
        Column(name="bits lost, one step", number=True, digits=3),
        Column(name="bits lost, per token", number=True, digits=3),
        Column(name="channels out", number=True),
        Column(name="weight largest / rms", number=True, digits=3),
        *(Column(name=f"{r} W8A8", number=True) for r in Remedy if r is not Remedy.SMOOTH),
        Column(name="best"),
        Column(name="channels that stand out"),
    ]
    rows = [_layer(g, layer) for g in seen.groups for layer in g.layers]
    return table(columns, rows, caption=f"{len(rows)} layers; press the name of a column to sort by it")


def _layer(g: GroupReport, layer: LayerReport) -> tuple:
    errors = layer.errors[8]
    best = min((r for r in Remedy if g.norm is not None or r not in ALPHA), key=lambda r: errors[r])
    which = ", ".join(str(c.index) for c in g.input.channels[:CHANNELS])
    more = len(g.input.channels) - CHANNELS
    which += f" and {more} more" if more > 0 else ""
    return (
        layer.name,
        g.block,
        g.input.largest,
        g.input.rms,
        g.input.kurtosis,
        g.input.bits_lost,
        g.input.bits_lost_token,
        len(g.input.channels),
        reach(layer.largest, layer.rms),
        *(Cell(text=percent(errors[r]), value=errors[r]) for r in Remedy if r is not Remedy.SMOOTH),
        str(best),
        which,
    )


def reach(largest: float, rms: float) -> float:
    """How far values reach, in units of their rms."""
    return largest / max(rms, 1e-30)


def percent(share: float) -> str:
    """A share with two digits that say something."""
    value = 100 * share
    return f"{value:.3g} %" if value < 10 else f"{value:.1f} %"
