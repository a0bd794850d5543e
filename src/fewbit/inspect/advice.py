"""Which recipe to take: the cheapest to run whose simulated error is near the least.

A recipe stands for a remedy; its score is the mean over layers of the simulated error of their output
(``fewbit.inspect.remedies``). Scores of a model order recipes as its perplexity does (docs/inspect.md); they
are no loss: errors of layers meet and grow in ways that only an evaluation shows.

Cost is of running the model: none beside the products of integers (steps per channel and token; scales that
were folded); then Hadamard maps before two of the seven layers of a block; then a second product in float for
columns kept apart.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

from fewbit.inspect.look import Inspection
from fewbit.inspect.remedies import Remedy

NEAR = 1.5  # times the least error is as good, when it is cheaper


@dataclass(frozen=True, kw_only=True)
class Advice:
    """A recipe by name with its settings, the remedy it stands for, and the mean error of layers' outputs
    with it and with ``plain``, steps per channel and token alone.
    """

    bits: int
    remedy: Remedy
    recipe: str
    settings: Mapping[str, str] = field(default_factory=dict)
    error: float
    plain: float

    def command(self, model: str) -> str:
        """What to type."""
        chosen = "".join(f" --set {key}={value}" for key, value in self.settings.items())
        return f"fewbit quantize {model} -r {self.recipe}{chosen} -o OUT"


# By bits of weights and inputs: what there is, the cheapest to run first.
_RECIPES: dict[int, dict[Remedy, tuple[str, dict[str, str]]]] = {
    8: {
        Remedy.CHANNEL: ("w8a8", {}),
        Remedy.SMOOTH: ("smoothquant", {"alpha": "0.5"}),
        Remedy.SMOOTH_MORE: ("smoothquant", {"alpha": "0.8"}),
        Remedy.ROTATION: ("quarot", {"bits": "8", "input_bits": "8"}),
        Remedy.SPLIT: ("llm-int8", {}),
    },
    4: {Remedy.ROTATION: ("quarot", {})},
}


def mean_error(seen: Inspection, remedy: Remedy, bits: int) -> float:
    """The mean over layers of the error of their output."""
    errors = [layer.errors[bits][remedy] for layer in seen.layers]
    return sum(errors) / len(errors)


def advise(seen: Inspection, bits: int = 8) -> Advice | None:
    """The recipe for weights and inputs of ``bits`` bits, 8 or 4; None where none is there that fits."""
    fits = {
        remedy: mean_error(seen, remedy, bits)
        for remedy in _RECIPES[bits]
        if not (remedy is Remedy.ROTATION and seen.rotation)
    }
    if not fits:
        return None
    least = min(fits.values())
    remedy = next(r for r, error in fits.items() if error <= NEAR * least)
    name, settings = _RECIPES[bits][remedy]
    plain = mean_error(seen, Remedy.CHANNEL, bits)
    return Advice(bits=bits, remedy=remedy, recipe=name, settings=settings, error=fits[remedy], plain=plain)


@dataclass(frozen=True, kw_only=True)
class Common:
    """A channel of the residual stream that stands out where norms hand it on: in ``inputs`` of ``of``."""

    index: int
    inputs: int
    of: int
    ratio: float
    largest: float


def common_channels(seen: Inspection) -> tuple[Common, ...]:
    """Channels that stand out behind norms, those in most inputs first. (Behind other layers channels have no
    meaning from one block to the next.)
    """
    behind = [g for g in seen.groups if g.norm is not None]
    found = defaultdict(list)
    for group in behind:
        for channel in group.input.channels:
            found[channel.index].append(channel)
    rows = (
        Common(
            index=j,
            inputs=len(own),
            of=len(behind),
            ratio=max(c.ratio for c in own),
            largest=max(c.largest for c in own),
        )
        for j, own in found.items()
    )
    return tuple(sorted(rows, key=lambda c: (-c.inputs, -c.ratio)))
