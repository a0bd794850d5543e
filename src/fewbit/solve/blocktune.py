"""Tuning between groups: what is still float in a block makes up for what was just quantized.

    min over theta of  mean over tokens t of  ||F_theta(X)_t - Y_t||^2 / ||Y_t||^2

F is one transformer block with the layers quantized so far, theta its weights that are not quantized yet, its
norm gains and its biases, X the inputs that came through the quantized blocks before, Y the outputs of the
float model there. After q, k, v were solved, theta is tuned, then o is solved from its tuned weight, and so
on; after the last layer only norms and biases are left to learn, which the checkpoint stores anyway. Any
solver of single layers gains by it, and no bit is added. Learned tables of layers that are solved move, too:
their entries are the continuous part of those layers (AQLM, phase 3; GPTVQ's tuning), codes and steps stay.

QuIP#, Tseng et al. 2024, https://arxiv.org/abs/2402.04396, section 5 and algorithm 5. AQLM, Egiazarian et al.
2024, https://arxiv.org/abs/2401.06118, section 3.4, tunes what is float after the last layer; QTIP, Tseng et
al. 2024, https://arxiv.org/abs/2406.11235, does as QuIP#.

Departures: errors count relative to each token's size, since the norm that reads the stream divides by it;
the first token's is a thousand times the others', and would be all that is learned. The rate falls to 0.

Roads not taken: real sign vectors (QuIP#'s S_U, S_V as learned row and column scales), 16 (1/m + 1/n) bits
per weight: 0.04 at 576 x 1536. Tuning on the likelihood of the whole model, which needs its gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fewbit.errors import InputError
from fewbit.format import QTensor, value_of
from fewbit.solve.calls import EMPTY, Calls, fast_bfloat16


@dataclass(frozen=True, kw_only=True)
class BlockTuning:
    """How a block is tuned after each of its groups.

    steps: updates after each group; lr: Adam's rate of a weight matrix as a share of its root mean square,
    falling linearly to 0; lr_rest: rate of norm gains and biases, and of tables as a share of theirs; batch:
    windows per update; held: share of the windows that choose the best state and teach nothing; looks: how
    often they are asked after each group.
    """

    steps: int = 100
    lr: float = 0.01
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


@dataclass(frozen=True, eq=False, kw_only=True)
class Soft:
    """A solved layer whose learned tables still move; place: its weight [out, in] as a block parameter."""

    q: QTensor
    place: Callable[[Tensor], Tensor]

    @property
    def tables(self) -> Tensor:
        """Where they stand, float32 [tables, entries]."""
        return value_of(self.q.table).float()

    def moved(self, tables: Tensor) -> QTensor:
        """The layer with other tables, as they are stored."""
        book, grid = self.q.format.codebook, self.q.format.grid
        return replace(self.q, table=book.keep(book.points(tables, grid)))

    def weight(self, tables: Tensor) -> Tensor:
        """The block's parameter, differentiable in the tables [tables, entries]."""
        return self.place(replace(self.q, table=tables).dequantize())


def tune_rest(
    train: Calls,
    held: Calls,
    leaves: Mapping[str, Tensor],
    tuning: BlockTuning,
    stored: Mapping[str, torch.dtype],
    soft: Mapping[str, Soft] = EMPTY,
) -> Outcome:
    """Values of ``leaves`` (parameters of the block by name) that bring ``train``'s calls to their targets.

    stored: dtype in which a checkpoint keeps those of them that it keeps; candidates are rounded to it before
    they are measured. soft: parameters that are learned through their tables, which stand in ``values`` in
    their place. The block stays as it is. Deterministic.
    """
    first = {n: p.detach().float() for n, p in leaves.items()} | {n: s.tables for n, s in soft.items()}
    placed = lambda values: {n: soft[n].weight(v) if n in soft else v for n, v in values.items()}  # noqa: E731

    def kept(n: str, p: Tensor) -> Tensor:
        if n in soft:
            return value_of(soft[n].moved(p.detach()).table).float()
        return p.detach().to(stored.get(n, p.dtype)).float().clone()

    start = held_error(held, placed(first))
    best = Outcome(values=first, start=start, error=start)
    own = {n: p.clone().requires_grad_() for n, p in first.items()}
    if not own or start == 0:
        return best
    size = {n: float(p.square().mean().sqrt()) if p.ndim > 1 else 1.0 for n, p in first.items()}
    matrices = {n for n, p in own.items() if p.ndim > 1} - set(soft)
    rates = [size[n] * (tuning.lr if n in matrices else tuning.lr_rest) for n in own]
    optimizer = torch.optim.Adam([{"params": [p]} for p in own.values()], betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(0)
    queue: list[int] = []
    for step in range(tuning.steps):
        queue = queue or torch.randperm(len(train.inputs), generator=generator).tolist()
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * (1 - step / tuning.steps)
        optimizer.zero_grad()
        with torch.enable_grad():
            loss = relative(train, queue.pop(), placed(own), fast=True)
        if not loss.requires_grad:  # the calls reach none of them
            return best
        loss.backward()
        grads = [p.grad for p in own.values() if p.grad is not None]
        if torch.stack([g.sum() for g in grads]).isfinite().all():
            optimizer.step()
        if (step + 1) * tuning.looks // tuning.steps > step * tuning.looks // tuning.steps:
            values = {n: kept(n, p) for n, p in own.items()}
            error = held_error(held, placed(values))
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
