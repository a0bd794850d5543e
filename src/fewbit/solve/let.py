"""LET: learned equivalent transformation, the activation half of OmniQuant.

    Y = Q((X - delta) / s) Q(s W)^T + (B + delta W^T)                                             eq. 3, 4

At a seam, a producer (a norm, or a linear such as v before o) whose output X only ``readers`` see, a scale s
and, where producer and readers have biases, a shift delta are learned for every channel of X through the
block, together with the clips of the weights (see ``tune``). Nothing is left of them at run time: the
producer gives (X - delta) / s, the readers hold s W and the new bias. s is exp(theta) and stays positive.

What is learned is what is stored: gains and biases are rounded to their storage in every step, straight
through, and the readers take the ratio of the old gain and the one that is stored, as ``fewbit.seams`` folds.

Shao, Chen, Zhang, Xu, Zhao, Li, Zhang, Gao, Qiao, Luo 2023, https://arxiv.org/abs/2308.13137, section 3.3.

Road not taken: scales between queries and keys (eq. 5). A factor of a whole row of W_q is a factor of that
row's steps: where weights have steps a row or finer, and q and k are not quantized themselves, it changes no
code. ``SmoothAttention`` has it for caches. Shapes: theta, delta [rows of the producer]; W [out, in].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fewbit.format.fake import Through
from fewbit.solve.calls import Calls, Weights


@dataclass(frozen=True, eq=False, kw_only=True)
class Joint:
    """Where a scale folds; names are relative to the block.

    norm: the producer is a norm, whose gain is ``weight + one``; else a linear, whose rows are divided.
    index [in]: the producer's row behind each column of the readers; None where they are the same. shift:
    producer and readers have biases that take one. stored: dtype of the checkpoint's gains and biases.
    """

    producer: str
    readers: tuple[str, ...]
    norm: bool
    index: Tensor | None = None
    one: float = 0.0
    shift: bool = False
    stored: torch.dtype = torch.float32


@dataclass(frozen=True, eq=False, kw_only=True)
class Learned:
    """Of one joint: what the columns of X are divided by, s [in], and the shift [rows] or None."""

    s: Tensor
    delta: Tensor | None


class Maps:
    """Scales and shifts of a block's joints, in the order of its forward, while they are learned."""

    def __init__(self, run: Calls, joints: Sequence[Joint]):
        self.run, self.joints = run, joints
        rows = [len(run.frozen[f"{j.producer}.weight"] if j.norm else run.weight(j.producer)) for j in joints]
        device = next(iter(run.frozen.values())).device
        self.theta = [torch.zeros(n, device=device, requires_grad=True) for n in rows]
        centres = run.centres({j.readers[0] for j in joints if j.shift})
        self.delta = [
            _rows(j, centres[j.readers[0]], n).requires_grad_() if j.shift else None
            for j, n in zip(joints, rows, strict=True)
        ]

    @property
    def leaves(self) -> list[Tensor]:
        """What is learned."""
        return self.theta + [d for d in self.delta if d is not None]

    def applied(self) -> tuple[dict[str, Tensor], Weights, tuple[Learned, ...]]:
        """Float weights [out, in] of all layers and the block's other parameters after the maps, both
        differentiable, and the maps as they will be folded.
        """
        run, learned = self.run, []
        weights = {n: run.weight(n) for n in run.layers}
        rest: dict[str, Tensor] = {}
        look = lambda name: rest.get(name, run.frozen.get(name))  # noqa: E731
        for j, theta, delta in zip(self.joints, self.theta, self.delta, strict=True):
            s, gain, bias = theta.exp(), f"{j.producer}.weight", f"{j.producer}.bias"
            if j.norm:
                old = run.frozen[gain].float() + j.one
                rest[gain] = keep(old / s - j.one, j.stored)
                new = rest[gain].detach() + j.one
                s = Through.apply(s, torch.where(new == 0, s, old / new).detach())
            else:
                weights[j.producer] = weights[j.producer] / s[:, None]
            b = look(bias)
            if b is not None:
                rest[bias] = keep((b if delta is None else b - delta) / s, j.stored)
            columns = s if j.index is None else s[j.index]
            if delta is not None:  # what the stored bias leaves of it
                delta = b - rest[bias] * s
                for r in j.readers:
                    moved = weights[r] @ (delta if j.index is None else delta[j.index])
                    rest[f"{r}.bias"] = keep(look(f"{r}.bias") + moved, j.stored)
            for r in j.readers:
                weights[r] = weights[r] * columns
            learned.append(Learned(s=columns.detach(), delta=None if delta is None else delta.detach()))
        return weights, rest, tuple(learned)


def keep(x: Tensor, stored: torch.dtype) -> Tensor:
    """``x`` as it will be stored, gradients straight through."""
    return Through.apply(x, x.detach().to(stored).to(x.dtype))


def _rows(joint: Joint, columns: Tensor, n: int) -> Tensor:
    """One of the columns' values [in] for each of ``n`` rows of the producer: their mean."""
    if joint.index is None:
        return columns.clone()
    count = torch.zeros(n, device=columns.device).index_add_(0, joint.index, torch.ones_like(columns))
    return torch.zeros_like(count).index_add_(0, joint.index, columns) / count
