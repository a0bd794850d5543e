"""The weight format that most recipes share: one grid, groups or rows, a range rule, a scale format."""

from __future__ import annotations

from fewbit.errors import InputError
from fewbit.format import (
    BF16,
    DOUBLE_QUANT,
    E4M3_OVER_FP32,
    E8M0,
    FP16,
    FP32,
    MSE,
    AbsMax,
    Channel,
    Divisor,
    Format,
    Group,
    MinMax,
    Percentile,
    PerTensor,
    Zero,
)
from fewbit.grid import by_name

SCALE_NAMES = {
    "bf16": BF16, "fp16": FP16, "fp32": FP32, "e8m0": E8M0, "e4m3": E4M3_OVER_FP32, "double": DOUBLE_QUANT,
}  # fmt: skip
RANGE_NAMES = {
    "absmax": AbsMax(), "minmax": MinMax(), "mse": MSE(), "mse-plain": MSE(weighted=False),
    "percentile": Percentile(),
}  # fmt: skip


def weight_format(
    bits: int,
    grid: str | None,
    group_size: int,
    symmetric: bool,
    zero: str,
    range: str,
    scale: str,
    divisor: str,
) -> Format:
    """The Format these settings name. ``group_size`` -1 is one scale per row, 0 one for the tensor.

    ``grid`` overrides ``bits`` with any grid of ``fewbit formats``. Raises ``InputError`` naming the choices.
    """
    return Format(
        grid=by_name(grid or f"int{bits}"),
        block={-1: Channel(), 0: PerTensor()}.get(group_size) or Group(group_size),
        range=choice("range", range, RANGE_NAMES),
        zero=Zero.NONE if symmetric else choice("zero", zero, {z.value: z for z in Zero}),
        divisor=choice("divisor", divisor, {d.value: d for d in Divisor}),
        scale=choice("scale", scale, SCALE_NAMES),
    )


def choice(setting: str, got: str, options: dict):
    """``options[got]``, or an ``InputError`` that lists them."""
    if got not in options:
        raise InputError(f"{setting}={got!r} is unknown; choose one of {', '.join(options)}")
    return options[got]
