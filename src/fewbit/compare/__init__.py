"""Compare recipes on one model: the same calibration, the same evaluation, a process of its own for each.

``fewbit.compare(setup, entries, folder)`` gives a `Comparison`; ``fewbit compare`` is the same as a command.
Folder and function share a name, as in ``fewbit.evaluate``: the module can be called.
"""

import sys
from types import ModuleType
from typing import Any

from fewbit.compare.listed import from_rows
from fewbit.compare.rows import Comparison, Row, front
from fewbit.compare.run import Watch, compare
from fewbit.compare.schedule import Schedule
from fewbit.compare.setup import Setup
from fewbit.recipe.entry import Entry, from_file, from_words

__all__ = [
    "Comparison", "Entry", "Row", "Schedule", "Setup", "Watch", "compare", "from_file", "from_rows",
    "from_words", "front",
]  # fmt: skip


class _Module(ModuleType):
    def __call__(self, *args: Any, **keywords: Any) -> Comparison:
        """`fewbit.compare.run.compare`."""
        return compare(*args, **keywords)


sys.modules[__name__].__class__ = _Module
