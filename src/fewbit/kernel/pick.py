"""Which implementation of an operation runs: the first of a tuple that supports the case.

Every operation has one eager reference that supports everything and stands last: there is always an answer.
Road not taken: a dispatcher that registers implementations at import; a tuple can be read.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from fewbit.format.activation import Activation
from fewbit.format.format import Format


@dataclass(frozen=True, kw_only=True)
class Implementation:
    """One way to compute an operation.

    supports: (device type, format of the weight, dtype, Activation or None) -> bool; run: the operation
    itself.
    """

    name: str
    supports: Callable[[str, Format, torch.dtype, Activation | None], bool]
    run: Callable


@functools.lru_cache(maxsize=1024)
def pick(
    implementations: tuple[Implementation, ...],
    device: str,
    fmt: Format,
    dtype: torch.dtype,
    activation: Activation | None = None,
) -> Implementation:
    """The first of ``implementations`` that supports device type ("cpu", "cuda"), formats and dtype.

    The tuple must end in one that supports everything.
    """
    return next(i for i in implementations if i.supports(device, fmt, dtype, activation))
