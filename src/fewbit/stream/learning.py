"""What learning a rotation adds to a plan: the whole model in memory, once, before the loop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from fewbit.errors import InputError
from fewbit.recipe import Recipe
from fewbit.seams.learn import together
from fewbit.stream.data import Calibration
from fewbit.stream.estimate import available

if TYPE_CHECKING:
    from fewbit.stream.planned import PlannedLayer


def learns(recipe: Recipe) -> bool:
    """Whether the recipe learns its rotation (SpinQuant), for which it needs calibration text."""
    return recipe.rotation is not None and recipe.rotation.steps > 0


def learning(
    recipe: Recipe,
    layers: Sequence[PlannedLayer],
    model: nn.Module,
    calibration: Calibration,
    device: str,
    dtype: torch.dtype,
) -> tuple[int, str]:
    """(peak bytes, caveat on time) of learning a rotation with the model's parameters in ``dtype``.

    Raises ``InputError`` where no input is quantized, or the model does not fit with what some windows need.
    """
    rotation = recipe.rotation
    if not any(layer.activation for layer in layers):
        raise InputError(
            f"recipe {recipe.name!r} learns a rotation from quantized inputs and quantizes none; give "
            "input_bits, or steps=0 for a random Hadamard map"
        )
    own = sum(sum(layer.shape) for layer in layers)  # what a backward pass keeps of one token
    logits = 4 * 4 * model.get_input_embeddings().num_embeddings
    parameters = sum(p.numel() for p in model.parameters()) * dtype.itemsize
    tokens = calibration.seqlen * min(rotation.batch, together(calibration.seqlen, torch.device(device)))
    peak = parameters + tokens * (2 * own * dtype.itemsize + logits)
    if peak > available(device):
        raise InputError(
            f"learning the rotation takes the whole model and the activations of {tokens} tokens in memory, "
            f"about {peak / 1e9:.1f} GB, and {device} has {available(device) / 1e9:.1f} GB; use a "
            "shorter --seqlen, or steps=0 for a random Hadamard map"
        )
    tokens = rotation.steps * rotation.batch * calibration.seqlen
    passes = 3 * tokens / (calibration.samples * calibration.seqlen)
    return peak, (
        f"learning the rotation sends {tokens} tokens forward and back through the whole model, the work of "
        f"{passes:.0f} passes over the calibration text, which the time above does not count"
    )
