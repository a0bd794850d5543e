"""Which rotations of QuaRot or SpinQuant a recipe asks for: plain data; ``fewbit.seams`` carries them out.

Ashkboos et al. 2024, https://arxiv.org/abs/2404.00456: the residual stream by a random Hadamard map, folded
into all weights that read or write it; the values head by head, folded into v and o; the inputs of the
writers (o, across heads, and down) by a Hadamard map that runs at every call, since no fold can rotate them.

Liu et al. 2024, https://arxiv.org/abs/2405.16406: the map of the stream is learned, starting from
that Hadamard map.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from fewbit.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Rotation:
    """The residual stream, and what else is rotated; ``seed`` of the signs.

    values: head by head, folded. online: the inputs of o and down, by maps that run at every call.

    steps: updates of the stream's map, each from ``batch`` windows of calibration text, at a rate that falls
    from ``lr`` to 0 along a cosine; 0 leaves it the random Hadamard map.
    """

    seed: int = 0
    values: bool = True
    online: bool = True
    steps: int = 0
    lr: float = 1.5
    batch: int = 8

    def __post_init__(self):
        if self.steps < 0 or self.batch < 1 or not 0 < self.lr < math.inf:
            raise InputError(
                f"a rotation learned in {self.steps} steps of {self.batch} windows at rate {self.lr} is "
                "impossible; give 0 or more steps, 1 or more windows and a positive rate"
            )
