"""Errors of a layer, static steps of its input, and the choice among formats (MoFQ).

MoFQ gives each layer the integer or the float format of one bit width, whichever has the lesser error, weight
and input by the same kind: Zhang et al. 2023, https://arxiv.org/abs/2305.12356, section 4.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fewbit.errors import InputError
from fewbit.format import Format, Params, QTensor, Stats
from fewbit.format.activation import Activation
from fewbit.solve import Solver


def choose(
    w: Tensor, stats: Stats, solver: Solver, choices: Sequence[tuple[Format, Activation | None]]
) -> tuple[int, QTensor]:
    """Index and codes of the choice with the least error of ``w`` [out, in]; the first of equals."""
    best = None
    for i, (weight, activation) in enumerate(choices):
        q = solver(w, stats, weight)
        loss = joint_error(w, q.dequantize(), activation, stats)
        if best is None or loss < best[0]:
            best = (loss, i, q)
    return best[1], best[2]


def joint_error(w: Tensor, value: Tensor, activation: Activation | None, stats: Stats) -> float:
    """Relative squared error of the output, the rounding of the input included, on the sampled inputs."""
    if activation is None:
        return error(w, value, stats.gram)
    x = stats.sample
    y = x @ w.T
    off = activation(x, static_params(activation, stats, "")) @ value.T - y
    return float(off.square().sum() / y.square().sum().clamp(min=1e-30))


def error(w: Tensor, value: Tensor, gram: Tensor | None) -> float:
    """Relative squared error of the output, or of the weight where no inputs were gathered."""
    e = w - value
    if gram is None:
        norm = torch.linalg.vector_norm
        return float(norm(e).square() / norm(w).square().clamp(min=1e-30))
    return float(((e @ gram) * e).sum() / ((w @ gram) * w).sum().clamp(min=1e-30))


def static_params(activation: Activation | None, stats: Stats, layer: str) -> Params | None:
    """Static steps, or means, of the input of ``layer``; None where there are none."""
    if activation is not None and activation.centred and stats.mean is not None:
        return Params(scale=None, zero=stats.mean.clone())  # a file shares no memory
    if activation is None or not (activation.static or activation.centred):
        return None
    if stats.sample is None:
        raise InputError(
            f"the calibration text never reached layer {layer}, so its input has no static range and no "
            "mean; use more text, or a dynamic range that is not centred"
        )
    if activation.momentum is None:
        return activation.fit(stats.sample, stats.low, stats.high)
    low, high = stats.batches[0]
    for batch in stats.batches[1:]:
        low, high = activation.momentum * torch.stack([low, high]) + (1 - activation.momentum) * batch
    width = stats.low.shape
    return activation.fit_range(low.expand(width), high.expand(width))
