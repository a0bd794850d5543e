"""Reports that a person opens in a browser: one HTML file with everything in it.

    page("What rounding costs", [
        Section(title="In short", parts=[facts([("model", "smollm2")]), "One paragraph of plain text."]),
        Section(title="Layers", parts=[table(columns, rows), chart(series, x=Axis(label="block"), y=...)]),
    ])

`page` gives the text of a file, `write` puts it on disk. Plain strings are paragraphs; whatever else stands
on a page is a `Markup`, in which every word that came from outside is escaped.
"""

from fewbit.report.chart import Drawn, Series, chart
from fewbit.report.heat import heat_map
from fewbit.report.histogram import histogram
from fewbit.report.page import Section, facts, page, write
from fewbit.report.scale import Axis
from fewbit.report.table import Cell, Column, table

__all__ = [
    "Axis",
    "Cell",
    "Column",
    "Drawn",
    "Section",
    "Series",
    "chart",
    "facts",
    "heat_map",
    "histogram",
    "page",
    "table",
    "write",
]
