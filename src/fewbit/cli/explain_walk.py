"""The walk of ``fewbit explain VALUE --format NAME``: each step that pencil and paper would take."""

from __future__ import annotations

from fractions import Fraction

from fewbit.analyze.exact import approximate, binary, is_finite, short
from fewbit.analyze.explain import Case, Explanation, Walk
from fewbit.cli.explain_text import anatomy, hexadecimal, print_neighbours, relative, remarks, signed
from fewbit.cli.show import number
from fewbit.grid import Float, Specials, Table

STEPS_SHOWN = 5  # of halving and of doubling
EXTRA_BITS = 9  # binary digits shown behind the cut
HALF = Fraction(1, 2)


def print_walk(text: str, each: Explanation) -> None:
    """Every step from a number to its code, and what the code holds."""
    print(f"{text} in {anatomy(each)}\n")
    if isinstance(each.grid, Float) and each.walk is not None:
        _print_float_steps(each, each.walk)
    elif each.held is not None and is_finite(each.given):
        _print_list_steps(each)
    for sentence in remarks(each):
        print(f"Note: {sentence}.")
    if each.held is not None:
        fields = " ".join(f"{name} {bits}" for name, bits in each.held.parts)
        print(f"Code: {each.held.bits}   ({fields}; {hexadecimal(each.grid, each.held.code)})")
        print_neighbours(each)
        _print_error(each)


def _print_float_steps(each: Explanation, walk: Walk) -> None:
    grid, a, M = each.grid, walk.magnitude, each.grid.mantissa_bits
    if grid.signed:
        negative = each.given < 0
        rest = "; from here on without it" if negative else ""
        print(f"1. Sign: the number is {'negative' if negative else 'positive'}, so {int(negative)}{rest}.")
    else:
        print("1. Sign: the format has none.")
    whole = a.numerator // a.denominator
    places = max(1, M + EXTRA_BITS - walk.exponent)
    print(f"2. The whole part in binary: {whole} = {_squeezed(f'{whole:b}')}")
    for line in _halvings(whole):
        print(f"      {line}")
    part = a - whole
    print(f"3. The rest in binary: {short(part, 60)} = {_squeezed(binary(part, places))}")
    for line in _doublings(part):
        print(f"      {line}")
    significand = binary(a / Fraction(2) ** walk.exponent, M + EXTRA_BITS)
    print("4. Together, with the point moved behind the first 1:")
    print(f"      {_squeezed(binary(a, places))} = {significand} x 2^{walk.exponent}")
    if walk.subnormal:
        moved = binary(a / Fraction(2) ** walk.used, M + EXTRA_BITS)
        print(f"      2^{walk.used} is the smallest there is, so the point moves back:")
        print(f"      {_squeezed(moved)} x 2^{walk.used}")
    _print_exponent(each, walk)
    _print_cut(each, walk)


def _print_exponent(each: Explanation, walk: Walk) -> None:
    grid, field = each.grid, walk.used + each.grid.bias
    if walk.subnormal:
        print(f"5. Exponent field: 0 = {0:0{grid.exponent_bits}b}, which says that the first digit is 0.")
    elif field >= 2**grid.exponent_bits:
        print(f"5. Exponent field: {walk.used} + {grid.bias} = {field}, more than {grid.exponent_bits} bits.")
    else:
        reserved = grid.specials is Specials.IEEE and field == 2**grid.exponent_bits - 1
        kept_for = ", which is kept for Inf and NaN" if reserved else ""
        bits = f"{field:0{grid.exponent_bits}b}"
        print(f"5. Exponent field: {walk.used} + {grid.bias} = {field} = {bits}{kept_for}")


