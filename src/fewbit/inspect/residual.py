"""The residual stream by depth: how far its values reach where each block begins, and where the last ends.

A *massive activation* is larger than 100 and more than 1000 times the median magnitude of its tensor: a few
channels at a few tokens, which hardly depend on the input and act as biases of attention (Massive Activations
in Large Language Models: Sun, Chen, Kolter, Liu 2024, https://arxiv.org/abs/2402.17762, section 2).

Shapes: x [..., hidden].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fewbit.inspect.tokens import Tokens

MASSIVE, TIMES = 100.0, 1000.0


@dataclass(frozen=True, kw_only=True)
class Massive:
    """The largest value of a massive channel, and the token where it is."""

    channel: int
    value: float
    token: str


@dataclass(frozen=True, kw_only=True)
class Depth:
    """The stream before block ``block`` (after the last one for ``block`` = number of blocks).

    largest: max |x|; rms; token: the median over tokens of max_j |x_tj|; massive: massive activations, a
    channel each.
    """

    block: int
    largest: float
    rms: float
    token: float
    massive: tuple[Massive, ...]


def depth(block: int, batches: Sequence[Tensor], tokens: Tokens) -> Depth:
    """The stream at one depth, from all batches in the order of the windows."""
    largest = torch.cat([x.abs().amax(-1).flatten() for x in batches]).float()
    square = sum(float(x.float().square().sum()) for x in batches)
    count = sum(x.numel() for x in batches)
    middle = float(batches[0].abs().float().median())
    massive: dict[int, tuple[float, int]] = {}
    start = 0
    for x in batches:
        rows = x.reshape(-1, x.shape[-1]).float()
        bound = max(MASSIVE, TIMES * middle)
        for t, j in (rows.abs() > bound).nonzero().tolist():
            value = float(rows[t, j])
            if abs(value) > abs(massive.get(j, (0.0, 0))[0]):
                massive[j] = (value, start + t)
        start += len(rows)
    found = sorted(massive.items(), key=lambda item: -abs(item[1][0]))
    return Depth(
        block=block,
        largest=float(largest.max()),
        rms=(square / count) ** 0.5,
        token=float(largest.median()),
        massive=tuple(Massive(channel=j, value=v, token=tokens.at(t)) for j, (v, t) in found),
    )
