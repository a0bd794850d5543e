"""``fewbit formats``: every grid, every block format, and which GPU computes in what."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fewbit.cli.options import Json

if TYPE_CHECKING:
    from fewbit.analyze.hardware import NumberType
    from fewbit.format import Block, Format
    from fewbit.grid import Grid

SHAPE = (4096, 4096)  # what bits per value are counted on, where they depend on the matrix
GRID_COLUMNS = (
    *("grid", ">bits", ">max", ">min normal", ">subnormal", ">epsilon", ">range dB", ">values"),
    "also",
)
BLOCK_COLUMNS = ("block format", "element", "block", "range", "step", "zero", ">bits")


def formats(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="NAME", help="Show these grids and block formats only, as e4m3fn mxfp4."),
    ] = None,
    hardware: Annotated[
        bool, typer.Option("--hardware", help="Say which GPU, from P100 to B200, computes in what.")
    ] = False,
    as_json: Json = False,
) -> None:
    """List every named grid at unit scale, then the block formats made of them and their bits per value.

    A grid is what --set grid=NAME takes; a block format says besides how many values share a step and how the
    step is stored.
    """
    from fewbit.analyze.hardware import NUMBER_TYPES, type_of
    from fewbit.format.named import FORMATS
    from fewbit.grid import GRIDS

    grids, blocks = (list(GRIDS), dict(FORMATS)) if not names else _chosen(names)
    if hardware:
        types = NUMBER_TYPES
        if names:
            types = tuple(dict.fromkeys(type_of(name) for name in (*(g.name for g in grids), *blocks)))
        _print_hardware(types, as_json)
    elif as_json:
        from fewbit.cli.show import print_json

        described = [asdict(grid.describe()) for grid in grids]
        print_json({"formats": described, "block_formats": [_block_json(n, f) for n, f in blocks.items()]})
    else:
        _print_tables(grids, blocks)


def _chosen(names: list[str]) -> tuple[list[Grid], dict[str, Format]]:
    """The grids and block formats of these names, in the order given."""
    from fewbit.cli.names import find

    grids, blocks = {}, {}
    for name in names:
        grid, block = find(name)
        if grid is not None:
            grids[grid] = None
        if block is not None:
            blocks[name.strip().lower()] = block
    return list(grids), blocks


# -- the two tables


def _print_tables(grids: list[Grid], blocks: dict[str, Format]) -> None:
    from fewbit.cli.show import table

    if grids:
        table(GRID_COLUMNS, map(_grid_row, grids), sys.stdout)
    if grids and blocks:
        print()
    if blocks:
        table(BLOCK_COLUMNS, (_block_row(*each) for each in blocks.items()), sys.stdout)
        print(f"Bits per value with everything counted, on a matrix of {SHAPE[0]} x {SHAPE[1]}.")


def _grid_row(grid: Grid) -> tuple[str, ...]:
    from fewbit.cli.show import number

    each = grid.describe()
    bits = str(each.bits) if grid.width == 1 else f"{each.bits}/{grid.width}"
    decibels = "-" if each.dynamic_range_db is None else f"{each.dynamic_range_db:.1f}"
    figures = (each.max, each.min_normal, each.smallest_subnormal, each.epsilon)
    return (each.name, bits, *map(number, figures), decibels, f"{each.distinct:,}", ", ".join(each.specials))


def _block_row(name: str, fmt: Format) -> tuple[str, ...]:
    bits = fmt.bits_per_weight(SHAPE)
    return (
        *(name, fmt.grid.name, _block_words(fmt.block), _rule(fmt), _step_words(fmt)),
        *("-" if fmt.zero == "none" else fmt.zero.value, f"{bits:.4g}"),
    )


def _block_json(name: str, fmt: Format) -> dict[str, Any]:
    from fewbit.format.codec import to_plain

    return {
        "name": name,
        "element": fmt.grid.name,
        "block": _block_words(fmt.block),
        "range": _rule(fmt),
        "step": _step_words(fmt),
        "zero": fmt.zero.value,
        "bits_per_value": fmt.bits_per_weight(SHAPE),
        "definition": to_plain(fmt),
    }


def _block_words(block: Block) -> str:
    """'32 in a row', '64 in memory order', '128 x 128', 'row', 'tensor'."""
    from fewbit.format import Block2d, Channel, Flat, Group

    if isinstance(block, Group):
        return f"{block.size} in a row"
    if isinstance(block, Flat):
        return f"{block.size} in memory order"
    if isinstance(block, Block2d):
        return f"{block.rows} x {block.cols}"
    return "row" if isinstance(block, Channel) else "tensor"


def _rule(fmt: Format) -> str:
    """'absmax', '2^n, floor'."""
    from fewbit.format.fit import PowerOfTwo

    if isinstance(fmt.range, PowerOfTwo):
        return f"2^n, {fmt.range.rule.value}"
    return type(fmt.range).__name__.lower()


def _step_words(fmt: Format) -> str:
    """'e8m0'; 'ue4m3 x fp32 for the tensor'; 'micro1 x e8m0 for 8 of them': what is stored of each step."""
    from fewbit.format import Flat, Group, Zero

    own = fmt.scale
    if own is None:
        return "none"
    if own.scale is None:
        return own.grid.name
    size = own.block.size if isinstance(own.block, Group | Flat) else None
    shared = f"{size} of them" if size else f"the {_block_words(own.block)}"
    mean = " + mean" if own.zero is Zero.MEAN else ""
    return f"{own.grid.name} x {_step_words(own)} for {shared}{mean}"


# -- the table of GPUs


def _print_hardware(types: tuple[NumberType, ...], as_json: bool) -> None:
    from fewbit.analyze.hardware import FOOTNOTES, GENERATIONS, footnotes, support
    from fewbit.cli.show import facts, print_json, table

    if as_json:
        rows = [
            {
                "type": each.name,
                "holds": each.holds,
                "support": {g.gpu: support(each, g).value for g in GENERATIONS},
                "notes": [asdict(note) for note in FOOTNOTES if note.type == each.name],
            }
            for each in types
        ]
        gpus = [{"gpu": g.gpu, "generation": g.name, "year": g.year, "id": g.capability} for g in GENERATIONS]
        print_json({"gpus": gpus, "types": rows})
        return

    used: dict[int, int] = {}  # footnotes are numbered as they are met

    def marked(text: str, numbers: tuple[int, ...]) -> str:
        return text + "".join(f"({used.setdefault(n, len(used) + 1)})" for n in numbers)

    rows = [
        (
            marked(each.name, footnotes(each)),
            *(marked(support(each, g).value, footnotes(each, g)) for g in GENERATIONS),
        )
        for each in types
    ]
    table(("", *(f"{g.gpu}\n{g.name}\n{g.year}" for g in GENERATIONS)), rows, sys.stdout)
    print()
    meaning = {
        "tensor": "an operand of the matrix units",
        "cores": "arithmetic on the ordinary cores alone",
        "stored": "unpacked to a wider type before arithmetic: saves memory and bandwidth, not arithmetic",
    }
    notes = [(f"({mark})", FOOTNOTES[number - 1].text) for number, mark in used.items()]
    facts([*meaning.items(), *notes], sys.stdout)