def _print_cut(each: Explanation, walk: Walk) -> None:
    """Step 6: what is kept, what follows, and where that leads."""
    M = each.grid.mantissa_bits
    kept = f"{walk.kept >> M}.{walk.kept & (2**M - 1):0{M}b}" if M else f"{walk.kept}."
    follows = binary(walk.rest, EXTRA_BITS).partition(".")[2] or "0"
    print(
        f"6. {M or 'No'} binary digit{'s are' if M > 1 else ' is'} kept behind the point: {kept} | {follows}"
    )
    if walk.rest == 0:
        print("      Nothing follows, so nothing is lost.")
        return
    print(
        f"      What follows is {number(float(walk.rest))} of a step in the last place, {_direction(walk)}."
    )
    if walk.rounded == 2 ** (M + 1):
        print("      The carry runs through every digit: the fraction becomes 0 and the exponent grows by 1.")
    elif walk.subnormal and walk.rounded == 2**M:
        print("      The carry makes it the smallest normal number: exponent field 1.")
    if walk.truncated is not None and each.case is not Case.SATURATED:
        rows = [("cut off (truncated)", walk.truncated), ("rounded to nearest even", each.held)]
        width = max(len(name) for name, _ in rows)
        for name, point in rows:
            print(f"      {name:{width}}  {point.bits}  {short(point.value, 40)}")


def _direction(walk: Walk) -> str:
    """Which way the rest rounds, and why."""
    if walk.rest != HALF:
        return "more than half: up" if walk.rest > HALF else "less than half: down"
    way = "is 1: up" if walk.kept % 2 else "is 0: down"
    return f"exactly half: a tie, to the even neighbour (the last digit kept {way})"


def _halvings(whole: int) -> list[str]:
    """Halve and note the remainders, which read from the last to the first are the binary digits."""
    lines, n = [], whole
    while n and len(lines) < STEPS_SHOWN:
        lines.append(f"{n} / 2 = {n // 2} remainder {n % 2}")
        n //= 2
    if n:
        return [*lines, "and so on down to 0; the remainders from the last to the first are the digits"]
    return [*lines, "the remainders from the last to the first are the digits"] if len(lines) > 1 else []


def _doublings(part: Fraction) -> list[str]:
    """Double and note what stands before the point."""
    lines = []
    while part and len(lines) < STEPS_SHOWN:
        twice = 2 * part
        lines.append(f"{short(part, 60)} x 2 = {short(twice, 60)} -> {int(twice >= 1)}")
        part = twice - (twice >= 1)
    return [*lines, "and so on"] if part else lines


def _squeezed(digits: str, most: int = 60) -> str:
    """Binary digits with a long run of zeros, or a long whole part, told in words."""
    whole, point, part = digits.partition(".")
    if len(whole) > most:
        rest = whole[12:]
        whole = f"{whole[:12]}[{len(rest)} more digits]"
    zeros = len(part) - len(part.lstrip("0"))
    if zeros > 16 and len(part) > zeros:
        part = f"[{zeros} zeros]{part[zeros:]}"
    return whole + point + part


def _print_list_steps(each: Explanation) -> None:
    grid, x = each.grid, each.given
    if isinstance(grid, Float) or each.case is Case.SATURATED:
        return
    if each.case is Case.EXACT:
        print(f"{short(x)} is one of its values.")
    else:
        low, high = (each.below, each.held) if each.held.value > x else (each.held, each.above)
        middle = (Fraction(low.value) + Fraction(high.value)) / 2
        where = "above it" if x > middle else "below it"
        if each.case is Case.TIE:
            where = "a tie, to the " + ("lower" if isinstance(grid, Table) else "even one")
        between = f"{short(low.value)} and {short(high.value)}"
        print(f"{short(x)} lies between {between}, whose middle is {short(middle)}: {where}.")
    if isinstance(grid, Table):
        print(f"The code is the place in the table, counted from 0: {each.held.code}.")
        return
    q = int(Fraction(each.held.value) / each.step)
    steps = "" if each.step == 1 else f"In steps of {short(each.step)} it is {q}. "
    negative = f", in two's complement 2^{grid.bits} - {-q} = {2**grid.bits + q}" if q < 0 else ""
    print(f"{steps}The code is the integer {q}{negative}.")


def _print_error(each: Explanation) -> None:
    if each.error is None:
        return
    if not each.error:
        print("Held exactly: no error.")
        return
    unit = "units in the last place" if isinstance(each.grid, Float) else "steps"
    ulps = f", {number(approximate(each.ulps))} {unit}" if each.ulps is not None else ""
    share = f", {relative(each.relative)} of the number" if each.relative is not None else ""
    print(f"Error (held - given): {signed(each.error)}{ulps}{share}.")
