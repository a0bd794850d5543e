"""How `fewbit explain` speaks: explanations as sentences and tables.

``remarks`` are sentences about what is special in a case. The walk of one number has a file of its own.
"""

from __future__ import annotations

from fractions import Fraction

from fewbit.analyze.codes import Point
from fewbit.analyze.exact import approximate, full, is_finite, short
from fewbit.analyze.explain import Case, Explanation
from fewbit.analyze.explain_block import BlockExplanation
from fewbit.cli.show import number, table
from fewbit.grid import Float, Grid, Specials


def print_table(found: list[tuple[str, Explanation]], label: bool) -> None:
    """One row for every number and format; ``label`` puts the number in front."""
    rows = []
    for text, each in found:
        held = "-" if each.held is None else short(each.held.value)
        bits = "-" if each.held is None else each.held.bits
        row = [each.grid.name, bits, held, signed(each.error), relative(each.relative), _note(each)]
        rows.append([text, *row] if label else row)
    columns = ["format", "bits", "value held", ">error", ">relative", "note"]
    table(["number", *columns] if label else columns, rows)


def _note(each: Explanation) -> str:
    """The case, in the words of a table cell."""
    if each.held is not None and is_finite(each.given) and each.held.value == 0 != each.given:
        return "lost: rounds to 0" if each.case in (Case.ROUNDED, Case.TIE) else each.case
    if each.walk is not None and each.walk.subnormal:
        return f"{each.case}, subnormal"
    return str(each.case)


def remarks(each: Explanation) -> list[str]:
    """Sentences on overflow, underflow, signs and codes that the format lacks."""
    grid, x, name = each.grid, each.given, each.grid.name
    if x != x:
        return [_about_nan(each)]
    said = []
    held = "" if each.held is None else short(each.held.value)
    if each.case is Case.NO_CODE:
        lack = "sign" if x < 0 else "zero"
        cast = "; a cast without saturation gives NaN" if each.cast is not None else ""
        said.append(f"{name} has no {lack}: {short(x)} becomes its smallest value, {held}{cast}")
    elif each.case is Case.SATURATED:
        end = "largest" if x > each.held.value else "smallest"
        said.append(f"{short(x)} is beyond the {end} value of {name}, {held}, and becomes it (saturation)")
        if each.cast is not None:
            lost = "Inf" if each.cast.value == each.cast.value else f"NaN, because {name} has no Inf"
            said.append(f"a cast without saturation gives {lost}")
        elif isinstance(grid, Float) and grid.specials is not Specials.NONE:
            said.append("it lies less than half a step beyond, so a cast without saturation gives the same")
        elif isinstance(grid, Float):
            said.append(f"{name} has no code for Inf or NaN, so every cast saturates")
    elif not is_finite(x):
        said.append(f"{name} has a code for infinity: {grid.specials.value}")
    elif each.held.value == 0 != x:
        said.append(f"{short(x)} is nearer to 0 than to the smallest value of {name}: it is lost")
    elif each.walk is not None and each.walk.subnormal:
        said.append(
            f"below 2^{grid.emin}, the smallest normal number of {name}: a subnormal, with exponent field 0 "
            f"and steps of 2^{grid.emin - grid.mantissa_bits} all the way to 0"
        )
    if isinstance(grid, Float):
        if x == 0 and not isinstance(x, Fraction) and grid.signed:
            kept = grid.specials is not Specials.FNUZ
            said.append(
                "-0 keeps its sign: only the sign bit is set"
                if kept
                else f"{name} has one zero: what would be -0 is its NaN, so -0 becomes 0"
            )
        if not grid.zero and each.walk is None and each.case is Case.ROUNDED and x > Fraction(2) ** grid.emin:
            said.append("between its two smallest values the casts of torch and ml_dtypes take the upper one")
        if grid.spare_bits:
            said.append(f"the first {grid.spare_bits} bit of {name} is stored and always 0")
    return said


def _about_nan(each: Explanation) -> str:
    name = each.grid.name
    if each.held is None:
        return f"{name} has no code for NaN, and what rounding makes of one is no promise: exclude NaN first"
    if each.case is Case.NO_CODE:
        return f"{name} has no code for NaN; it becomes {short(each.held.value)}"
    return f"NaN is no number; {name} keeps it: {each.grid.specials.value}"


def hexadecimal(grid: Grid, code: int) -> str:
    """A bit pattern in as many hexadecimal digits as the grid has bits for."""
    return f"0x{code:0{-(-grid.bits // 4)}x}"


def anatomy(each: Explanation) -> str:
    """Name and make-up of a grid in one line."""
    grid = each.grid
    if isinstance(grid, Float):
        sign = "1 sign bit" if grid.signed else "no sign"
        return (
            f"{grid.name}: {sign}, {grid.exponent_bits} exponent bits (bias {grid.bias}), "
            f"{grid.mantissa_bits} fraction bits"
        )
    step = "a table of values" if each.step is None else f"steps of {short(each.step)}"
    return f"{grid.name}: {grid.bits} bits, from {number(grid.min)} to {number(grid.max)}, {step}"


