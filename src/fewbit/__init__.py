"""fewbit: turn any Hugging Face language model into few bits, and prove what that cost.

The names below load what they need when they are first used, so that importing fewbit stays light.
"""

import importlib
from typing import Any

from fewbit.errors import InputError
from fewbit.io import hf

__version__ = "0.1.0"

_PUBLIC = {
    "Calibration": "fewbit.stream.data",
    "Format": "fewbit.format",
    "QTensor": "fewbit.format",
    "Recipe": "fewbit.recipe",
    "Rule": "fewbit.recipe",
    "compare": "fewbit.compare.run",
    "evaluate": "fewbit.evaluate.perplexity",
    "load": "fewbit.io.load",
    "quantize": "fewbit.stream.quantize",
    "recipes": "fewbit.recipe",
}
__all__ = ["InputError", *_PUBLIC]

hf.register()  # transformers reads native checkpoints from now on; transformers itself is not imported


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'fewbit' has no attribute {name!r}")
    module = importlib.import_module(_PUBLIC[name])
    value = module if name == "recipes" else getattr(module, name)
    globals()[name] = value
    return value
