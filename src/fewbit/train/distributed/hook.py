"""DistributedDataParallel with gradients in 8 bits: its communication hook, with mu for each parameter.

    state = attach(ddp)                  # before the first backward
    loss.backward()
    if state.finite():                   # False where any rank met NaN or Inf: all ranks skip together
        optimizer.step()
    torch.save(state.state_dict(), ...)  # mu belongs into a checkpoint

The arithmetic is in ``fewbit.train.distributed.reduce``. DDP calls the hook with a bucket of gradients as
soon as they are ready; matrices go in 8 bits, one step and one mu each; what has fewer than two dimensions
(norms, biases: a thousandth of the bytes) goes in its own type. A gradient that was NaN or Inf on one rank is
NaN on all of them afterwards, so that a guard or a `torch.amp.GradScaler` skips the step as well. Its mu
stays.

On CUDA the work of a bucket runs on a stream of its own, so that it overlaps with the rest of backward, and
no number is read on the host. Buckets are rebuilt after the first step: mu is kept by parameter.

Road not taken: `torch.distributed.algorithms.ddp_comm_hooks.quantization`, whose ranks send scales of their
own and sum wide values.
"""

# No annotations as strings here: DDP compares those of the hook with its types.
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fewbit.errors import InputError
from fewbit.format import Format, QTensor
from fewbit.train.distributed.reduce import E4M3, Factor, Road, check, mean
from fewbit.train.gradients import gradient, set_gradient, wide


class SharedScale:
    """State of the hook: mu of every parameter, and whether the step at hand is finite.

    covers: which parameters (name, parameter) go in 8 bits, those of two dimensions and more where None; the
    rest of the arguments are those of `mean`. Raises ``InputError`` for another format than an 8-bit float
    with one step for a tensor, and where no parameter is covered.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        covers: Callable[[str, nn.Parameter], bool] | None = None,
        fmt: Format = E4M3,
        factor: Factor | None = None,
        road: Road | None = None,
        group: dist.ProcessGroup | None = None,
    ):
        check(fmt)
        covers = (lambda name, p: p.ndim >= 2) if covers is None else covers
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        self.names = [n for n, p in named if covers(n, p)]
        if not self.names:
            raise InputError(
                f"no parameter of {type(model).__name__} is covered, so nothing would be sent in 8 bits; "
                "give covers=lambda name, parameter: ..."
            )
        self.index = {id(p): i for i, (_, p) in enumerate((n, p) for n, p in named if covers(n, p))}
        self.format, self.road, self.group = fmt, road, group
        self.factor = Factor() if factor is None else factor
        device = named[0][1].device
        self.mu = self.factor.start(len(self.names), dist.get_world_size(group), device)
        self.share = torch.zeros_like(self.mu)  # of saturated entries, at the last step
        self.steps = self.skipped = 0
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._at: dict[tuple[int, ...], Tensor] = {}
        self._finite = torch.ones((), dtype=torch.bool, device=device)

    def finite(self) -> bool:
        """True when the gradients of the last backward are finite, on all ranks alike; call it once a step.

        Counts ``steps`` and ``skipped``, and starts anew.
        """
        finite = bool(self._finite.item())
        self._finite.fill_(True)
        self.steps += 1
        self.skipped += not finite
        return finite

    def means(self, params: Sequence[Tensor], grads: Sequence[Tensor | QTensor]) -> list[Tensor | QTensor]:
        """Means over the ranks of ``grads`` of ``params``: QTensors of those covered, tensors of the rest."""
        at = [self.index.get(id(p)) for p in params]
        out = list(grads)
        low = [i for i, k in enumerate(at) if k is not None]
        rest = [i for i, k in enumerate(at) if k is None]
        if low:
            k = self._indices(tuple(at[i] for i in low))
            picked = [grads[i] for i in low]
            found = mean(picked, self.mu[k], fmt=self.format, road=self.road, group=self.group)
            for i, q in zip(low, found.tensors, strict=True):
                out[i] = q
            self.share[k] = found.share
            self.mu[k] = self.factor.next(self.mu[k], found.share)
            self._finite &= found.finite
        if rest:
            flat = torch.cat([grads[i].reshape(-1) for i in rest])
            dist.all_reduce(flat, group=self.group)
            flat /= dist.get_world_size(self.group)
            self._finite &= flat.isfinite().all()
            for i, part in zip(rest, flat.split([grads[i].numel() for i in rest]), strict=True):
                out[i] = part.view_as(grads[i])
        return out

    def _indices(self, at: tuple[int, ...]) -> Tensor:
        """Where the mu of a bucket's parameters are; made once, since a copy to the device waits for it."""
        if at not in self._at:
            self._at[at] = torch.tensor(at, device=self.mu.device)
        return self._at[at]

    def reduce(self, bucket: dist.GradBucket) -> Tensor:
        """The bucket's buffer with the means over the ranks in it."""
        grads = bucket.gradients()
        for g, found in zip(grads, self.means(bucket.parameters(), grads), strict=True):
            g.copy_(wide(found))
        return bucket.buffer()

    def state_dict(self) -> dict[str, Any]:
        """mu by name, and the counts: plain numbers, the same on every rank."""
        mu = dict(zip(self.names, self.mu.tolist(), strict=True))
        return {"mu": mu, "steps": self.steps, "skipped": self.skipped}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`; raises ``InputError`` where the parameters are others."""
        if set(saved["mu"]) != set(self.names):
            other = sorted(set(saved["mu"]) ^ set(self.names))
            raise InputError(
                f"the saved factors and this model differ in {len(other)} parameters, such as {other[0]!r}; "
                "load the state of the same model with the same covers"
            )
        self.mu.copy_(torch.tensor([saved["mu"][n] for n in self.names], dtype=torch.float64))
        self.steps, self.skipped = saved["steps"], saved["skipped"]


@torch.no_grad()
def hook(state: SharedScale, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """For ``ddp.register_comm_hook(state, hook)``; see the head of the file."""
    if state.stream is None:
        done = torch.futures.Future()
        done.set_result(state.reduce(bucket))
        return done
    buffer = bucket.buffer()
    done = torch.futures.Future(devices=[buffer.device])
    state.stream.wait_stream(torch.cuda.current_stream(buffer.device))
    with torch.cuda.stream(state.stream):  # the future marks its end on this stream, and DDP waits for that
        buffer.record_stream(state.stream)
        done.set_result(state.reduce(bucket))
    return done


@torch.no_grad()
def all_reduce_gradients(model: nn.Module, state: SharedScale) -> None:
    """The mean of every gradient over the ranks, without DDP; those of covered parameters stay quantized.

    For gradients that `fewbit.train.fp8_gradients` keeps: the codes of the sum take their place, and no wide
    gradient of them ever lives. All ranks must hold gradients of the same parameters.
    """
    named = [(p, gradient(p)) for p in model.parameters()]
    named = [(p, g) for p, g in named if g is not None]
    means = state.means([p for p, _ in named], [g for _, g in named])
    for (p, _), g in zip(named, means, strict=True):
        set_gradient(p, g)


def attach(ddp: DistributedDataParallel, **settings: Any) -> SharedScale:
    """Register the hook on a DDP module; settings as of `SharedScale`. Returns the state, for checkpoints."""
    state = SharedScale(ddp.module, group=ddp.process_group, **settings)
    ddp.register_comm_hook(state, hook)
    return state
