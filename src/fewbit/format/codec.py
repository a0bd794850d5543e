"""Frozen dataclasses to plain data and back: how formats, solvers and recipes are written to YAML and JSON.

An object becomes ``{"type": class name, field: value, ...}`` with only the fields that differ from their
default; a named grid becomes its name; enums their value; tuples lists. Nothing is imported by name from the
text: the classes that may appear are handed in, so a file cannot name anything else.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Sequence
from enum import StrEnum

from fewbit.errors import InputError
from fewbit.format import RANGES
from fewbit.format.activation import Activation
from fewbit.format.block import BLOCKS
from fewbit.format.format import Codebook, Format
from fewbit.format.split import Split
from fewbit.grid import by_name
from fewbit.grid.grid import Grid

FORMAT_CLASSES = (Format, Codebook, Activation, Split, *BLOCKS, *RANGES)


def to_plain(value: object) -> object:
    """A frozen dataclass (to any depth) as dicts, lists, strings, numbers and None."""
    if isinstance(value, Grid):
        return _name(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        out = {"type": type(value).__name__}
        for f in dataclasses.fields(value):
            got = getattr(value, f.name)
            if f.default is dataclasses.MISSING or got != f.default:
                out[f.name] = to_plain(got)
        return out
    if isinstance(value, StrEnum):
        return value.value
    if isinstance(value, tuple | list):
        return [to_plain(v) for v in value]
    return value


def _name(grid: Grid) -> str:
    """The name that finds the grid again."""
    try:
        found = by_name(grid.name)
    except InputError:
        found = None
    if found != grid:
        raise InputError(
            f"grid {grid.name!r} has no name of its own and cannot be written to a file; add it to "
            "fewbit.grid.GRIDS"
        )
    return grid.name


def from_plain(data: object, classes: Sequence[type] = FORMAT_CLASSES) -> object:
    """Inverse of ``to_plain``. Raises ``InputError`` for an unknown class or field, naming the ones that
    exist.
    """
    if isinstance(data, list | tuple):
        return tuple(from_plain(v, classes) for v in data)
    if not isinstance(data, dict):
        return data
    by_type = {c.__name__: c for c in classes}
    cls = by_type.get(data.get("type"))
    if cls is None:
        raise InputError(
            f"unknown type {data.get('type')!r:.60} in a saved recipe or format; known are "
            f"{', '.join(sorted(by_type))}"
        )
    hints = typing.get_type_hints(cls, localns=by_type)
    known = {f.name for f in dataclasses.fields(cls)}
    unknown = sorted(set(data) - known - {"type"})
    if unknown:
        raise InputError(
            f"{cls.__name__} has no field {unknown[0]!r:.60}; its fields are {', '.join(sorted(known))}"
        )
    fields = {k: _coerce(v, hints[k], classes) for k, v in data.items() if k != "type"}
    try:
        return cls(**fields)
    except TypeError as error:
        raise InputError(f"a saved {cls.__name__} cannot be rebuilt: {error}") from None


def _coerce(value: object, hint: object, classes: Sequence[type]) -> object:
    """One field: grids by name, enums by value, everything else by its own type tag."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for option in options:
        if isinstance(option, type) and issubclass(option, Grid) and isinstance(value, str):
            return by_name(value)
        if isinstance(option, type) and issubclass(option, StrEnum) and value in list(option):
            return option(value)
    return from_plain(value, classes)
