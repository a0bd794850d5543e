"""Proof of what few bits cost: perplexity, divergence from the original, speed, size."""

from fewbit.evaluate.perplexity import Evaluation, Protocol, evaluate, windows
from fewbit.evaluate.speed import Speed, size_bytes, tokens_per_second

__all__ = ["Evaluation", "Protocol", "Speed", "evaluate", "size_bytes", "tokens_per_second", "windows"]
