"""What `save_pretrained` needs of a model whose quantized layers were made in memory, after training say.

    convert(model); make_saveable(model); model.save_pretrained("out")       then fewbit.load("out")

Road not taken: to ask whoever put the layers there for their entries. The layers know all of it themselves.
"""

from __future__ import annotations

from torch import nn

from fewbit.errors import InputError
from fewbit.format.split import SplitTensor
from fewbit.io.entry import Entry
from fewbit.nn.linear import QLinear


def make_saveable(model: nn.Module) -> nn.Module:
    """A transformers model with `QLinear` layers, ready for ``save_pretrained`` in fewbit's own layout.

    Raises ``InputError`` where there is no such layer, and for grids without a name.
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, QLinear)}
    if not layers:
        raise InputError(f"{type(model).__name__} has no quantized layers; quantize or convert it first")
    import transformers.quantizers  # noqa: F401  (first: it takes up fewbit's quantizer)

    from fewbit.io.hf_quantizer import attach

    attach(model, {name: _entry(layer) for name, layer in layers.items()})
    return model


def _entry(layer: QLinear) -> Entry:
    """What a file says of a layer."""
    if isinstance(layer.qweight, SplitTensor):
        raise InputError("a layer that keeps columns apart is saved by `fewbit quantize` alone; use that")
    how = {"activation": layer.activation, "online": layer.online, "output": layer.output}
    return Entry(format=layer.format, shape=tuple(layer.shape), **how)
