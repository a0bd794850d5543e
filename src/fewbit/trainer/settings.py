"""What one training run is, as data: how long, how fast, in which arithmetic.

The learning rate rises in a straight line over ``warmup`` of all steps and falls in half a cosine to
``floor`` of its peak; AdamW's betas are those usual for language models. An update sees ``batch`` windows of
``length`` tokens, taken ``micro`` at a time.

Road not taken: a plan in seconds. It makes the schedule depend on the machine, and a resumed run differ.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from fewbit.errors import InputError

PRECISIONS = ("bf16", "float32")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One run. ``precision``: bf16 computes products under autocast and keeps weights in float32.

    held: held-out windows that are scored; looks: how often on the way; save_every: steps between two
    checkpoints. Raises ``InputError`` for values that train nothing.
    """

    steps: int = 400
    batch: int = 16
    micro: int | None = None
    length: int = 128
    lr: float = 2e-3
    warmup: float = 0.1
    floor: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    clip: float = 1.0
    precision: str = "bf16"
    seed: int = 0
    held: int = 64
    looks: int = 8
    save_every: int = 50

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise InputError(f"{_option(name)} is {value!r}: expected a whole number from {least} on")
        if self.micro is not None and (type(self.micro) is not int or self.micro < 1):
            raise InputError(f"--micro is {self.micro!r}: expected a whole number from 1 on")
        if self.batch % self.micro_batch:
            raise InputError(
                f"--batch {self.batch} cannot be taken {self.micro_batch} windows at a time; give a --micro "
                "that divides it"
            )
        for name in ("lr", "clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"{_option(name)} is {getattr(self, name)}: expected a number above 0")
        for name in ("warmup", "floor", "weight_decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{_option(name)} is {getattr(self, name)}: expected a number from 0 to 1")
        if self.precision not in PRECISIONS:
            raise InputError(
                f"precision {self.precision!r} is unknown; expected one of {', '.join(PRECISIONS)}"
            )

    @property
    def micro_batch(self) -> int:
        """Windows of one forward."""
        return min(self.batch, self.micro or self.batch)

    @property
    def tokens(self) -> int:
        """Tokens of one update."""
        return self.batch * self.length

    def rate(self, step: int) -> float:
        """The learning rate of update ``step`` (from 0) as a share of the peak."""
        rise = math.ceil(self.warmup * self.steps)
        if step < rise:
            return (step + 1) / rise
        fallen = (step - rise) / max(1, self.steps - rise)
        return self.floor + (1 - self.floor) * (0.5 + 0.5 * math.cos(math.pi * min(1.0, fallen)))

    def looks_after(self, done: int) -> bool:
        """Whether the held-out loss is taken after ``done`` updates."""
        return done == self.steps or done % max(1, self.steps // self.looks) == 0

    def as_dict(self) -> dict[str, Any]:
        """Plain values of everything that the result depends on."""
        out = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "save_every"}
        return out | {"betas": list(self.betas)}


_LEAST = {"steps": 1, "batch": 1, "length": 2, "held": 1, "looks": 1, "save_every": 1, "seed": 0}


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")
