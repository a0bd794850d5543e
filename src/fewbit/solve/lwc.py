"""LWC: learned clipping of the weights, the weight half of OmniQuant.

    s = (sigma(gamma) max W - sigma(beta) min W) / (2^N - 1),    z = -round(sigma(beta) min W / s)      eq. 2

with two logits per block, learned by AdamW through the block (see ``tune``); a symmetric format has one,
s = sigma(gamma) max|W| / reach, on any grid. Ranges only shrink. The logits start where the format's range
rule ends, at most at ``init``: 4 with min-max ranges (sigma(4) = 0.982), as in the paper, and from 5 bits on
where half a step is clipped (0.982 of the range of 8 bits would clip two steps of every block's end).

Shao, Chen, Zhang, Xu, Zhao, Li, Zhang, Gao, Qiao, Luo 2023, https://arxiv.org/abs/2308.13137.

Departures: the rate falls to 0 (the paper's is constant, over 20 to 40 epochs of 128 sequences); steps are
rounded to their storage while training, which the paper does afterwards. The road not taken: learning the
step itself (LSQ, PACT): its gradient depends on the number of weights in a block and its sign can flip.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from fewbit.solve.tune import Tuner


@dataclass(frozen=True, kw_only=True)
class Lwc(Tuner):
    """OmniQuant's learned weight clipping. ``lr`` None is 0.01; ``init``: the largest logit at the start."""

    init: float = 4.0

    @property
    def rate(self):
        return 1e-2 if self.lr is None else self.lr

    def leaves(self, layer):
        top = max(self.init, math.log(2 * layer.format.reach))
        return [share.logit().clamp(-self.init, top) for share in (layer.low, layer.high)]

    def place(self, layer, leaves):
        return *layer.ends(*(p.sigmoid() for p in leaves)), None

    def optimizer(self, leaves):
        return torch.optim.AdamW([p for own in leaves for p in own], lr=self.rate, weight_decay=0.0)
