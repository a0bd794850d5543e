"""A file of many rows: YAML, headings of tables with names and recipes under them.

4 bit:
  GPTQ, symmetric: gptq:group_size=64       # words, as -r takes them
  QuaRot onto MXFP4: recipes/quarot.yaml    # a recipe file, seen from this one
  mine: {name: mine, rules: [...]}          # a recipe as it stands in such a file
"""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import Any

import yaml

from fewbit.errors import InputError
from fewbit.recipe import from_yaml
from fewbit.recipe.entry import Entry, from_file, from_words


def from_rows(path: str | Path) -> list[Entry]:
    """The entries of a file of rows, in its order. Raises InputError for whatever in it is no row."""
    path = Path(path)
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), _Unique)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise InputError(
            f"file of rows {path} cannot be read ({reason}); give YAML: headings, names, recipes"
        ) from None
    except yaml.YAMLError as error:
        raise InputError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict) or not all(isinstance(rows, dict) for rows in data.values()):
        raise InputError(f"{path} holds no rows; write headings, and under each names with their recipes")
    return [
        _entry(path, str(heading), str(name), recipe)
        for heading, rows in data.items()
        for name, recipe in rows.items()
    ]


def _entry(path: Path, heading: str, name: str, recipe: Any) -> Entry:
    try:
        if isinstance(recipe, dict):
            made = from_yaml(yaml.safe_dump(recipe, sort_keys=False), "its recipe")
            found = Entry(name=name, recipe=made, words="--recipe-file FILE")
        elif isinstance(recipe, str) and recipe.endswith((".yaml", ".yml")):
            found = from_file(path.parent / recipe)
            found = dataclasses.replace(found, words=f"--recipe-file {shlex.quote(recipe)}")
        elif isinstance(recipe, str):
            found = from_words(recipe)
        else:
            raise InputError(f"got {recipe!r}; give words such as gptq:bits=3, a recipe file, or a recipe")
    except InputError as error:
        raise InputError(f"{path}, row {name!r} of {heading!r}: {error}") from None
    return dataclasses.replace(found, name=name, heading=heading)


class _Unique(yaml.SafeLoader):
    """YAML whose keys stand once: a second one would take the first one's row away, unseen."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.YAMLError(
                    f"{key.value!r} stands twice, the second time in line {key.start_mark.line + 1}"
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)
