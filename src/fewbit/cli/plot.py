"""``fewbit plot``: the points of formats on a number line, and error against bits."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fewbit.cli.options import note

Output = Annotated[
    Path, typer.Option("--output", "-o", metavar="FILE", help="A file that ends in .svg, .png or .pdf.")
]

app = typer.Typer(
    help="Draw the two pictures of number formats (needs matplotlib: pip install 'fewbit[report]').",
    rich_markup_mode="markdown",
)


@app.command(epilog="Example:  fewbit plot points int4 nf4 e2m1 -o points.svg")
def points(
    output: Output,
    formats: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="FORMAT", help="Grids of `fewbit formats`, one row each.", show_default="a choice of nine"
        ),
    ] = None,
) -> None:
    """Draw every value that each format can hold, evenly scaled and on a logarithmic axis."""
    from fewbit.analyze.plots import check_path, number_line, save
    from fewbit.cli.names import find_grid

    check_path(output)
    grids = [find_grid(name, "draw those: before the steps they are its values") for name in formats or ()]
    save(number_line(grids), output)
    note(f"wrote {output}")


@app.command(epilog="Example:  fewbit plot error -o error.svg")
def error(output: Output) -> None:
    """Draw error against bits for Gauss, Laplace and heavy tails, with the bound that no code beats.

    Every point is measured as the picture is made.
    """
    from fewbit.analyze.plots import check_path, error_against_bits, save

    check_path(output)
    save(error_against_bits(), output)
    note(f"wrote {output}")
