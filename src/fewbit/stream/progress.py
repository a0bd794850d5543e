"""What a run tells whoever watches it: rows and callbacks, no printing."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fewbit.stream.planned import Plan


@dataclass(frozen=True, kw_only=True)
class LayerRow:
    """One solved layer. Nothing here depends on the clock, so that a resumed run writes the same manifest.

    error: ||(W - Q) X||^2 / ||W X||^2 over the calibration inputs, or ||W - Q||^2 / ||W||^2 where none were
    gathered (``tokens`` = 0); notes: what the solver could not do exactly.
    """

    layer: str
    format: str
    solver: str
    bits_per_weight: float
    error: float
    tokens: int
    notes: tuple[str, ...] = ()
    routed: int | None = None  # tokens of the calibration that a router sent to this layer of an expert
    choice: int = 0  # which of the rule's choices the layer got
    online: bool = False  # whether a Hadamard map runs before the layer
    apart: int = 0  # columns of the weight that are kept in float
    block_error: float | None = None  # of its block on held-out windows, its group solved; then tuned
    tuned_error: float | None = None

    def as_dict(self) -> dict:
        """Plain data for JSON."""
        return asdict(self)


class Progress:
    """Callbacks of a run; this base does nothing. The command line draws them."""

    def start(self, plan: Plan) -> None:
        """The plan is made; work begins."""

    def phase(self, text: str) -> None:
        """A part of the run that is not a block begins: reading calibration, writing, verifying."""

    def layer(self, row: LayerRow, seconds: float) -> None:
        """A layer was solved in ``seconds``."""

    def block(self, done: int, total: int, resumed: bool) -> None:
        """``done`` of ``total`` blocks are finished; ``resumed`` when this one was found finished on disk."""
