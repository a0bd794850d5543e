"""AWQ: scale the columns of W that meet large inputs, so that rounding hurts them less.

    Q(W diag(s)) diag(s)^-1 x,    s = m^r,    m_j = mean|x_j|,    r in [0, 1] of the least loss    eq. 4, 5

A column multiplied by s_j > 1 has its rounding error divided by s_j as long as the step of its group does not
grow. Every candidate is centred, sqrt(max s * min s) = 1, and r = 0 (s = 1, plain rounding) is always one of
them. "Duo" candidates, of later implementations, also look at the weights: s = m^r / v^(1 - r), v_j the
mean over rows of |w_ij| / max|w of its group|.

The loss is the squared error of the outputs of all layers that read x, exact over all calibration tokens:

    sum over readers of tr(E H E^T),    E = Q(W diag(s)) diag(s)^-1 - W,    H = X^T X / tokens

with the real Format of each reader (range search, stored steps and zeros). The paper instead compares the
output of the enclosing module (attention, MLP) and must run it for every candidate on a sample of tokens;
here one Gram matrix serves all candidates. What that leaves out: the errors of q and k meet in a softmax,
those of gate and up in a product.

AWQ: Activation-aware Weight Quantization for On-Device LLM Compression and Acceleration, Lin, Tang, Tang,
Yang, Chen, Wang, Xiao, Dang, Gan, Han 2023, https://arxiv.org/abs/2306.00978. The clip search of the same
paper is a range rule, ``fewbit.format.OutputMSE``.

Shapes: W [out, in], H [in, in], m, v, s [in].
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fewbit.errors import InputError
from fewbit.format import Need, Stats
from fewbit.format.block import Group
from fewbit.transform.chooser import SCALES, Chooser, Reader, shared

FLOOR = 1e-4  # of a mean magnitude, relative to the largest: dead channels


@dataclass(frozen=True, kw_only=True)
class Awq(Chooser):
    """s with the least output error among powers of the mean magnitude of x.

    points: candidates for r in [0, 1], both ends included. rows: output rows of each reader, evenly chosen,
    on which candidates are compared where rows are quantized apart; the winner must then beat s = 1 on all.
    duo: try the family that divides by the weights' magnitude, too (twice the time).
    """

    points: int = 20
    rows: int = 128
    duo: bool = False

    def __post_init__(self):
        if self.points < 2 or self.rows < 1:
            raise InputError(f"{self.points} exponents on {self.rows} rows: no search; 20 and 128 are usual")

    @property
    def needs(self):
        return frozenset({Need.GRAM, Need.COLUMNS})

    @property
    def kinds(self):
        return SCALES

    def __call__(self, readers, stats, tie=None):
        readers = [r for r in readers if r.format is not None]
        few = [self._sampled(r) for r in readers]
        losses = [(output_error(few, stats, s), s) for s in self._candidates(readers, stats, tie)]
        least, best = min(losses, key=lambda pair: math.inf if math.isnan(pair[0]) else pair[0])
        if not math.isfinite(least):
            raise InputError("no scale gives a finite error: the weights or their inputs hold NaN or Inf")
        one = losses[0][1]
        return best if output_error(readers, stats, best) < output_error(readers, stats, one) else one

    def _sampled(self, reader: Reader) -> Reader:
        every = len(reader.weight) // self.rows
        if every < 2 or not reader.format.rows_independent:
            return reader
        return replace(reader, weight=reader.weight[::every])

    def _candidates(self, readers: Sequence[Reader], stats: Stats, tie: Tensor | None) -> Iterator[Tensor]:
        """Centred s [in]; the first is all ones."""
        m = stats.mean_abs.float()
        m = m.clamp(min=FLOOR * float(m.max())) if m.any() else torch.ones_like(m)
        exponents = torch.linspace(0, 1, self.points).tolist()
        families = [m**r for r in exponents]
        if self.duo and readers:
            v = relative_magnitude(readers)
            families += [m**r / v ** (1 - r) for r in exponents[:-1]]
        for s in families:
            s = shared(s, tie)
            yield s / (s.max() * s.min()).sqrt()


def output_error(readers: Sequence[Reader], stats: Stats, s: Tensor) -> float:
    """Squared error per token of the outputs of all ``readers``, rounded with columns scaled by s [in]."""
    h, scaled = stats.gram, stats.divided(s).gram
    total = torch.zeros((), dtype=torch.float64, device=s.device)
    for r in readers:
        w = r.weight.float()
        e = r.format.quantize(w * s, scaled).dequantize().div_(s).sub_(w)
        total += torch.einsum("oi,oi->", e @ h, e)
    return float(total)


def relative_magnitude(readers: Sequence[Reader]) -> Tensor:
    """Mean over the rows of all readers of |w| / max|w of its group| [in], floored; a row is one group
    where the format has no groups.
    """
    total, rows = 0, 0
    for r in readers:
        w = r.weight.float().abs()
        groups = w.unflatten(
            1, (-1, r.format.block.size if isinstance(r.format.block, Group) else w.shape[1])
        )
        total = total + (groups / groups.amax(-1, keepdim=True).clamp(min=1e-12)).flatten(1).sum(0)
        rows += len(w)
    return (total / rows).clamp(min=FLOOR)
