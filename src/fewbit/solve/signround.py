"""SignRound: learned rounding and ranges by signed gradient descent, the method of AutoRound.

    W~ = s clip( round(W / s + z + V), n, m ),   s = (alpha max W - beta min W) / (2^bit - 1)
    theta <- theta - lr sign(dL/dtheta)

with V in [-1/2, 1/2] for each weight, alpha and beta in [0, 1] for each block. lr = 1 / steps falling
linearly to 0 adds up to 1/2: every weight can just reach the other neighbour, whatever the size of its
gradient, which is why the sign serves. Ranges start where the format's range rule ends and may go back to
min-max. On a grid whose points are not a step apart, V counts gaps between the points around a weight.

Cheng, Zhang, Shen, Cai, He, Lv, Liu 2023, https://arxiv.org/abs/2309.05516.

Road not taken: AdaRound's sigmoid with a regulariser that drives it to 0 or 1 (Nagel et al. 2020): V needs
neither, since what is trained is already rounded.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fewbit.errors import InputError
from fewbit.solve.tune import Tuner


@dataclass(frozen=True, kw_only=True)
class SignRound(Tuner):
    """AutoRound's signed rounding. ``lr`` None is 1 / steps; ``reach``: the largest |V|."""

    reach: float = 0.5

    def __post_init__(self):
        super().__post_init__()
        if not self.reach >= 0:
            raise InputError(f"reach {self.reach} of the rounding offset is negative; 0.5 is usual")

    @property
    def rate(self):
        return 1 / self.steps if self.lr is None else self.lr

    def leaves(self, layer):
        return [layer.low.clone(), layer.high.clone(), torch.zeros_like(layer.blocks)]

    def place(self, layer, leaves):
        return *layer.ends(*leaves[:2]), leaves[2] * layer.gap

    def optimizer(self, leaves):
        ranges = {"params": [p for own in leaves for p in own[:2]], "low": 0.0, "high": 1.0}
        nudges = {"params": [own[2] for own in leaves], "low": -self.reach, "high": self.reach}
        return SignSGD([ranges, nudges], self.rate)


class SignSGD(torch.optim.Optimizer):
    """p <- clip(p - lr sign(dL/dp), low, high), with the bounds of each parameter group."""

    def __init__(self, groups: list[dict], lr: float):
        super().__init__(groups, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(p.grad.sign_(), alpha=group["lr"]).clamp_(group["low"], group["high"])
