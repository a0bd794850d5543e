"""What a format costs each layer, and the best choice of formats under a budget."""

from __future__ import annotations

from fewbit.search.allocate import allocate
from fewbit.search.choose import RANGE, Budget, Found, Picked, choose
from fewbit.search.errors import Choice, Error, cost, error, gram_matrices, siblings
from fewbit.search.judge import Judge, block_linears
from fewbit.search.kept import Kept
from fewbit.search.linearity import (
    LEVELS,
    Response,
    fisher,
    fisher_inputs,
    fisher_rows,
    noise_responses,
    predict,
    random_tokens,
)
from fewbit.search.measure import Row, Score, Texts, measure
from fewbit.search.rank import rank_correlation, rank_correlations

__all__ = [
    "LEVELS", "RANGE", "Budget", "Choice", "Error", "Found", "Judge", "Kept", "Picked", "Response", "Row",
    "Score", "Texts", "allocate", "block_linears", "choose", "cost", "error", "fisher", "fisher_inputs",
    "fisher_rows", "gram_matrices", "measure", "noise_responses", "predict", "random_tokens",
    "rank_correlation", "rank_correlations", "siblings",
]  # fmt: skip
