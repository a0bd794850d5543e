"""Recipes: one function per named method, in one tuple."""

from __future__ import annotations

import difflib
import inspect
import types
import typing
from collections.abc import Callable

from fewbit.errors import InputError
from fewbit.recipe.aqlm import aqlm
from fewbit.recipe.autoround import autoround
from fewbit.recipe.awq import awq
from fewbit.recipe.encoder import mixed_precision, peg_encoder
from fewbit.recipe.gptq import gptq
from fewbit.recipe.gptvq import gptvq
from fewbit.recipe.higgs import higgs
from fewbit.recipe.hqq import hqq
from fewbit.recipe.kmeans import kmeans
from fewbit.recipe.mofq import mofq
from fewbit.recipe.omniquant import omniquant
from fewbit.recipe.peg import peg
from fewbit.recipe.qoq import qoq
from fewbit.recipe.qtip import qtip
from fewbit.recipe.quarot import quarot
from fewbit.recipe.quip import quip, quip_sharp
from fewbit.recipe.recipe import Alternative, Recipe, Rule, from_yaml
from fewbit.recipe.rtn import fp8, int8, nf4, rtn
from fewbit.recipe.sites import Role, SiteRule
from fewbit.recipe.smoothquant import smoothquant
from fewbit.recipe.spinquant import spinquant
from fewbit.recipe.w8a8 import fp8_dynamic, llm_int8, quanto, w8a8

RECIPES: tuple[Callable[..., Recipe], ...] = (
    rtn,
    gptq,
    hqq,
    awq,
    smoothquant,
    int8,
    fp8,
    nf4,
    w8a8,
    llm_int8,
    fp8_dynamic,
    quanto,
    mofq,
    peg,
    peg_encoder,
    mixed_precision,
    quarot,
    qoq,
    spinquant,
    omniquant,
    autoround,
    higgs,
    quip,
    quip_sharp,
    qtip,
    kmeans,
    gptvq,
    aqlm,
)


def named(name: str, settings: dict[str, str] | None = None) -> Recipe:
    """The recipe called ``name`` with settings given as text (``--set key=value``).

    Raises ``InputError`` for an unknown recipe, an unknown setting or a value of the wrong kind.
    """
    by_name = {f.__name__.replace("_", "-"): f for f in RECIPES}
    if name not in by_name:
        near = difflib.get_close_matches(name, by_name, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise InputError(f"unknown recipe {name!r}; {hint}known are {', '.join(by_name)}")
    function = by_name[name]
    parameters = inspect.signature(function).parameters
    hints = typing.get_type_hints(function)
    chosen = {}
    for key, text in (settings or {}).items():
        key = key.replace("-", "_")
        if key not in parameters:
            raise InputError(
                f"recipe {name!r} has no setting {key!r}; its settings are {', '.join(parameters)}"
            )
        chosen[key] = _parse(name, key, text, hints[key])
    return function(**chosen)


def _parse(recipe: str, key: str, text: object, hint: object) -> object:
    """``text`` as the annotated type of a setting."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if type(None) in options and str(text).lower() == "none":
        return None
    kind = next(o for o in options if o is not type(None))
    try:
        if kind is bool:
            return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[
                str(text).lower()
            ]
        return kind(text)
    except (KeyError, ValueError):
        raise InputError(f"setting {key}={text!r} of recipe {recipe!r} is not {kind.__name__}") from None


__all__ = [
    "RECIPES", "Alternative", "Recipe", "Role", "Rule", "SiteRule", "aqlm", "autoround", "awq", "fp8",
    "fp8_dynamic", "from_yaml", "gptq", "gptvq", "higgs", "hqq", "int8", "kmeans", "llm_int8",
    "mixed_precision", "mofq", "named", "nf4", "omniquant", "peg", "peg_encoder", "qoq", "qtip", "quanto",
    "quarot", "quip", "quip_sharp", "rtn", "smoothquant", "spinquant", "w8a8",
]  # fmt: skip
