"""SpinQuant: the rotation of the residual stream learned on the language model's own loss.

    min over R of  E[ -log p(token | tokens before) ]  with quantized inputs,  R^T R = I           (eq. 2)

Liu et al. 2024, https://arxiv.org/abs/2405.16406, section 3.2. R starts as QuaRot's random Hadamard map and
moves by Cayley SGD. Weights stay as they are, unquantized: GPTQ repairs their errors later.

No weight is rotated here. A reader of the stream gets x R in the rotated model, rounds it, and its weight
W R takes R off again, so it computes

    Q(x R) (W R)^T = (Q(x R) R^T) W^T = (x + e R^T) W^T,        e = Q(x R) - x R

and a hook that adds e R^T to the reader's input is the rotated, quantized model exactly. Rounding is passed
straight through: e counts as a constant. The gradient to x is then the identity, and to R it is g^T e, where
g is the loss's gradient to the input. (The rest of the straight-through gradient of Q(x R) R^T is R times a
symmetric matrix, which Cayley SGD removes.) The other inputs are rounded in the basis they will have:
per head and behind the online Hadamard map before o, behind that map before down.

A LayerNorm subtracts the mean, so there R must leave 1 alone: R = U [1 0; 0 R'] U with the reflection U that
takes the first axis to 1 / sqrt(n), and R' [n - 1, n - 1] is learned.

Not here: R2, the maps of the values, stay Hadamard. Road not taken: weights W R made anew at every step, as
the authors do: the same numbers for the product of R with every weight of the model, forward and back.

Shapes: n channels; x, e, g [..., n]; tokens [windows, length] int64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fewbit.errors import InputError
from fewbit.format.activation import Activation
from fewbit.nn.blocks import linears, weight_of
from fewbit.nn.linear import transform_input
from fewbit.seams.heads import find_values
from fewbit.seams.residual import find_residual, fold_gains
from fewbit.seams.rotation import block_calls, find_outside, stream_map
from fewbit.transform import Hadamard, Map, Orthogonal
from fewbit.transform.cayley import cayley_step, retract
from fewbit.transform.rotation import Rotation

TOKENS = 4096  # that go through the model together on a GPU, which fewer would not keep busy
LOOKS = 5  # how often the loss is taken on the windows held out, after the start
_PROBE = 32  # tokens on which readers and writers are found


@dataclass(frozen=True, eq=False, kw_only=True)
class Learned:
    """The map with the least loss on the windows held out, and these losses in nats a token.

    losses: (step, loss) at the start, along the way and at the end.
    """

    map: Orthogonal
    losses: tuple[tuple[int, float], ...]

    @property
    def start(self) -> float:
        """The loss with the Hadamard map."""
        return self.losses[0][1]

    @property
    def best(self) -> float:
        """The loss with ``map``."""
        return min(loss for _, loss in self.losses)


def learn_rotation(
    model: nn.Module,
    tokens: Tensor,
    activations: Mapping[str, Activation],
    rotation: Rotation,
    watch: Callable[[int, float], None] = lambda step, loss: None,
) -> Learned:
    """Learn the map of the residual stream of a causal language model in memory, float32 or bfloat16.

    tokens [windows, length]: an eighth of the windows, at least one, is held out and chooses among the maps
    seen, so the result is never worse there than the Hadamard map; activations: how the input of each linear
    (full name) is quantized; watch: called with (step, loss) at each look.

    The gains of norms are folded into their readers for good, so the logits stay; nothing else is changed.
    Raises ``InputError`` for a model that cannot be rotated, fewer than two windows, and inputs that stay
    float.
    """
    if tokens.ndim != 2 or len(tokens) < 2 or tokens.shape[1] < 2:
        raise InputError(
            f"learning a rotation takes two windows of two tokens or more, one to learn from and one to "
            f"judge by, got tokens of shape {list(tokens.shape)}; use more --samples"
        )
    if not activations:
        raise InputError(
            "no input is quantized, so there is nothing to learn a rotation from; give an input format "
            "(input_bits=4), or steps=0 for a random Hadamard map"
        )
    device = next(model.parameters()).device
    tokens = tokens.to(device)
    held = max(1, len(tokens) // 8)
    train, judge = tokens[:-held], tokens[-held:]
    outside = find_outside(model)
    matrix = _parameter(stream_map(outside, rotation.seed), outside.centred, device)
    whole = _whole if outside.centred else lambda r: r
    order = _order(len(train), rotation)
    best, losses = matrix, []
    with simulated(model, tokens[:1, :_PROBE], activations, rotation) as loss_of:

        def look(step: int) -> bool:
            with torch.no_grad():
                r = whole(matrix)
                losses.append((step, sum(float(loss_of(ids[None], r)) for ids in judge) / held))
            if not math.isfinite(losses[-1][1]):
                raise InputError(
                    f"the loss of {type(model).__name__} with quantized inputs is {losses[-1][1]} after "
                    f"{step} steps; use a lower lr, or check the model's weights"
                )
            watch(*losses[-1])
            return losses[-1][1] <= min(loss for _, loss in losses)

        look(0)
        for step in range(rotation.steps):
            leaf = matrix.detach().requires_grad_()
            grad = torch.zeros_like(matrix)
            with torch.enable_grad():
                for part in order[step].split(together(train.shape[1], device)):
                    loss = loss_of(train[part.to(device)], whole(leaf)) * (len(part) / rotation.batch)
                    grad += torch.autograd.grad(loss, leaf)[0]
            lr = rotation.lr * (1 + math.cos(math.pi * step / rotation.steps)) / 2
            matrix = cayley_step(matrix, grad, lr)
            if (step + 1) * LOOKS // rotation.steps > step * LOOKS // rotation.steps and look(step + 1):
                best = matrix
    final = whole(retract(best.double())).float()
    return Learned(map=Orthogonal(final), losses=tuple(losses))


def together(length: int, device: torch.device) -> int:
    """How many windows of so many tokens go through the model at once, which is what memory is taken for."""
    return 1 if device.type == "cpu" else max(1, TOKENS // length)


@contextmanager
def simulated(
    model: nn.Module, probe: Tensor, activations: Mapping[str, Activation], rotation: Rotation
) -> Iterator[Callable[[Tensor, Tensor], Tensor]]:
    """While it lasts, ``loss(ids, r)``: the cross entropy of ``model`` rotated by r [n, n] with its inputs
    quantized, per token, differentiable in r. Gains stay folded afterwards; hooks go.

    ids [windows, length] int64; probe [1, length]: tokens on which the blocks are explored.
    """
    stream = _Stream()
    grads = [(p, p.requires_grad) for p in model.parameters()]
    undo = []
    try:
        for name, block, call in block_calls(model, probe):
            residual = find_residual(block, call)
            values = find_values(block, residual, call) if rotation.values else None
            fold_gains(block, residual)
            readers = {r for norm in residual.norms for r in norm.readers}
            for own, linear in linears(block).items():
                activation = activations.get(f"{name}.{own}")
                if activation is None:
                    continue
                maps = []
                if values is not None and own == values.writer:
                    maps.append(Hadamard(values.head_dim, seed=rotation.seed))
                if own in residual.writers and rotation.online:
                    maps.append(Hadamard(weight_of(linear).shape[1], seed=rotation.seed))
                read = _reading(stream, activation) if own in readers else _rounding(activation, maps)
                undo.append(transform_input(linear, read))
        for p, _ in grads:
            p.requires_grad_(False)

        def loss(ids: Tensor, r: Tensor) -> Tensor:
            stream.r = r
            logits = model(ids, use_cache=False).logits[:, :-1].float()
            stream.seen.clear()
            return nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())

        yield loss
    finally:
        for remove in undo:
            remove()
        for p, before in grads:
            p.requires_grad_(before)


class _Stream:
    """The rotation at hand, and what it made of the tensor that several readers share."""

    def __init__(self):
        self.r: Tensor | None = None
        self.seen: dict[Activation, tuple[Tensor, Tensor]] = {}


def _reading(stream: _Stream, activation: Activation) -> Callable[[Tensor], Tensor]:
    """x -> x + e R^T, once for all readers of x."""

    def change(x: Tensor) -> Tensor:
        before, after = stream.seen.get(activation, (None, None))
        if before is not x:
            r = stream.r
            with torch.no_grad():
                turned = x.float() @ r
                error = _rounded(activation, turned) - turned
            after = x + (error @ r.mT).to(x.dtype)
            stream.seen[activation] = (x, after)
        return after

    return change


def _rounding(activation: Activation, maps: Sequence[Map]) -> Callable[[Tensor], Tensor]:
    """x -> Q(x T) T^-1 for maps that stay, T = T_1 T_2 .., each per head where it is smaller than x; straight
    through.
    """

    @torch.no_grad()
    def error(x: Tensor) -> Tensor:
        turned = x.float()
        for t in maps:
            turned = t.apply(turned.unflatten(-1, (-1, t.size))).flatten(-2)
        off = _rounded(activation, turned) - turned
        for t in reversed(maps):
            off = t.invert(off.unflatten(-1, (-1, t.size))).flatten(-2)
        return off

    return lambda x: x + error(x).to(x.dtype)


def _rounded(activation: Activation, x: Tensor) -> Tensor:
    """Q(x); a centred input takes off the mean of these windows, as there is no calibration yet."""
    return activation(x, activation.center(x.flatten(0, -2))) if activation.centred else activation(x)


def _order(windows: int, rotation: Rotation) -> Tensor:
    """[steps, batch]: which window each step learns from; all have their turn before one comes again."""
    generator = torch.Generator().manual_seed(rotation.seed)
    n = rotation.steps * rotation.batch
    turns = [torch.randperm(windows, generator=generator) for _ in range(max(1, math.ceil(n / windows)))]
    return torch.cat(turns)[:n].view(rotation.steps, rotation.batch)


def _reflection(r: Tensor) -> Tensor:
    """U [n, n], symmetric and orthogonal: the first axis goes to 1 / sqrt(n). For r [n - 1, n - 1]."""
    n = len(r) + 1
    h = r.new_full((n,), n**-0.5)
    h[0] -= 1
    return torch.eye(n).to(r) - torch.outer(h, h) * (2 / h.square().sum())


def _whole(r: Tensor) -> Tensor:
    """R [n, n] with 1 R = 1 from R' [n - 1, n - 1]."""
    u = _reflection(r)
    return u @ torch.block_diag(r.new_ones(1, 1), r) @ u


@torch.no_grad()
def _parameter(q: Map, centred: bool, device: torch.device) -> Tensor:
    """``q`` as what is learned: R, or R' where a LayerNorm reads the stream; float32 on ``device``."""
    r = q.apply(torch.eye(q.size, dtype=torch.float64))
    if centred:
        u = _reflection(r[1:, 1:])
        r = (u @ r @ u)[1:, 1:]
    return r.float().to(device)
