"""``fewbit recipes``: the recipes there are to choose from."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from fewbit.cli import options
from fewbit.cli.options import Json, Settings
from fewbit.errors import InputError


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
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)
