"""Which group of a compressed-tensors configuration speaks of a module: by name, pattern or class."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

from fewbit.errors import InputError


def targets(groups: Sequence[Mapping]) -> Callable[[str], Mapping | None]:
    """What finds the group of a linear: by its name, else by the first pattern, else that of all linears.

    A pattern comes from a file, and Python's can take a time exponential in the length of a name: repeated
    groups and more than four open repeats, with which that happens, are refused.
    """
    named, patterns = {}, []
    for group in groups:
        targets = group.get("targets", [])
        if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
            raise InputError(f"the targets of a config group are {targets!r:.60}, no names; they are broken")
        for target in targets:
            if not target.startswith("re:"):
                named.setdefault(target, group)
                continue
            if re.search(r"[)][*+{]", target) or len(re.findall(r"[*+{]", target)) > 4 or len(target) > 2000:
                raise InputError(
                    f"the pattern {target!r:.60} of this compressed-tensors checkpoint repeats groups, or "
                    "more than four times, which can take forever; name the modules instead"
                )
            patterns.append((re.compile(target[3:]), group))
    if len(patterns) > 256:
        raise InputError(f"this compressed-tensors checkpoint has {len(patterns)} patterns; 256 are read")

    def find(module: str) -> Mapping | None:
        by_name = named.get(module)
        return by_name or next((g for p, g in patterns if p.match(module)), named.get("Linear"))

    return find
