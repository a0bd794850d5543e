"""What attention rests on: the share of its weight that goes to tokens which say little.

A head that has nothing to add still has to spend a sum of 1. It spends it on a token whose value is small:
the first one in decoders, [SEP] and punctuation in BERT; and to single those tokens out the network before
it makes outliers (Bondarenko, Nagel, Blankevoort 2021, https://arxiv.org/abs/2109.12948, section 3; attention
sinks: Xiao et al. 2023, https://arxiv.org/abs/2309.17453).

Weights are seen where attention runs eagerly and returns them; fused kernels never have them. Queries at
place 0 can only look at themselves in decoders and are left out.

Shapes: weights [windows, heads, queries, keys], rows that add up to 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fewbit.inspect.tokens import Kind

SINK = 0.5  # a head that gives more than this to one kind of token rests there


@dataclass(frozen=True, kw_only=True)
class AttentionReport:
    """Mean share of attention by kind of token; ``first_head``: the largest share that a head gives to first
    tokens; ``resting``: heads that give more than half to first, special, separator and punctuation tokens.
    """

    heads: int
    shares: dict[str, float]
    first_head: float
    resting: int


class AttentionWatch:
    """Adds up the weights of one attention module; ``report`` is None where none were returned."""

    def __init__(self, kinds: Tensor):
        self._kinds, self._window = kinds, 0
        self._sums: Tensor | None = None  # [heads, kinds]
        self._queries = 0

    def see(self, module: nn.Module, args: object, output: object) -> None:
        """Forward hook."""
        weights = next(filter(self._is_weights, output if isinstance(output, tuple | list) else ()), None)
        if weights is None:
            return
        n = len(weights)
        kinds = self._kinds[self._window : self._window + n].to(weights.device)
        self._window += n
        one = torch.nn.functional.one_hot(kinds, len(Kind)).float()  # [windows, keys, kinds]
        own = torch.einsum("whqk,wkc->hc", weights[:, :, 1:].float(), one)
        self._sums = own if self._sums is None else self._sums + own
        self._queries += n * (weights.shape[2] - 1)

    def _is_weights(self, value: object) -> bool:
        length = self._kinds.shape[1]
        return isinstance(value, Tensor) and value.ndim == 4 and value.shape[-2:] == (length, length)

    def report(self) -> AttentionReport | None:
        """What was seen."""
        if self._sums is None:
            return None
        shares = (self._sums / self._queries).cpu()  # [heads, kinds]
        idle = shares[:, [Kind.FIRST, Kind.SPECIAL, Kind.SEPARATOR, Kind.PUNCTUATION]].sum(1)
        return AttentionReport(
            heads=len(shares),
            shares={k.words: float(shares[:, k].mean()) for k in Kind},
            first_head=float(shares[:, Kind.FIRST].max()),
            resting=int((idle > SINK).sum()),
        )


def attentions(block: nn.Module) -> list[nn.Module]:
    """The outermost modules of a block whose class calls itself attention."""
    found: list[tuple[str, nn.Module]] = []
    for name, module in block.named_modules():
        inside = any(name.startswith(f"{n}.") for n, _ in found)
        if name and "attention" in type(module).__name__.lower() and not inside:
            found.append((name, module))
    return [m for _, m in found]