def print_neighbours(each: Explanation) -> None:
    """The value held between its neighbours, and how far each lies from the number."""
    rows = []
    for name, point in (("below", each.below), ("held", each.held), ("above", each.above)):
        if point is not None:
            away = ""
            if is_finite(each.given) and is_finite(point.value):
                away = signed(Fraction(point.value) - Fraction(each.given))
            rows.append((name, hexadecimal(each.grid, point.code), point.bits, _value(point), away))
    table(("", "code", "bits", "value", ">off by"), rows)


def _value(point: Point) -> str:
    """Every digit as far as a line holds them."""
    return short(point.value, 45)


def print_code(each: Explanation) -> None:
    """What a bit pattern means."""
    grid, point = each.grid, each.held
    print(f"{hexadecimal(grid, point.code)} in {anatomy(each)}\n")
    for name, bits in point.parts:
        print(f"{name:18}{bits:12}{_meaning(each, name, bits)}".rstrip())
    if isinstance(grid, Float) and is_finite(point.value):
        fields = dict(point.parts)
        field = int(fields["exponent"], 2)
        normal = bool(field) or not grid.zero
        exponent = (field if normal else 1) - grid.bias
        fraction = fields.get("fraction", "")
        minus = "-" if fields.get("sign") == "1" else ""
        binary = f"{minus}{int(normal)}.{fraction or '0'} in binary x 2^{exponent}"
        print(f"{'value':18}{binary} = {full(point.value)}")
    else:
        print(f"{'value':18}{full(point.value)}")
    for sentence in remarks(each):
        print(f"Note: {sentence}.")
    if is_finite(point.value):
        print_neighbours(each)


def _meaning(each: Explanation, name: str, bits: str) -> str:
    grid = each.grid
    if name == "sign":
        return "negative" if bits == "1" else "positive"
    if name == "exponent":
        field = int(bits, 2)
        if not is_finite(each.held.value):
            return f"{field}; the code as a whole is set apart"
        if field or not grid.zero:
            return f"{field}; less the bias {grid.bias}: {field - grid.bias}"
        return f"0: the first digit is 0 and the exponent that of field 1, {1 - grid.bias}"
    if name == "fraction":
        return f"{int(bits, 2)}/{2 ** len(bits)}"
    return str(int(bits, 2)) if name == "index" else ""


# Several numbers as a block.


def print_block(name: str, texts: list[str], each: BlockExplanation) -> None:
    """The shared scales, every element, and the same numbers without the largest."""
    fmt = each.format
    print(f"{len(texts)} numbers in {name}: elements {fmt.grid.name}, {fmt.grid.bits} bits each\n")
    if each.resized:
        print(f"Where its blocks do not tile {len(texts)} numbers, these are one block.")
    if len(each.levels) > 1:
        print("The outer scale is fitted to these numbers alone; in a tensor many blocks share it.")
    for i, level in enumerate(each.levels):
        what = "scale" if i == 0 else "times the scale above it"
        points = dict.fromkeys(f"{p.bits} = {short(p.value)}" for p in level.points)
        offset = "" if level.offset is None else f", plus {number(level.offset)}"
        print(f"{what} in {level.grid.name}: {'; '.join(points)}{offset}")
    rows = []
    for text, e in zip(texts, each.elements, strict=True):
        held, scale = short(e.held), short(each.steps[e.block], 16)
        zero = [short(each.zeros[e.block], 16)] if each.zeros else []
        rows.append((text, scale, *zero, e.bits, hexadecimal(fmt.grid, e.code), held, signed(e.error)))
    table(
        ("number", ">scale", *([">zero"] if each.zeros else []), "bits", "code", "value held", ">error"), rows
    )
    print(f"Total squared error {number(approximate(each.squared_error))}, {_snr(each)}.")
    if each.without is not None:
        _print_without(texts, each)


def _snr(each: BlockExplanation) -> str:
    return "no error at all" if each.snr_db is None else f"SNR {each.snr_db:.1f} dB"


def _print_without(texts: list[str], each: BlockExplanation) -> None:
    other = each.without
    here, alone = approximate(each.squared_error_rest), approximate(other.squared_error)
    scales = ", ".join(dict.fromkeys(short(s, 16) for s in other.steps))
    print(f"Without {texts[each.outlier]} the scale would be {scales}:")
    kept = [text for i, text in enumerate(texts) if i != each.outlier]
    rows = [(t, e.bits, short(e.held), signed(e.error)) for t, e in zip(kept, other.elements, strict=True)]
    table(("number", "bits", "value held", ">error"), rows)
    times = f", {number(here / alone)} times less" if alone and here > alone else ""
    print(f"Squared error of the others: {number(alone)} instead of {number(here)}{times}.")


def signed(x: Fraction | None) -> str:
    """An error with its sign, four digits."""
    return "-" if x is None else "0" if not x else f"{approximate(x):+.4g}"


def relative(x: Fraction | None) -> str:
    """A relative error, three digits."""
    return "-" if x is None else "0" if not x else f"{approximate(x):.3g}"
