"""Native checkpoints in ``AutoModelForCausalLM.from_pretrained``, after ``import fewbit``.

transformers finds a quantizer by the ``quant_method`` of config.json in a table that others may extend.
``register`` puts ours there: at once when that table is already imported, otherwise through an import hook
that waits for it. So ``import fewbit`` does not import transformers, and may come before or after it.
"""

from __future__ import annotations

import importlib.abc
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

_TABLE = "transformers.quantizers.auto"


def register() -> None:
    """Make transformers load native checkpoints, now or once it is imported. Twice does no harm."""
    if _TABLE in sys.modules:
        _add(sys.modules[_TABLE])
    elif not any(isinstance(finder, _Hook) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Hook())


def _add(table: ModuleType) -> None:
    from fewbit.io.hf_quantizer import QUANT_METHOD, FewbitConfig, FewbitQuantizer

    if QUANT_METHOD not in table.AUTO_QUANTIZER_MAPPING:
        table.register_quantizer(QUANT_METHOD)(FewbitQuantizer)
        table.register_quantization_config(QUANT_METHOD)(FewbitConfig)


class _Hook(importlib.abc.MetaPathFinder):
    """Lets the other finders find the table, and adds our entry once it has run. Gone after that."""

    def find_spec(self, name: str, path=None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != _TABLE:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, (f.find_spec(name, path, target) for f in others)), None)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                run(module)
                sys.meta_path.remove(self)
                _add(module)

            spec.loader.exec_module = exec_module
        return spec
