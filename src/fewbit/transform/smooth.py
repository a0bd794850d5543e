"""SmoothQuant: move what is hard to quantize from the activations to the weights, column by column.

    s_j = max|x_j|^alpha / max|w_j|^beta,  beta = 1 - alpha      Y = (X diag(s)^-1) (diag(s) W^T)   eq. 4, 3

A channel of x with outliers takes a large s: it shrinks, and its weights, which are easy to quantize, grow.
At alpha = 1/2 the largest magnitude of every column of x / s equals that of the weights that read it; at 1
all of x is level, at 0 all of W. Rounding itself is unchanged: any format of weights and inputs follows.

SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models, Xiao, Lin, Seznec,
Wu, Demouth, Han 2022, https://arxiv.org/abs/2211.10438. With ``beta`` the two exponents are free, as in
QServe (Lin et al. 2024, https://arxiv.org/abs/2405.04532).

Shapes: x [tokens, in], seen as max|x| [in]; W_k [out_k, in]; s [in].

Road not taken: one alpha a layer, found by a search. It needs the real formats of both sides and a measure of
their joint error; ``Awq`` is that search for weights alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fewbit.errors import InputError
from fewbit.format import Need
from fewbit.transform.chooser import Chooser, Kind, shared

FLOOR = 1e-5  # of both largest magnitudes and of s: dead channels


@dataclass(frozen=True, kw_only=True)
class Smooth(Chooser):
    """s from the largest magnitudes of x and of all weights that read it.

    alpha: how much of the difficulty goes to the weights, in [0, 1]; Llama-like models do best at 0.8 to 0.9.
    beta: exponent of the weights, 1 - alpha if None. linear: also where x comes out of a linear layer
    (v -> o, up -> down), which the paper leaves alone. norms: where it comes out of a norm; QServe leaves
    that to a rotation.
    """

    alpha: float = 0.5
    beta: float | None = None
    linear: bool = False
    norms: bool = True

    def __post_init__(self):
        for name, value in (("alpha", self.alpha), ("beta", self.beta)):
            if value is not None and not 0 <= value <= 1:
                raise InputError(
                    f"smoothing exponent {name}={value} is outside [0, 1]; 0.5 is usual, 0.8 for Llamas"
                )
        if not (self.norms or self.linear):
            raise InputError("smoothing neither behind norms nor behind linears is none; set norms or linear")

    @property
    def needs(self):
        return frozenset({Need.COLUMNS})

    @property
    def kinds(self):
        return frozenset([Kind.NORM] * self.norms + [Kind.LINEAR] * self.linear)

    def __call__(self, readers, stats, tie=None):
        x = stats.abs_max.float().clamp(min=FLOOR)
        w = torch.stack([r.weight.float().abs().amax(0) for r in readers]).amax(0).clamp(min=FLOOR)
        beta = 1 - self.alpha if self.beta is None else self.beta
        return shared((x**self.alpha / w**beta).clamp(min=FLOOR), tie)
