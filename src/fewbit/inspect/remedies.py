"""What each remedy for outliers would gain: rounding of one layer tried on real inputs, its output compared.

    error = |Q(x') Q(W')^T - x' W'^T|^2 / |x W^T|^2          x' W'^T = x W^T: the remedy's change of basis

on some hundred tokens of the text and at most `ROWS` rows of W, evenly chosen. Weights and inputs are both
rounded, to integers of equal width with symmetric steps:

    per tensor      one step for W and one for x: what all others are measured against
    per channel     a step for each row of W and each token of x (LLM.int8()'s "vector-wise")
    groups          a step for each group of columns of each row and of each token
    smoothing       x' = x / s, W' = W s, s_j = max|x_j|^a / max|w_j|^(1-a): SmoothQuant, behind norms
    rotation        the gain of the norm goes into W, then x' = x T, W' = W T, T Hadamard: QuaRot
    split           columns that meet |x| >= 6 stay in float on both sides: LLM.int8()

all but the first with steps per channel and token. Smoothing folds only where x comes out of a norm
(elsewhere the remedy is ``per channel``); a rotation runs at every call where x comes out of no norm.

SmoothQuant: Xiao et al. 2022, https://arxiv.org/abs/2211.10438. QuaRot: Ashkboos et al. 2024,
https://arxiv.org/abs/2404.00456. LLM.int8(): Dettmers et al. 2022, https://arxiv.org/abs/2208.07339.

Shapes: x [tokens, in]; W [out, in]; gain, bias [in] of the norm.

Road not taken: running the quantized block. It would show how errors of layers meet, and cost a forward for
each remedy; `fewbit compare` does that for whole models.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from fewbit.format import FP32, AbsMax, Block, Channel, Format, Group, PerTensor, Stats, Token
from fewbit.format.activation import Activation
from fewbit.format.split import Split
from fewbit.grid import by_name
from fewbit.transform import Hadamard, Smooth
from fewbit.transform.chooser import Reader

ROWS = 512  # of each weight
GROUPS = (128, 64, 32)  # the first that divides the width
ALPHAS = (0.5, 0.8)
BITS = (8, 4)


class Remedy(StrEnum):
    """What can be done about outliers."""

    TENSOR = "per tensor"
    CHANNEL = "per channel"
    GROUPS = "groups"
    SMOOTH = "smoothing 0.5"
    SMOOTH_MORE = "smoothing 0.8"
    ROTATION = "rotation"
    SPLIT = "split"


ALPHA = {Remedy.SMOOTH: 0.5, Remedy.SMOOTH_MORE: 0.8}


@dataclass(frozen=True, kw_only=True, eq=False)
class Norm:
    """gain and bias [in] of the norm that x comes out of."""

    gain: Tensor
    bias: Tensor | None


@dataclass(frozen=True, kw_only=True, eq=False)
class Case:
    """One input and the weights that read it. x [tokens, in]; weights by name, [out, in]; largest [in]:
    max |x| over the whole text; norm: None where x comes out of none.
    """

    x: Tensor
    weights: Mapping[str, Tensor]
    largest: Tensor
    norm: Norm | None

    def all_errors(self, bits: int) -> dict[Remedy, dict[str, float]]:
        """The error of each weight under every remedy; those that do not apply are not tried again."""
        idle = set() if self.norm is not None else set(ALPHA)
        found = {r: self.errors(r, bits) for r in Remedy if r not in idle}
        return {r: found[Remedy.CHANNEL if r in idle else r] for r in Remedy}

    def errors(self, remedy: Remedy, bits: int) -> dict[str, float]:
        """The error of each weight."""
        x, parts = self.prepared(remedy)
        weight, act = self._formats(remedy, bits)
        split = Split() if remedy is Remedy.SPLIT else None
        read = act(x)
        out = {}
        for name, w in parts.items():
            stats = Stats(sample=x, tokens=len(x))
            solve = lambda v, _, weight=weight: weight.quantize(v)  # noqa: E731
            q = solve(w, stats) if split is None else split(w, stats, solve)
            apart = getattr(q, "columns", None)
            seen = read if apart is None else act(x, apart=apart)
            harm = (seen @ q.dequantize().T - x @ w.T).square().sum(dtype=torch.float64)
            clean = (self.x @ self.weights[name].T).square().sum(dtype=torch.float64)
            out[name] = float(harm / clean.clamp(min=1e-30))
        return out

    def prepared(self, remedy: Remedy) -> tuple[Tensor, dict[str, Tensor]]:
        """x' and W' under a remedy."""
        parts = dict(self.weights)
        if remedy in ALPHA and self.norm is not None:
            chooser = Smooth(alpha=ALPHA[remedy])
            readers = [Reader(weight=w, format=None, activation=None) for w in parts.values()]
            s = chooser(readers, Stats(low=-self.largest, high=self.largest))
            return self.x / s, {n: w * s for n, w in parts.items()}
        if remedy is Remedy.ROTATION:
            x = self.x
            if self.norm is not None:
                gain = torch.where(self.norm.gain == 0, 1.0, self.norm.gain)
                x = (x if self.norm.bias is None else x - self.norm.bias) / gain
                parts = {n: w * gain for n, w in parts.items()}
            turn = Hadamard(x.shape[1], seed=0)
            return turn.apply(x), {n: turn.dual(w) for n, w in parts.items()}
        return self.x, parts

    def _formats(self, remedy: Remedy, bits: int) -> tuple[Format, Activation]:
        rows: Block = Channel()
        tokens: Block = Token()
        if remedy is Remedy.TENSOR:
            rows = tokens = PerTensor()
        size = next((g for g in GROUPS if self.x.shape[1] % g == 0), None)
        if remedy is Remedy.GROUPS and size is not None:
            rows = tokens = Group(size)
        grid = by_name(f"int{bits}")
        outliers = Split().threshold if remedy is Remedy.SPLIT else None
        make = lambda block: Format(grid=grid, block=block, range=AbsMax(), scale=FP32)  # noqa: E731
        return make(rows), Activation(format=make(tokens), outliers=outliers)


def some_rows(w: Tensor) -> Tensor:
    """At most ``ROWS`` rows of a weight [out, in], evenly chosen, float32."""
    return w[:: -(-len(w) // ROWS)].detach().float()
