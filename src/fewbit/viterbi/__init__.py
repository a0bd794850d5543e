"""The search for the best walk through a trellis: a table of values and a shift, nothing of grids."""

from fewbit.viterbi.search import EAGER, best_walk, search

__all__ = ["EAGER", "best_walk", "search"]
