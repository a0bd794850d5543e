"""FP8-LM's ZeRO: whole tensors have owners, gradients and weights travel in 8 bits.

    zero = Zero(model, lambda params: low_adamw("fp8-lm", params, lr=1e-3))
    loss.backward()
    if not zero.step(): print("skipped")             # NaN or Inf on some rank: all ranks skip

Slices of a tensor on several ranks would each need the tensor's scale, so tensors are dealt out whole:

    for t in tensors, largest first:  owner(t) = the rank with the least load;  load(owner) += bytes(t)

A step: (1) one all-reduce of the largest gradients gives shared steps; (2) each rank sends each owner the
E4M3 codes of its gradients (all-to-all), and the owner sums them in float32; (3) owners update; (4) codes and
steps of the new weights go to everybody in one all-gather, padded to the longest load. Sent by a rank: about
(W - 1) / W n bytes for gradients, and as many for weights where loads are even; in bfloat16 twice that.

The sum stays with its owner in float32, is rounded no more and cannot saturate, so there is no factor mu. All
ranks compute with decode(encode(w)), the owner as well. The wide weight lives once: in the optimizer where it
keeps a master (`fewbit.train.low_adamw`), here where it does not. Norms, biases and other small tensors are
averaged in their own type and updated by every rank alike.

Peng et al. 2023, "FP8-LM", https://arxiv.org/abs/2310.18313, section 2.3 and algorithm 1.
Road not taken: slices with block scales. Loads are even then; FSDP2 with `gather` and `scatter` is that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fewbit.errors import InputError
from fewbit.format import Format, Params, QTensor
from fewbit.train.distributed.reduce import E4M3, check, shared_amax, shared_steps
from fewbit.train.distributed.wire import all_gather
from fewbit.train.gradients import clear, gradient, set_gradient, wide
from fewbit.train.states import quantize


def partition(sizes: Sequence[int], world: int) -> list[int]:
    """Owners, ranks below ``world``, of tensors of these sizes: the largest first, each to the least load."""
    load, owner = [0] * world, [0] * len(sizes)
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        owner[i] = min(range(world), key=load.__getitem__)
        load[owner[i]] += sizes[i]
    return owner


class Zero:
    """An optimizer whose states are dealt out over the ranks of ``group``, whole tensor by whole tensor.

    build: makes the optimizer of this rank over the parameters that it is given, those it owns and those
    that are not covered. covers: which parameters (name, parameter) are dealt out, those of two dimensions
    and more where None. fmt: of gradients and weights on the wire, and of the weights that compute. The
    weights of rank 0 count. Raises ``InputError`` where nothing is covered.
    """

    def __init__(
        self,
        model: nn.Module,
        build: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
        *,
        covers: Callable[[str, nn.Parameter], bool] | None = None,
        fmt: Format = E4M3,
        group: dist.ProcessGroup | None = None,
    ):
        check(fmt)
        covers = (lambda name, p: p.ndim >= 2) if covers is None else covers
        named = {n: p for n, p in model.named_parameters() if p.requires_grad}
        dealt = {n: p for n, p in named.items() if covers(n, p)}
        if not dealt:
            raise InputError(
                f"no parameter of {type(model).__name__} is covered, so there is nothing to deal out; give "
                "covers=lambda name, parameter: ..."
            )
        self.format, self.group = fmt, group
        self.rank, self.world = dist.get_rank(group), dist.get_world_size(group)
        for p in named.values():
            dist.broadcast(p.data, group_src=0, group=group)
        owners = partition([p.numel() for p in dealt.values()], self.world)
        self.owners = dict(zip(dealt, owners, strict=True))
        # in the order of their owners, which is the order on the wire
        self.dealt = [[p for n, p in dealt.items() if self.owners[n] == r] for r in range(self.world)]
        self.rest = [p for n, p in named.items() if n not in dealt]
        self.mine = self.dealt[self.rank]
        self._name = {id(p): n for n, p in named.items()}
        self.wide = {p: p.detach().clone() for p in self.mine}
        self.optimizer = build([*self.mine, *self.rest])
        self.skipped = 0
        self._send()

    @torch.no_grad()
    def step(self) -> bool:
        """Reduce, update, send. False, with nothing changed, where a gradient is NaN or Inf on some rank.

        All ranks must hold gradients of all parameters.
        """
        order = [p for own in self.dealt for p in own]
        found = {p: gradient(p) for p in (*order, *self.rest)}
        missing = [self._name[id(p)] for p, g in found.items() if g is None]
        if missing:
            raise InputError(f"{missing[0]!r} has no gradient; every rank needs one of each parameter")
        amax = shared_amax(list(found.values()), self.group)
        if not amax.isfinite().all():
            self.skipped += 1
            self.zero_grad()
            return False
        steps = shared_steps(amax[: len(order)], self.format)
        self._reduce(order, [found[p] for p in order], steps)
        if self.rest:
            flat = torch.cat([wide(found[p]).reshape(-1) for p in self.rest])
            dist.all_reduce(flat, group=self.group)
            for p, part in zip(self.rest, flat.split([p.numel() for p in self.rest]), strict=True):
                set_gradient(p, (part / self.world).view_as(p).to(p.dtype))
        for p, w in self.wide.items():
            p.copy_(w)
        self.optimizer.step()
        self._send()
        return True

    def zero_grad(self) -> None:
        """Forget the gradients of all parameters."""
        clear([*(p for own in self.dealt for p in own), *self.rest])

    def _reduce(self, order: list[Tensor], grads: list[Tensor | QTensor], steps: Tensor) -> None:
        """Means of gradients over the ranks, at their owners; other ranks forget theirs."""
        fmt = self.format
        codes = [
            fmt.encode(wide(g), Params(scale=s, zero=None)).codes.view(torch.uint8).reshape(-1)
            for g, s in zip(grads, steps, strict=True)
        ]
        quantized = {p for p, g in zip(order, grads, strict=True) if isinstance(g, QTensor)}
        load = [sum(p.numel() for p in own) for own in self.dealt]
        n, sent = load[self.rank], torch.cat(codes)
        got = sent.new_empty(self.world * n)
        dist.all_to_all_single(got, sent, [n] * self.world, load, group=self.group)
        total = torch.zeros(n, device=sent.device)
        for row in got.view(self.world, n):
            total += fmt.grid.value(row)
        clear(order)
        first = sum(len(own) for own in self.dealt[: self.rank])
        for p, part, s in zip(
            self.mine, total.split([p.numel() for p in self.mine]), steps[first:], strict=False
        ):
            g = (part * (s / self.world)).view_as(p)
            set_gradient(p, quantize(g, fmt) if p in quantized else g.to(p.dtype))

    def _send(self) -> None:
        """Codes and steps of the weights from their owners to all; the parameters become what they mean."""
        fmt, most = self.format, max(sum(p.numel() for p in own) for own in self.dealt)
        count = max(len(own) for own in self.dealt)
        state = self.optimizer.state
        self.wide = {p: p.detach().clone() for p in self.mine if "master" not in state.get(p, ())}
        coded = [quantize(p, fmt) for p in self.mine]
        device = (*self.mine, *self.rest, *self.dealt[0])[0].device
        sent = torch.zeros(most + -most % 4 + 4 * count, dtype=torch.uint8, device=device)
        if coded:
            codes = torch.cat([q.codes.view(torch.uint8).reshape(-1) for q in coded])
            sent[: len(codes)] = codes
            sent[-4 * count :].view(torch.float32)[: len(coded)] = torch.stack([q.scale for q in coded])
        got = sent.new_empty(self.world * len(sent))
        all_gather(got, sent, group=self.group)
        for own, row in zip(self.dealt, got.view(self.world, -1), strict=True):
            steps, at = row[-4 * count :].view(torch.float32), 0
            for p, s in zip(own, steps[: len(own)], strict=True):
                values = fmt.grid.value(row[at : at + p.numel()])
                p.detach().copy_(fmt.from_unit(values, s, None).view_as(p))
                at += p.numel()

    # -- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """What this rank holds, by parameter name: the states of all ranks together are the whole."""
        saved = self.optimizer.state_dict()
        order = [self._name[id(p)] for g in self.optimizer.param_groups for p in g["params"]]
        states = {order[i]: s for i, s in saved["state"].items()}
        groups = [{k: v for k, v in g.items() if k != "params"} for g in saved["param_groups"]]
        held = {self._name[id(p)]: w for p, w in self.wide.items()}
        coded = {self._name[id(p)]: quantize(p, self.format) for p in self.mine if p not in self.wide}
        weights = {n: {"codes": q.codes, "scale": q.scale} for n, q in coded.items()}
        return {"states": states, "groups": groups, "wide": held, "low": weights, "skipped": self.skipped}

    @torch.no_grad()
    def load_state_dict(self, saved: Sequence[Mapping[str, Any]]) -> None:
        """Take what the ranks of a run saved, as many as they were; this rank picks what it owns now.

        Raises ``InputError`` where a parameter of this rank is in none of them.
        """
        states = {n: s for part in saved for n, s in part["states"].items()}
        held = {n: w for part in saved for n, w in part["wide"].items()}
        low = {n: q for part in saved for n, q in part["low"].items()}
        order = [self._name[id(p)] for g in self.optimizer.param_groups for p in g["params"]]
        lost = [n for n in order if n not in states]
        if lost:
            raise InputError(
                f"the saved states hold nothing of {lost[0]!r}; give what every rank saved, as a list"
            )
        own = self.optimizer.state_dict()["param_groups"]
        groups = [{**mine, **g} for mine, g in zip(own, saved[0]["groups"], strict=True)]
        states = {i: states[n] for i, n in enumerate(order)}
        self.optimizer.load_state_dict({"state": states, "param_groups": groups})
        for p in self.mine:
            name = self._name[id(p)]
            if name in held:
                p.copy_(held[name])
            elif "master" in self.optimizer.state[p]:  # else the optimizer has put its master into p
                q = QTensor(**low[name], zero=None, format=self.format, shape=p.shape)
                p.copy_(q.dequantize())
        self.skipped = saved[0]["skipped"]
        self._send()
