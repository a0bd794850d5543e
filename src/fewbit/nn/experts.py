"""Experts as linears: what transformers holds as two 3-D parameters, as one small MLP for each expert.

    fused       gate_up_proj [E, 2f, h], down_proj [E, h, f]       one parameter for all experts
    here        experts.7.gate_proj [f, h], experts.7.up_proj [f, h], experts.7.down_proj [h, f]

    y_t = sum over the experts e that token t was sent to of  p_te  down_e(act(gate_e(x_t)) * up_e(x_t))

So an expert's matrices have the names under which files and engines know them, and are ordinary linear layers
to whatever quantizes, stores or runs one. The gate's formula is the original module's own. Each expert
multiplies the tokens routed to it, one expert after another: transformers' eager loop.

Sparsely-gated experts: Shazeer et al. 2017, https://arxiv.org/abs/1701.06538, eq. 1.

Shapes: T tokens, k experts a token, E experts, h hidden, f inside an expert.

Road not taken: views into the fused parameter. Gate and up then share a tensor that no linear layer owns, a
quantized expert has no place in it, and grouped products of it are no help to a weight that is decoded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

PARTS = tuple(f"{n}{b}" for n in ("gate_up_proj", "up_proj", "down_proj") for b in ("", "_bias"))


@dataclass(frozen=True, kw_only=True)
class Names:
    """What the matrices of an expert are called in checkpoints; Mixtral's are w1, w3 and w2."""

    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"


class Expert(nn.Module):
    """One expert: x [n, h] -> [n, h]. ``fused``: the module it was cut from, for its gate alone."""

    def __init__(self, fused: nn.Module, names: Names, bias: bool, device: torch.device):
        """Matrices without values on ``device``, in torch's default dtype."""
        super().__init__()
        up, down = fused.gate_up_proj if fused.has_gate else fused.up_proj, fused.down_proj
        wide = (lambda p: p.shape[-1]) if fused.is_transposed else (lambda p: p.shape[-2])
        h, f = wide(down), wide(up) // (2 if fused.has_gate else 1)
        self.names, self._fused = names, (fused,)  # in a tuple: no child, so nothing saves or moves it
        for name in ((names.gate,) if fused.has_gate else ()) + (names.up,):
            self.add_module(name, nn.Linear(h, f, bias=bias, device=device))
        self.add_module(names.down, nn.Linear(f, h, bias=bias, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """x [n, h] -> [n, h]."""
        (fused,), names = self._fused, self.names
        if not fused.has_gate:
            return getattr(self, names.down)(fused.act_fn(getattr(self, names.up)(x)))
        both = getattr(self, names.gate)(x), getattr(self, names.up)(x)
        both = torch.cat(both, -1) if fused.is_concatenated else torch.stack(both, -1).flatten(-2)
        return getattr(self, names.down)(fused._apply_gate(both))


class Experts(nn.Module):
    """E experts, children "0" to "E-1", in the place of a fused module and called as that is."""

    def __init__(self, fused: nn.Module, names: Names):
        """Takes the shapes and the gate of ``fused``, and no values: those come from a checkpoint."""
        super().__init__()
        kept = fused.down_proj
        self.num_experts, self.shapes = len(kept), {n: tuple(p.shape) for n, p in fused.named_parameters()}
        self.interleaved, self.transposed = not fused.is_concatenated, fused.is_transposed
        for e in range(self.num_experts):
            self.add_module(str(e), Expert(fused, names, fused.has_bias, kept.device))
        for name in self.shapes:
            delattr(fused, name)
        self.names, self.has_gate = names, fused.has_gate

    def __getitem__(self, e: int) -> Expert:
        return self._modules[str(e)]

    def __len__(self) -> int:
        return self.num_experts

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states [T, h], top_k_index [T, k] int64, top_k_weights [T, k] -> [T, h]."""
        out = torch.zeros_like(hidden_states)
        if out.is_meta:  # shapes alone were asked for
            return out
        for e in top_k_index.unique().tolist():
            if e < self.num_experts:  # a router may point beyond the last for "none"
                token, place = torch.where(top_k_index == e)
                y = self[e](hidden_states[token]) * top_k_weights[token, place, None]
                out.index_add_(0, token, y.to(out.dtype))
        return out

    def counts(self, top_k_index: Tensor) -> Tensor:
        """[E] int64 on the CPU: how many tokens were sent to each expert."""
        return torch.bincount(top_k_index.flatten().cpu(), minlength=self.num_experts)[: self.num_experts]

    def parts(self, parameter: str) -> Mapping[str, tuple[int, slice | None]]:
        """Which of our parameters a fused one holds: name -> (expert, columns of its outputs or all)."""
        kind = "bias" if parameter.endswith("_bias") else "weight"
        what = parameter.removesuffix("_bias")
        width = self.shapes[what][-1 if self.transposed else -2]
        step, half = (2, 1) if self.interleaved else (1, width // 2)
        if what == "gate_up_proj":
            ends = (None, None) if self.interleaved else (half, None)
            cuts = {
                self.names.gate: slice(0, ends[0], step),
                self.names.up: slice(half, ends[1], step),
            }
        else:
            cuts = {self.names.up if what == "up_proj" else self.names.down: None}
        return {f"{e}.{name}.{kind}": (e, cut) for e in range(self.num_experts) for name, cut in cuts.items()}

    def cut(self, fused: Tensor, cut: slice | None, bias: bool) -> Tensor:
        """One expert's part of a fused tensor [in, out], [out, in] or [out]: [out, in] or [out]."""
        if self.transposed and not bias:
            fused = fused.T
        return (fused if cut is None else fused[cut]).contiguous()


def is_fused(module: nn.Module) -> bool:
    """Whether a module holds the matrices of several experts as 3-D parameters, as transformers 5 does."""
    return any(p.ndim == 3 for n, p in module._parameters.items() if n in PARTS and p is not None)


def split_experts(model: nn.Module, names: Names | None = None) -> None:
    """Put `Experts` without values in the place of every fused module of ``model``.

    A fused module that has more to it than gate, up and down matrices and their biases stays as it is.
    """
    for name, module in [(n, m) for n, m in model.named_modules() if is_fused(m)]:
        known = all(hasattr(module, m) for m in ("has_gate", "has_bias", "is_transposed", "is_concatenated"))
        more = getattr(module, "has_post_expert_norm", False) or _parameters(module) - set(PARTS)
        if known and not more:
            model.set_submodule(name, Experts(module, names or Names()))


def _parameters(module: nn.Module) -> set[str]:
    return {name for name, _ in module.named_parameters()}


def routers(root: nn.Module) -> dict[str, nn.Module]:
    """What decides where tokens go, beside the experts of ``root``: names and modules with a 2-D weight.

    That is a module that scores the experts, and a linear layer with one output for each expert, or with one
    alone (the gate of shared experts).
    """
    found = {}
    for name, module in list(root.named_modules()):
        for child, experts in module.named_children():
            if isinstance(experts, Experts):
                inside = f"{name}.{child}." if name else f"{child}."
                for n, m in module.named_modules(prefix=name):
                    if not n.startswith(inside) and _routes(m, len(experts)):
                        found[n] = m
    return found


def _routes(module: nn.Module, experts: int) -> bool:
    weight = module._parameters.get("weight")
    return weight is not None and weight.ndim == 2 and weight.shape[0] in (1, experts)


def in_experts(root: nn.Module) -> dict[str, Experts]:
    """Names and modules of all `Experts` in ``root``."""
    return {name: module for name, module in root.named_modules() if isinstance(module, Experts)}
