"""Bits under a budget: how much each layer matters, and the choice that follows."""

from __future__ import annotations

from fewbit.search.allocate import allocate
from fewbit.search.choose import Estimate, Found, Picked, choose
from fewbit.search.errors import Choice, Error, error, gram_matrices, layer_errors, siblings
from fewbit.search.linearity import LEVELS, Response, fisher, noise_responses, predict, random_tokens

__all__ = [
    "LEVELS", "Choice", "Error", "Estimate", "Found", "Picked", "Response", "allocate", "choose", "error",
    "fisher", "gram_matrices", "layer_errors", "noise_responses", "predict", "random_tokens", "siblings",
]  # fmt: skip
