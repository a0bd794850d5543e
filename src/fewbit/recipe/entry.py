"""A recipe as words of the command line: what a person asked for, and what it means."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from fewbit.errors import InputError
from fewbit.recipe import named
from fewbit.recipe.recipe import Recipe, from_yaml


@dataclass(frozen=True, kw_only=True)
class Entry:
    """``name``: what its row is called; ``words``: the options of ``fewbit quantize`` that ask for it;
    ``heading``: of the table that the row belongs to.
    """

    name: str
    recipe: Recipe
    words: str
    heading: str = ""

    @property
    def title(self) -> str:
        """Heading and name in one: ``4 bit/GPTQ, symmetric``."""
        return f"{self.heading}/{self.name}" if self.heading else self.name


def from_words(text: str) -> Entry:
    """An entry from ``gptq`` or ``gptq:bits=3,group_size=64``.

    Raises InputError for what is neither, an unknown recipe, and a setting it does not have.
    """
    name, colon, rest = text.partition(":")
    settings: dict[str, str] = {}
    for pair in rest.split(",") if colon else ():
        key, equals, value = (part.strip() for part in pair.partition("="))
        if not equals or not key or not value:
            raise InputError(
                f"{text!r} holds {pair!r}, which is no setting; write settings as gptq:bits=3,group_size=64"
            )
        if key in settings:
            raise InputError(f"{text!r} gives the setting {key!r} twice; give it once")
        settings[key] = value
    words = "".join(f" --set {shlex.quote(f'{key}={value}')}" for key, value in settings.items())
    return Entry(name=text, recipe=named(name.strip(), settings), words=f"-r {name.strip()}{words}")


def from_file(path: str | Path) -> Entry:
    """An entry from a recipe file. Raises InputError for a file that holds no recipe."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise InputError(
            f"recipe file {path} cannot be read ({reason}); give a YAML file such as fewbit_recipe.yaml of a "
            "checkpoint"
        ) from None
    words = f"--recipe-file {shlex.quote(str(path))}"
    return Entry(name=path.stem, recipe=from_yaml(text, str(path)), words=words)
