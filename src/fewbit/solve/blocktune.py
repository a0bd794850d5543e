"""Tuning between groups: what is still float in a block makes up for what was just quantized.

    min over theta of  mean over tokens t of  ||F_theta(X)_t - Y_t||^2 / ||Y_t||^2

F is one transformer block with the layers quantized so far, theta its weights that are not quantized yet, its
norm gains and its biases, X the inputs that came through the quantized blocks before, Y the outputs of the
float model there. After q, k, v were solved, theta is tuned, then o is solved from its tuned weight, and so
on; after the last layer only norms and biases are left to learn, which the checkpoint stores anyway. Any
solver of single layers gains by it, and no bit is added.

QuIP#, Tseng et al. 2024, https://arxiv.org/abs/2402.04396, section 5 and algorithm 5. AQLM, Egiazarian et al.
2024, https://arxiv.org/abs/2401.06118, section 3.4, tunes what is float after the last layer; QTIP, Tseng et
al. 2024, https://arxiv.org/abs/2406.11235, does as QuIP#.

Departures: errors count relative to each token's size, since the norm that reads the stream divides by it;
the first token's is a thousand times the others', and would be all that is learned. The rate falls to 0.

Roads not taken: real sign vectors (QuIP#'s S_U, S_V as learned row and column scales), 16 (1/m + 1/n) bits
per weight: 0.04 at 576 x 1536. Tuning on the likelihood of the whole model, which needs its gradients.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fewbit.errors import InputError
from fewbit.solve.calls import Calls, fast_bfloat16


@dataclass(frozen=True, kw_only=True)
class BlockTuning:
    """How a block is tuned after each of its groups.

    steps: updates after each group; lr: rate of weights, Adam's, falling linearly to 0; lr_rest: of norm
    gains and biases; batch: windows per update; held: share of the windows that choose the best state and
    teach nothing; looks: how often they are asked after each group.
    """

    steps: int = 100
    lr: float = 3e-4
    lr_rest: float = 1e-3
    batch: int = 4
    held: float = 0.125
    looks: int = 4

    def __post_init__(self):
        if self.steps < 1 or self.batch < 1 or not 1 <= self.looks <= self.steps:
            raise InputError(
                f"tuning with {self.steps} steps of {self.batch} windows and {self.looks} looks is "
                "impossible; all must be positive and looks at most steps"
            )
        if not (self.lr > 0 and self.lr_rest > 0 and 0 < self.held < 1):
            raise InputError(
                f"tuning at rates {self.lr} and {self.lr_rest} with a share {self.held} held out is "
                "impossible; rates must be positive and the share between 0 and 1"
            )

    @classmethod
    def of(cls, steps: int, batch: int = 4) -> BlockTuning | None:
        """So many updates after each group; 0: no tuning."""
        return cls(steps=steps, batch=batch, looks=max(1, min(4, steps))) if steps else None

    def split(self, calls: int) -> int:
        """How many of so many calls of the block are learned from; the rest is held out."""
        return calls - min(max(1, round(self.held * calls)), calls - 1)


@dataclass(frozen=True, eq=False, kw_only=True)
class Outcome:
    """What tuning found: values of the parameters, and the mean relative error on held-out calls before and
    with them. Without an improvement ``values`` are those of the start.
    """

    values: dict[str, Tensor]
    start: float
    error: float


def tune_rest(
    train: Calls,
    held: Calls,
    leaves: Mapping[str, Tensor],
    tuning: BlockTuning,
    stored: Mapping[str, torch.dtype],
) -> Outcome:
    """Values of ``leaves`` (parameters of the block by name) that bring ``train``'s calls to their targets.

    stored: dtype in which a checkpoint keeps those of them that it keeps; candidates are rounded to it before
    they are measured. The block stays as it is. Deterministic.
    """
    first = {n: p.detach().float() for n, p in leaves.items()}
    start = held_error(held, first)
    best = Outcome(values=first, start=start, error=start)
    own = {n: p.clone().requires_grad_() for n, p in first.items()}
    rates = {n: tuning.lr if p.ndim > 1 else tuning.lr_rest for n, p in own.items()}
    groups = [
        {"params": [own[n] for n in own if rates[n] == r], "lr": r} for r in sorted(set(rates.values()))
    ]
    if not groups or start == 0:
        return best
    optimizer, generator = torch.optim.Adam(groups, betas=(0.9, 0.95)), torch.Generator().manual_seed(0)
    queue: list[int] = []
    for step in range(tuning.steps):
        queue = queue or torch.randperm(len(train.inputs), generator=generator).tolist()
        for group, rate in zip(optimizer.param_groups, sorted(set(rates.values())), strict=True):
            group["lr"] = rate * (1 - step / tuning.steps)
        optimizer.zero_grad()
        with torch.enable_grad():
            loss = relative(train, queue.pop(), own, fast=True)
        loss.backward()
        grads = [p.grad for p in own.values() if p.grad is not None]
        if torch.stack([g.sum() for g in grads]).isfinite().all():
            optimizer.step()
        if (step + 1) * tuning.looks // tuning.steps > step * tuning.looks // tuning.steps:
            values = {n: p.detach().to(stored.get(n, p.dtype)).float().clone() for n, p in own.items()}
            error = held_error(held, values)
            if error < best.error:
                best = Outcome(values=values, start=start, error=error)
    return best


def relative(run: Calls, i: int, values: Mapping[str, Tensor], *, fast: bool = False) -> Tensor:
    """Mean over the tokens of call ``i`` of their relative squared error; ``fast``: products in bfloat16."""
    y = run.targets[i].float()
    with torch.autocast(y.device.type, torch.bfloat16, enabled=fast and fast_bfloat16(y.device)):
        off = run.call({}, i, values) - y
    return (off.square().sum(-1) / y.square().sum(-1).clamp(min=1e-30)).mean()


@torch.no_grad()
def held_error(run: Calls, values: Mapping[str, Tensor]) -> float:
    """Mean relative squared error of a token over all calls."""
    return float(sum(relative(run, i, values) for i in range(len(run.inputs)))) / len(run.inputs)
