"""Steps that must not happen: clip gradients by their global norm, and skip a step whose norm is not finite.

    n = sqrt(sum over tensors and shards of |g|^2)        c = min(1, max_norm / (n + 1e-6))        g <- c g

The norm is that of the dequantized gradients, one tensor wide at a time; a quantized gradient is multiplied
by editing its step. One NaN or Inf anywhere makes n NaN or Inf, and a step that is then taken stays in the
states for good. So `Guard` looks at n first, which waits for the device once a step.

`LossScaler` is torch's GradScaler that knows quantized gradients. FP8 gradients need none (their steps are a
loss scale for each tensor); it is for models whose 16-bit parts are float16.

Loss scaling: Micikevicius et al. 2017, https://arxiv.org/abs/1710.03740.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fewbit.errors import InputError
from fewbit.format import QTensor
from fewbit.train.gradients import clear, gradient, rescale, set_gradient, wide
from fewbit.train.shards import total


class NonFiniteStep(RuntimeWarning):
    """A step was skipped because a gradient holds NaN or Inf."""


@torch.no_grad()
def gradient_norm(params: Iterable[Tensor]) -> Tensor:
    """The Euclidean norm [] float32 of all gradients of ``params``, over all shards; not finite where one is
    not.
    """
    squares = [total(p, wide(g).square().sum()) for p in params if (g := gradient(p)) is not None]
    if not squares:
        return torch.zeros(())
    return torch.stack([s.to(squares[0].device) for s in squares]).sum().sqrt()


@torch.no_grad()
def clip_gradients(params: Iterable[Tensor], max_norm: float) -> Tensor:
    """Scale all gradients so that their norm is at most ``max_norm``; returns the norm [] before.

    As ``torch.nn.utils.clip_grad_norm_``, for wide and quantized gradients alike. Where the norm is not
    finite the gradients become NaN, or zero. Raises ``InputError`` for a norm that is not positive.
    """
    if not max_norm > 0:
        raise InputError(f"gradients cannot be clipped to a norm of {max_norm}; 1.0 is usual")
    params = list(params)
    norm = gradient_norm(params)
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for p in params:
        if (g := gradient(p)) is not None:
            set_gradient(p, rescale(g, factor.to(p.device)))
    return norm


@dataclass(frozen=True, kw_only=True)
class Step:
    """What became of one step: the norm of the gradients before clipping, whether it was taken, and if not,
    the parameters whose gradients were not finite.
    """

    norm: float
    taken: bool
    bad: tuple[str, ...] = ()


class Guard:
    """Takes an optimizer's steps, and leaves out those whose gradients hold NaN or Inf.

    max_norm: gradients are clipped to it, None leaves them. names: of parameters, for the report. A step that
    is left out changes no state, no parameter and no step count, forgets its gradients, is counted in
    ``skipped`` and told of by a `NonFiniteStep` warning. Ranks that hold different gradients must agree: with
    ``group`` (``torch.distributed.group.WORLD``) a step is taken only where every rank's norm is finite.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        max_norm: float | None = None,
        names: Mapping[Tensor, str] | None = None,
        group: object | None = None,
    ):
        if max_norm is not None and not max_norm > 0:
            raise InputError(f"gradients cannot be clipped to a norm of {max_norm}; 1.0 is usual")
        self.optimizer, self.max_norm, self.group = optimizer, max_norm, group
        self.names = dict(names or {})
        self.steps = self.skipped = 0

    def step(self) -> Step:
        """Clip, then step the optimizer or leave it; gradients that were used stay as they are."""
        self.steps += 1
        params = [p for g in self.optimizer.param_groups for p in g["params"]]
        norm = gradient_norm(params)
        value = self._agreed(norm)
        if not math.isfinite(value):
            return self._skip(params, value)
        if self.max_norm is not None:
            factor = min(1.0, self.max_norm / (value + 1e-6))
            for p in params if factor < 1 else ():
                if (g := gradient(p)) is not None:
                    set_gradient(p, rescale(g, factor))
        self.optimizer.step()
        return Step(norm=value, taken=True)

    def _agreed(self, norm: Tensor) -> float:
        """The norm, or NaN where that of any rank of the group is not finite."""
        value = norm.item()
        if self.group is None:
            return value
        fine = torch.tensor(float(math.isfinite(value)), device=norm.device)
        torch.distributed.all_reduce(fine, torch.distributed.ReduceOp.MIN, group=self.group)
        return value if fine.item() else math.nan

    def _skip(self, params: list[Tensor], norm: float) -> Step:
        self.skipped += 1
        numbered = {p: self.names.get(p, f"number {i} {list(p.shape)}") for i, p in enumerate(params)}
        found = ((name, gradient(p)) for p, name in numbered.items())
        bad = tuple(name for name, g in found if g is not None and not torch.isfinite(wide(g)).all())
        where = (
            f"of {', '.join(bad[:3])}{' and others' if len(bad) > 3 else ''}" if bad else "of another rank"
        )
        warnings.warn(
            f"step {self.steps} left out: the gradient {where} holds NaN or Inf; {self.skipped} of "
            f"{self.steps} steps left out so far",
            NonFiniteStep,
            stacklevel=3,
        )
        clear(params)
        return Step(norm=norm, taken=False, bad=bad)

    def state_dict(self) -> dict[str, int]:
        """The counts; the optimizer saves itself."""
        return {"steps": self.steps, "skipped": self.skipped}

    def load_state_dict(self, saved: Mapping[str, int]) -> None:
        """Go on counting."""
        self.steps, self.skipped = saved["steps"], saved["skipped"]


class LossScaler(torch.amp.GradScaler):
    """torch's GradScaler (dynamic loss scaling for float16), which unscales quantized gradients as well.

    Only how gradients are unscaled and looked at is ours: the step of a quantized one is divided by the loss
    scale, and a step of NaN counts as an Inf that was found.
    """

    def _unscale_grads_(
        self, optimizer: torch.optim.Optimizer, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool
    ) -> dict[torch.device, Tensor]:
        found = super()._unscale_grads_(optimizer, inv_scale, found_inf, allow_fp16)
        with torch.no_grad():
            for p in (p for group in optimizer.param_groups for p in group["params"]):
                g = gradient(p)
                if isinstance(g, QTensor):
                    g = rescale(g, inv_scale.to(p.device))
                    set_gradient(p, g)
                    bad = (~torch.isfinite(g.scale)).any().float()
                    found[p.device] = torch.maximum(found.get(p.device, torch.zeros_like(bad)), bad)
        return found
