"""Experts for an engine: each a gate, up and down matrix that stay as the file holds them.

    y_t = sum over the experts e that token t was sent to of  p_te  down_e(act(gate_e(x_t)) * up_e(x_t))

The loop is that of ``fewbit.load`` (``fewbit.nn.experts``): an expert's matrices are unpacked when tokens
reached it, and for the time of its turn. Which experts those are the host has to ask. Inside a CUDA graph it
cannot, and every expert computes all tokens, times 0 where a token was sent elsewhere:

    y = sum over all e of  p_e * e(x)         p_e [T, 1]

Road not taken: codes of all experts in one tensor, gathered by token and decoded together. Experts may differ
in their formats and bases, which a tensor of all of them rules out.

Shapes: T tokens, k experts a token, E experts, h hidden, f inside an expert.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fewbit.nn.experts import Experts


class PackedExpert(nn.Module):
    """x [n, h] -> [n, h] by three layers; ``act``: of the gate."""

    def __init__(self, gate: nn.Module, up: nn.Module, down: nn.Module, act: Callable[[Tensor], Tensor]):
        super().__init__()
        self.gate, self.up, self.down, self.act = gate, up, down, act

    def forward(self, x: Tensor) -> Tensor:
        """x [n, h] -> [n, h] in x's dtype."""
        return self.down(self.act(self.gate(x)) * self.up(x))


class PackedExperts(Experts):
    """E experts, children "0" to "E-1", called as those of ``fewbit.load`` are."""

    def __init__(self, experts: Sequence[PackedExpert]):
        nn.Module.__init__(self)  # no fused module stood here before
        self.num_experts = len(experts)
        for e, expert in enumerate(experts):
            self.add_module(str(e), expert)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states [T, h], top_k_index [T, k] integers, top_k_weights [T, k] -> [T, h]."""
        if hidden_states.is_cuda and torch.cuda.is_current_stream_capturing():
            return self.all_of_them(hidden_states, top_k_index, top_k_weights)
        return super().forward(hidden_states, top_k_index, top_k_weights)

    def all_of_them(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """The same by every expert on all tokens: nothing is asked of the device."""
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.children()):
            share = (weights * (index == e)).sum(-1, keepdim=True)
            out += (expert(x) * share).to(out.dtype)
        return out
