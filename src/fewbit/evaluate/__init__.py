"""Proof of what few bits cost: perplexity, divergence from the original, speed, size.

The folder and its main function share a name, and Python binds the folder to ``fewbit.evaluate`` as soon as
anything in it is imported. So the module can be called: ``fewbit.evaluate(model, tokens, protocol)`` works
whatever was imported first.
"""

import sys
from types import ModuleType
from typing import Any

from fewbit.evaluate.perplexity import Evaluation, Protocol, evaluate, windows
from fewbit.evaluate.speed import Speed, size_bytes, tokens_per_second

__all__ = ["Evaluation", "Protocol", "Speed", "evaluate", "size_bytes", "tokens_per_second", "windows"]


class _Module(ModuleType):
    def __call__(self, *args: Any, **keywords: Any) -> Evaluation:
        """`fewbit.evaluate.perplexity.evaluate`."""
        return evaluate(*args, **keywords)


sys.modules[__name__].__class__ = _Module
