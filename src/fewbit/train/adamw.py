"""The update of AdamW with a clip of the update, as functions of float32 tensors, written in place.

    m <- b1 m + (1 - b1) g          v <- b2 v + (1 - b2) g^2          u = v / (1 - b2^t)
    rms = sqrt(mean(g^2 / max(u, eps^2)))                             over the whole tensor, after v moved
    eta = lr / max(1, rms / d)                                        no clip: eta = lr
    w <- w - eta lambda w - eta / (1 - b1^t) m / (sqrt(u) + eps)

rms is near 1 while v knows the gradient's size. After a quiet stretch v is too small for the next large
gradient, m / sqrt(u) too large, and rms says by how much: dividing by it is StableAdamW (Wortsman et al.
2023, https://arxiv.org/abs/2304.13013), whose clip is Adafactor's (https://arxiv.org/abs/1804.04235). There
betas are debiased instead, b2' = b2 (1 - b2^(t-1)) / (1 - b2^t): the same numbers u, and the same
m / (1 - b1^t). AdamW: https://arxiv.org/abs/1711.05101.

Shapes: g, m, v, w alike, any shape. `adamw_many` is `adamw` for many tensors in few launches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Rule:
    """The numbers of one group of parameters at one step; ``clip`` is d, None for no clip (and no rms)."""

    lr: float | Tensor
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    clip: float | None

    def corrections(self, t: float) -> tuple[float, float]:
        """1 - b1^t and 1 - b2^t: what m and v lack at step t >= 1, having started from zero."""
        return 1 - self.betas[0] ** t, 1 - self.betas[1] ** t


def adamw(
    g: Tensor,
    m: Tensor,
    v: Tensor,
    w: Tensor,
    t: float,
    rule: Rule,
    mean: Callable[[Tensor], Tensor] = torch.mean,
) -> Tensor | None:
    """One step of m, v and w; returns rms [] where there is a clip.

    t: this step's number, from 1. mean: how a tensor's mean is taken; of a shard, over all shards.
    """
    (b1, b2), (c1, c2) = rule.betas, rule.corrections(t)
    m.lerp_(g, 1 - b1)
    v.mul_(b2).addcmul_(g, g, value=1 - b2)
    eta, rms = rule.lr, None
    if rule.clip is not None:
        rms = mean(g.square().div_((v / c2).clamp_(min=rule.eps**2))).sqrt()
        eta = rule.lr / (rms / rule.clip).clamp(min=1)
    step = v.sqrt().div_(math.sqrt(c2)).add_(rule.eps).reciprocal_().mul_(m)
    w.mul_(1 - eta * rule.weight_decay)
    w.sub_(step.mul_(eta / c1))
    return rms


def adamw_many(
    gs: Sequence[Tensor], ms: Sequence[Tensor], vs: Sequence[Tensor], ws: Sequence[Tensor],
    ts: Sequence[float], rule: Rule,
) -> Sequence[Tensor] | None:  # fmt: skip
    """`adamw` of each (g, m, v, w, t), none of them sharded; returns the rms of each."""
    (b1, b2), (c1, c2) = rule.betas, zip(*map(rule.corrections, ts), strict=True)
    torch._foreach_lerp_(ms, gs, 1 - b1)
    torch._foreach_mul_(vs, b2)
    torch._foreach_addcmul_(vs, gs, gs, 1 - b2)
    etas, rms = [rule.lr] * len(ws), None
    if rule.clip is not None:
        ratios = torch._foreach_div(vs, c2)
        torch._foreach_clamp_min_(ratios, rule.eps**2)
        torch._foreach_sqrt_(ratios)
        norms = torch._foreach_norm(torch._foreach_div(gs, ratios))
        rms = [n / math.sqrt(max(1, g.numel())) for n, g in zip(norms, gs, strict=True)]
        etas = [rule.lr / (r / rule.clip).clamp(min=1) for r in rms]
    steps = torch._foreach_sqrt(vs)
    torch._foreach_div_(steps, [math.sqrt(c) for c in c2])
    torch._foreach_add_(steps, rule.eps)
    torch._foreach_reciprocal_(steps)
    torch._foreach_mul_(steps, ms)
    torch._foreach_mul_(steps, [eta / c for eta, c in zip(etas, c1, strict=True)])
    torch._foreach_mul_(ws, [1 - eta * rule.weight_decay for eta in etas])
    torch._foreach_sub_(ws, steps)
    return rms
