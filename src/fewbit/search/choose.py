"""From choices per layer to the best of them under a budget: coefficients, errors, allocation.

    minimize  sum_l a_l e[l, c_l]     subject to     sum_l bits[l, c_l]  <=  budget * sum_l N_l

with a_l of `fewbit.search.linearity`, e of `fewbit.search.errors` and the exact solution of
`fewbit.search.allocate`. HIGGS, https://arxiv.org/abs/2411.17525.

The minimum is also the expected KL. It holds while it is small (below about 0.3 nats); above, layers make
each other's errors worse and the model promises too much, but still tells better from worse.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from torch import Tensor, nn

from fewbit.errors import InputError
from fewbit.nn.blocks import weight_of
from fewbit.search.allocate import allocate
from fewbit.search.errors import Choice, Error, layer_errors, siblings
from fewbit.search.linearity import Tick, block_linears, fisher, noise_responses

NOISE_LEVELS = (0.1, 0.3)


class Estimate(StrEnum):
    """How the coefficients a_l are found."""

    FISHER = "fisher"  # squared gradients: a backward a window
    NOISE = "noise"  # noise in one layer at a time: two forwards a layer and window


@dataclass(frozen=True, kw_only=True)
class Picked:
    """The choice of one layer: its index, stored bits in all, what it is expected to cost."""

    layer: str
    weights: int
    choice: int
    bits: float
    coefficient: float
    error: Error

    @property
    def loss(self) -> float:
        """Expected KL of this layer alone."""
        return self.coefficient * self.error.best


@dataclass(frozen=True, kw_only=True)
class Found:
    """A choice for every layer."""

    layers: tuple[Picked, ...]

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight of these layers, everything counted."""
        return sum(p.bits for p in self.layers) / sum(p.weights for p in self.layers)

    @property
    def expected_kl(self) -> float:
        """sum_l a_l e_l, nats per token."""
        return sum(p.loss for p in self.layers)


def choose(
    model: nn.Module,
    choices: Mapping[str, Sequence[Choice]],
    tokens: Tensor,
    bits: float,
    *,
    estimate: Estimate = Estimate.FISHER,
    together: bool = False,
    kept: float = 16,
    seed: int = 0,
    phase: Callable[[str, str], Tick | None] = lambda *_: None,
) -> Found:
    """The best choice of each layer named in ``choices``, at ``bits`` per weight on average or fewer.

    model: float, in evaluation mode; tokens [w, l]: the text that says what matters; together: layers that
    read one tensor (q, k, v; gate, up) choose alike; kept: bits of a weight that stays; phase: told what
    begins and what is counted, gives what to call with (done, total). Every layer has equally many choices.

    Raises ``InputError`` for formats that do not fit a layer and a budget that cannot be met.
    """
    modules = block_linears(model)
    shapes = {n: tuple(weight_of(modules[n]).shape) for n in choices}
    for name, own in choices.items():
        for choice in own:
            choice.check(shapes[name], f"layer {name}")
    costs = np.array([[c.bits(shapes[n], kept) for c in own] for n, own in choices.items()])
    weights = sum(a * b for a, b in shapes.values())
    least, most = costs.min(1).sum() / weights, costs.max(1).sum() / weights
    if not least <= bits * (1 + 1e-12):
        raise InputError(
            f"{bits:g} bits per weight are fewer than the {least:.4g} of the smallest choices, scales "
            f"counted; give {np.ceil(100 * least) / 100:g} or more (the largest take {most:.4g}), or smaller "
            "choices"
        )
    groups = [[list(choices).index(n) for n in g] for g in siblings(model, list(choices), tokens)]
    if estimate is Estimate.FISHER:
        a = fisher(
            model, tokens, seed=seed, progress=phase("how much each layer matters, by gradients", "window")
        )
    else:
        tick = phase("how much each layer matters, by noise", "layer")
        said = noise_responses(
            model, tokens, layers=list(choices), levels=NOISE_LEVELS, seed=seed, progress=tick
        )
        a = {r.layer: r.coefficient for r in said}
    seen = tokens if any(c.wants_inputs for own in choices.values() for c in own) else None
    errors = layer_errors(model, choices, seen, phase("what each choice does to each layer", "layer"))
    losses = np.array([[a[n] * e.best for e in errors[n]] for n in choices])
    index = allocate(costs, losses, bits * weights, groups if together else ())
    return Found(
        layers=tuple(
            Picked(
                layer=n, weights=shapes[n][0] * shapes[n][1], choice=int(c), bits=float(costs[i, c]),
                coefficient=a[n], error=errors[n][c],
            )
            for i, (n, c) in enumerate(zip(choices, index, strict=True))
        )
    )  # fmt: skip
