"""SmoothAttention: keys without wide channels, so that a step per token and head serves them.

    (K diag(lambda)^-1) (Q diag(lambda))^T = K Q^T,      lambda_j = max|K_j|^alpha

Keys have a few channels that are large at every token; queries, which are not stored, take the factor. The
rotary embedding mixes channels in pairs, so a pair shares its lambda, and query heads that share a key head
share them all.

K stands for keys after the rotary embedding. There the largest magnitude of both channels of a pair (i, j) is
bounded by max over tokens of sqrt(k_i^2 + k_j^2) before it, and some position reaches that: the statistic
here. It needs no cache, ties the pair by itself and does not depend on where a token stood.

QServe: W4A8KV4 Quantization and System Co-design for Efficient LLM Serving, Lin, Tang, Yang, Zhang, Xiao,
Gan, Han 2024, https://arxiv.org/abs/2405.04532, section 4.2.

Shapes: lambda [channels of keys], per head or shared by all heads where it folds into a norm of the keys.
"""

from __future__ import annotations

from dataclasses import dataclass

from fewbit.errors import InputError
from fewbit.format import Need
from fewbit.transform.chooser import Chooser, Kind

FLOOR = 1e-3  # of the largest magnitude: dead channels


@dataclass(frozen=True, kw_only=True)
class SmoothAttention(Chooser):
    """lambda from the largest magnitudes of the keys; at ``alpha`` = 1 all channels become level."""

    alpha: float = 0.5

    def __post_init__(self):
        if not 0 <= self.alpha <= 1:
            raise InputError(f"smoothing exponent alpha={self.alpha} is outside [0, 1]; 0.5 is usual")

    @property
    def needs(self):
        return frozenset({Need.COLUMNS})

    @property
    def kinds(self):
        return frozenset({Kind.ATTENTION})

    def __call__(self, readers, stats, tie=None):
        k = stats.abs_max.float()
        return k.clamp(min=FLOOR * float(k.max()) or 1.0) ** self.alpha
