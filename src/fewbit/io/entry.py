"""What a configuration says of one quantized module, whatever the layout."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fewbit.errors import InputError
from fewbit.format.activation import Activation
from fewbit.format.codec import FORMAT_CLASSES
from fewbit.format.format import Format
from fewbit.format.split import Apart
from fewbit.io import inputs
from fewbit.io.typed import MOST, check_types
from fewbit.transform import Hadamard, Kronecker, Map

CLASSES = (*FORMAT_CLASSES, Apart, Hadamard, Kronecker)  # what a configuration may name

Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What the configuration says of a quantized module: Format, shape [out, in], layout, input, columns
    kept apart. Raises ``InputError`` for what is no matrix, and for fields of another type.
    """

    format: Format
    shape: Shape
    transposed: bool = False
    activation: Activation | None = None
    online: Map | None = None
    output: Map | None = None
    apart: Apart | None = None
    ordered: bool = False

    def __post_init__(self):
        if not all(isinstance(n, int) and 0 < n < MOST for n in self.shape) or len(self.shape) != 2:
            raise InputError(f"a quantized weight is a matrix [out, in], not of shape {self.shape!r:.60}")
        check_types(self, CLASSES)
        rows, columns = self.shape
        for side, n in ((self.online, columns), (self.output, rows)):
            if side is not None and getattr(side, "size", n) != n:
                raise InputError(f"{side} does not map the {n} numbers of a side of {list(self.shape)}")
        if self.apart is not None and not 0 < self.apart.columns <= columns:
            raise InputError(f"{self.apart.columns} columns apart are impossible in {list(self.shape)}")

    @property
    def stored(self) -> tuple:
        """Format, shape and, where there are any, columns apart or in another order: what ``from_dict`` and
        ``names`` ask.
        """
        if self.ordered:
            return (self.format, self.shape, self.apart, True)
        return (self.format, self.shape) if self.apart is None else (self.format, self.shape, self.apart)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight; columns kept apart, and static steps or means of the input, counted."""
        bits = inputs.bits(self.activation, self.shape[1])
        bits += 0 if self.apart is None else self.apart.bits(self.shape[0])
        bits += 32 * self.shape[1] if self.ordered else 0
        return self.format.bits_per_weight(self.shape) + bits / math.prod(self.shape)
