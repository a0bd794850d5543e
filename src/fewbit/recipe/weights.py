"""The weight format that most recipes share: one grid, groups or rows, a range rule, a scale format.

Or a block format of the literature by its name (``fewbit formats`` lists them), which settles all of these.
Beside it inputs by a name: what engines multiply such weights by.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace

from fewbit.errors import InputError
from fewbit.format import (
    ACIQ,
    BF16,
    DOUBLE_QUANT,
    E4M3_OVER_FP32,
    E8M0,
    FP16,
    FP32,
    MSE,
    OCTAV,
    AbsMax,
    Channel,
    Divisor,
    Format,
    Gaussian,
    Group,
    LeastSquares,
    MinMax,
    OutputMSE,
    Percentile,
    PerTensor,
    PowerOfTwo,
    Scaling,
    Token,
    Zero,
    format_by_name,
)
from fewbit.format.activation import Activation
from fewbit.grid import by_name
from fewbit.solve import Aimed, Hqq, Ldlq, Rtn
from fewbit.transform import Incoherence

SOLVERS = {"rtn": Rtn(), "gptq": Ldlq(), "aimed": Aimed(solver=Ldlq()), "hqq": Hqq()}
AUTO = "auto"  # a named format's own range, otherwise the recipe's
SCALE_NAMES = {
    "bf16": BF16, "fp16": FP16, "fp32": FP32, "e8m0": E8M0, "e4m3": E4M3_OVER_FP32, "double": DOUBLE_QUANT,
}  # fmt: skip
RANGE_NAMES = {
    "absmax": AbsMax(), "minmax": MinMax(), "percentile": Percentile(), "mse": MSE(),
    "mse-plain": MSE(weighted=False), "output": OutputMSE(), "aciq": ACIQ(), "octav": OCTAV(),
    "gaussian": Gaussian(), "pow2": PowerOfTwo(),
    "least-squares": LeastSquares(), "least-squares-plain": LeastSquares(weighted=False),
    **{f"pow2-{rule}": PowerOfTwo(rule=rule) for rule in Scaling},
}  # fmt: skip
INPUTS = (
    "int8", "int8-static", "fp8", "fp8-static", "int4", "nvfp4", "mxfp4", "mxfp8",
)  # fmt: skip


def input_of(name: str | None) -> Activation | None:
    """How a recipe's ``input`` rounds what its layers read; None leaves it in float.

    int8, fp8, int4: one step per token, found at every call; -static: one per tensor, from calibration text;
    nvfp4: one per 16, in units of a stored one; mxfp4, mxfp8: one per 32, found at every call.
    """
    if name is None:
        return None
    kind, _, static = choice("input", name, dict(zip(INPUTS, INPUTS, strict=True))).partition("-")
    if kind in ("nvfp4", "mxfp4", "mxfp8"):
        own = format_by_name({"mxfp8": "mxfp8-e4m3"}.get(kind, kind))
        return Activation(format=own, static=kind == "nvfp4")
    points = by_name({"fp8": "e4m3fn"}.get(kind, kind))
    fmt = Format(grid=points, block=PerTensor() if static else Token(), scale=FP32)
    return Activation(format=fmt, static=bool(static))


def weight_format(recipe: Callable, format: str | None, range: str, default: str, **settings) -> Format:
    """The Format that the settings of ``recipe`` name; ``default`` is the range that "auto" means there.

    ``settings`` are those of `_built`. ``format`` names a block format instead; then they must be left at the
    defaults of ``recipe``. Raises ``InputError`` naming the choices.
    """
    if format is None:
        return _built(range=default if range == AUTO else range, **settings)
    parameters = inspect.signature(recipe).parameters
    changed = [key for key, value in settings.items() if value != parameters[key].default]
    if changed:
        raise InputError(
            f"format={format} settles {changed[0]}, which is set to {settings[changed[0]]!r} too; leave it "
            "out, or leave format out and give grid, group_size, scale and range"
        )
    found = format_by_name(format)
    return found if range == AUTO else replace(found, range=choice("range", range, RANGE_NAMES))


def _built(
    bits: int,
    grid: str | None,
    group_size: int,
    symmetric: bool,
    zero: str,
    range: str,
    scale: str,
    divisor: str,
) -> Format:
    """``group_size`` -1 is one scale per row, 0 one for the tensor; ``grid`` overrides ``bits``."""
    points = by_name(grid or f"int{bits}")
    if symmetric and not points.min < 0 < points.max:
        raise InputError(
            f"{points.name} holds one sign only, from {points.min:g} to {points.max:g}, and weights "
            "have both; set symmetric=false (zero=offset serves any grid) or use another grid"
        )
    return Format(
        grid=points,
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


def basis_of(basis: str, seed: int) -> Incoherence | None:
    """The basis that a recipe's setting names: none, or hadamard, a random one of both sides."""
    return choice("basis", basis, {"none": None, "hadamard": Incoherence(seed=seed)})
