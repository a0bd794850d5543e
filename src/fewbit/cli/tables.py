"""``fewbit recipes`` and ``fewbit formats``: what there is to choose from."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fewbit.cli import options
from fewbit.cli.options import Json, Settings
from fewbit.errors import InputError

if TYPE_CHECKING:
    from fewbit.grid import Description


def recipes(
    name: Annotated[
        str | None,
        typer.Argument(metavar="RECIPE", help="Print this recipe as YAML instead, for --recipe-file."),
    ] = None,
    settings: Settings = None,
    as_json: Json = False,
) -> None:
    """List the recipes with their settings, or print one as YAML."""
    from fewbit.cli.show import facts, print_json

    if name is not None:
        recipe = options.make_recipe(name, None, None, None, settings)
        if as_json:
            from fewbit.format.codec import to_plain

            print_json(to_plain(recipe))
        else:
            print(recipe.to_yaml(), end="")
        return
    if settings:
        raise InputError(
            "--set changes a setting of one recipe; name it, as in: fewbit recipes gptq --set bits=3"
        )
    known = _recipes()
    if as_json:
        print_json({"recipes": known})
        return
    for recipe in known:
        print(f"{recipe['name']}: {recipe['description']}")
        chosen = ", ".join(f"{key}={_plain(value)}" for key, value in recipe["settings"].items())
        facts([("  ", chosen)], sys.stdout)


def _recipes() -> list[dict[str, Any]]:
    """Name, first paragraph of the docstring, and settings with their defaults."""
    import inspect

    from fewbit.recipe import RECIPES

    return [
        {
            "name": function.__name__.replace("_", "-"),
            "description": " ".join(inspect.getdoc(function).split("\n\n")[0].split()),
            "settings": {key: p.default for key, p in inspect.signature(function).parameters.items()},
        }
        for function in RECIPES
    ]


def _plain(value: object) -> str:
    """A default as --set takes it."""
    return {True: "true", False: "false", None: "none"}[value] if value in (True, False, None) else str(value)


def formats(as_json: Json = False) -> None:
    """List every named grid, at unit scale: what --set grid=NAME takes."""
    from fewbit.cli.show import number, print_json, table
    from fewbit.grid import GRIDS, describe

    found = [describe(grid) for grid in GRIDS]
    if as_json:
        print_json({"formats": [_as_dict(each) for each in found]})
        return
    columns = (
        "name",
        ">bits",
        ">max",
        ">min normal",
        ">subnormal",
        ">epsilon",
        ">range dB",
        ">values",
        "also",
    )
    rows = (
        (
            each.name,
            str(each.bits),
            number(each.max),
            number(each.min_normal),
            number(each.smallest_subnormal),
            number(each.epsilon),
            f"{each.dynamic_range_db:.1f}",
            f"{each.distinct:,}",
            ", ".join(each.specials),
        )
        for each in found
    )
    table(columns, rows, sys.stdout)


def _as_dict(each: Description) -> dict[str, Any]:
    from dataclasses import asdict

    return asdict(each)
