"""Dataclasses from a file, held against the types that they declare.

``from_plain`` (``fewbit.format.codec``) builds what a configuration names, and the classes check their
values; but to a class a group of "32" or 2.5 columns may pass for one of 32 until its first use. Here every
field, to any depth, must be of its declared type. Road not taken: a schema beside the classes, which would
say all of them twice.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Sequence

from fewbit.errors import InputError

MOST = 2**62  # what sizes and counts of a file stay below


def check_types(value: object, classes: Sequence[type]) -> None:
    """Raise ``InputError`` where a field of the dataclass ``value``, or of one inside it, has another type
    than its class declares. ``classes``: those that the declarations may name.
    """
    for name, hint in _hints(type(value), tuple(classes)).items():
        got = getattr(value, name)
        options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        if not any(_is(got, option) for option in options):
            raise InputError(
                f"the field {name} of a saved {type(value).__name__} is {_say(got)}, which is no "
                f"{_say(hint)}; the configuration is damaged, get the checkpoint again"
            )
        if dataclasses.is_dataclass(got):
            check_types(got, classes)


def _say(what: object) -> str:
    return getattr(what, "__name__", None) or f"{what!r:.60}"


@functools.lru_cache(maxsize=256)
def _hints(cls: type, classes: tuple[type, ...]) -> dict[str, object]:
    hints = typing.get_type_hints(cls, localns={c.__name__: c for c in classes})
    return {f.name: hints[f.name] for f in dataclasses.fields(cls) if f.init}


def _is(value: object, hint: object) -> bool:
    """Whether ``value`` is of one declared type; numbers must be finite, of a size that tensors can have."""
    hint = typing.get_origin(hint) or hint
    if not isinstance(hint, type):
        return True
    if hint in (int, float):
        fits = isinstance(value, (int, float) if hint is float else int) and not isinstance(value, bool)
        return fits and math.isfinite(value) and abs(value) < MOST
    return isinstance(value, hint)
