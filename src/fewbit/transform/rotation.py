"""Which rotations of QuaRot a recipe asks for: plain data; ``fewbit.seams`` carries them out.

Ashkboos et al. 2024, https://arxiv.org/abs/2404.00456: the residual stream by a random Hadamard map, folded
into all weights that read or write it; the values head by head, folded into v and o; the inputs of the other
writers (down) by a Hadamard map that runs at every call, since no fold can rotate them.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Rotation:
    """The residual stream, and with ``values`` and ``online`` what else is rotated; ``seed`` of the signs."""

    seed: int = 0
    values: bool = True
    online: bool = True
