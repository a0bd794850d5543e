"""``fewbit explain``: what becomes of a number in a format, bit by bit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from fewbit.cli import options
from fewbit.cli.options import Json
from fewbit.errors import InputError

if TYPE_CHECKING:
    from fewbit.analyze.codes import Point
    from fewbit.analyze.exact import Exact
    from fewbit.analyze.explain import Explanation
    from fewbit.analyze.explain_block import BlockExplanation
    from fewbit.format import Format
    from fewbit.grid import Grid

USUAL = ("fp32", "tf32", "bf16", "fp16", "e4m3fn", "e5m2", "e3m2", "e2m3", "e2m1", "int8")
EPILOG = "Example:  fewbit explain 3.1415926535 --format fp32"
# "-3.5" is a number and no option; what is neither is refused as a number.
CONTEXT = {"ignore_unknown_options": True}


def explain(
    values: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="VALUE...",
            help="Numbers: 3.14, -1e-5, 0x1.8p3, 1/3, pi, inf, nan. Nothing is rounded first.",
        ),
    ] = None,
    names: Annotated[
        list[str] | None,
        typer.Option(
            "--format",
            metavar="NAME",
            help="A grid of `fewbit formats` or a block format such as mxfp4; may be given many times.",
        ),
    ] = None,
    code: Annotated[
        str | None,
        typer.Option(
            metavar="BITS",
            help="The other way round: what this bit pattern means (0x7e, 0b110, 126) in --format.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show the bits, the exact value held, the neighbours and the error of a number.

    One VALUE with one --format is a walk with pencil and paper; without --format it is a table of the usual
    formats. Several VALUEs with a block format are one block: the shared scale, and what an outlier costs.
    """
    from fewbit.cli.show import print_json

    if code is not None:
        found = _decoded(code, values or [], names or [])
        print_json({"codes": [_as_dict(each) for each in found]}) if as_json else _print_codes(found)
        return
    if not values:
        raise InputError(
            "no number is given; try: fewbit explain 3.14, or fewbit explain --code 0x7e --format e4m3fn"
        )
    from fewbit.analyze.exact import parse
    from fewbit.analyze.explain import explain as explain_number
    from fewbit.analyze.explain_block import explain_block
    from fewbit.format import Format

    numbers = [parse(text) for text in values]
    chosen = {name: _resolve(name, len(numbers)) for name in names or USUAL}
    single = [
        (text, explain_number(x, grid))
        for text, x in zip(values, numbers, strict=True)
        for grid in chosen.values()
        if not isinstance(grid, Format)
    ]
    blocks = [(name, explain_block(numbers, f)) for name, f in chosen.items() if isinstance(f, Format)]
    if as_json:
        print_json(
            {
                "numbers": [{"text": text, **_as_dict(each)} for text, each in single],
                "blocks": [{"format": name, **_block_as_dict(values, each)} for name, each in blocks],
            }
        )
        return
    _print(values, single, blocks, hint=not names)


def _resolve(name: str, count: int) -> Grid | Format:
    """The grid of a name, or the block format. A name of both (nf4) is the latter for several numbers."""
    from fewbit.cli.names import find
    from fewbit.format import Format

    grid, block = find(name)
    if block is not None and (count > 1 or grid is None):
        return block
    return Format(grid=grid) if grid.width > 1 else grid


def _decoded(code: str, values: list[str], names: list[str]) -> list[Explanation]:
    from fewbit.analyze.explain import decode
    from fewbit.cli.names import find_grid

    if values:
        raise InputError(f"--code {code} and the number {values[0]} are both given; give one of them")
    if not names:
        raise InputError(
            f"--code {code} means nothing without a format; add --format, such as --format e4m3fn"
        )
    try:
        pattern = int(code, 0)
    except ValueError:
        raise InputError(
            f"--code {code!r} is not a bit pattern; give one such as 0x7e, 0b1111110 or 126"
        ) from None
    return [decode(pattern, find_grid(name, "give --format that of the element")) for name in names]


def _print(
    values: list[str],
    single: list[tuple[str, Explanation]],
    blocks: list[tuple[str, BlockExplanation]],
    hint: bool,
) -> None:
    from fewbit.cli import explain_text
    from fewbit.cli.explain_walk import print_walk

    if len(single) == 1:
        print_walk(*single[0])
    elif single:
        explain_text.print_table(single, label=len(values) > 1)
    for i, (name, each) in enumerate(blocks):
        if single or i:
            print()
        explain_text.print_block(name, values, each)
    if hint:
        options.note(
            f"every step of one of them: fewbit explain {values[0]} --format {single[0][1].grid.name}"
        )


def _print_codes(found: list[Explanation]) -> None:
    from fewbit.cli import explain_text

    for i, each in enumerate(found):
        if i:
            print()
        explain_text.print_code(each)


# As JSON: numbers as {"exact": every digit or a fraction, "float": the nearest float64}.


def _number(x: Exact | None) -> dict[str, Any] | None:
    from fewbit.analyze.exact import approximate, full

    return None if x is None else {"exact": full(x), "float": approximate(x)}


def _point(point: Point | None) -> dict[str, Any] | None:
    if point is None:
        return None
    fields = dict(point.parts)
    return {"code": hex(point.code), "bits": point.bits, "fields": fields, "value": _number(point.value)}


def _as_dict(each: Explanation) -> dict[str, Any]:
    from fewbit.cli.explain_text import remarks

    walk = each.walk and {
        "exponent": each.walk.exponent,
        "used_exponent": each.walk.used,
        "subnormal": each.walk.subnormal,
        "kept": each.walk.kept,
        "rest": _number(each.walk.rest),
        "rounded": each.walk.rounded,
        "truncated": _point(each.walk.truncated),
    }
    return {
        "format": each.grid.name,
        "given": _number(each.given),
        "case": each.case.value,
        "held": _point(each.held),
        "below": _point(each.below),
        "above": _point(each.above),
        "error": _number(each.error),
        "relative_error": _number(each.relative),
        "step": _number(each.step),
        "error_in_steps": _number(each.ulps),
        "cast_without_saturation": _point(each.cast),
        "walk": walk,
        "remarks": remarks(each),
    }


def _block_as_dict(values: list[str], each: BlockExplanation) -> dict[str, Any]:
    """``values`` are the texts of the numbers in this block."""
    levels = [
        {"grid": level.grid.name, "codes": [_point(p) for p in level.points], "offset": level.offset}
        for level in each.levels
    ]
    elements = [
        {
            "text": text,
            "given": _number(e.given),
            "block": e.block,
            "code": hex(e.code),
            "bits": e.bits,
            "held": _number(e.held),
            "error": _number(e.error),
        }
        for text, e in zip(values, each.elements, strict=True)
    ]
    without = None
    if each.without is not None:
        others = [text for i, text in enumerate(values) if i != each.outlier]
        without = {
            "left_out": values[each.outlier],
            "squared_error_of_the_others_here": _number(each.squared_error_rest),
            **_block_as_dict(others, each.without),
        }
    return {
        "grid": each.format.grid.name,
        "resized": each.resized,
        "levels": levels,
        "scales": [_number(s) for s in each.steps],
        "zeros": [_number(z) for z in each.zeros],
        "elements": elements,
        "squared_error": _number(each.squared_error),
        "snr_db": each.snr_db,
        "without_largest": without,
    }
