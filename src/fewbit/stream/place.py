"""A quantized layer in its place: what the flows multiply by, and what they multiply."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from fewbit.format import Params, QTensor
from fewbit.format.fake import Through
from fewbit.format.split import SplitTensor
from fewbit.nn.linear import transform_input
from fewbit.stream.planned import PlannedLayer
from fewbit.stream.suspend import Flow


def in_flow(layer: PlannedLayer, value: Tensor) -> Tensor:
    """The weight that a plain linear needs in the flows: out of the basis in which it was quantized, but for
    inputs that are quantized there.
    """
    basis = layer.rule.basis
    return value if basis is None else basis.leave(value, inputs=layer.activation is None)


def as_parameter(layer: PlannedLayer, value: Tensor) -> Tensor:
    """``in_flow`` as the module stores its weight."""
    return in_flow(layer, value).t() if layer.transposed else in_flow(layer, value)


def apart_of(q: QTensor | SplitTensor) -> Tensor | None:
    """The columns of a weight that are kept in float, or None."""
    return q.columns if isinstance(q, SplitTensor) else None


def read_quantized(
    model: nn.Module,
    layer: PlannedLayer,
    params: Params | None,
    apart: Tensor | None,
    flows: Sequence[Flow],
) -> None:
    """From here on the layer reads its input quantized, in those of ``flows`` that wait at it, too."""
    if layer.activation is None:
        return
    module, basis = model.get_submodule(layer.module), layer.rule.basis
    mapped = (lambda x: x) if basis is None else layer.input_map.apply

    def change(x: Tensor) -> Tensor:
        x = mapped(x)  # tuning sees gradients go straight through the rounding
        return Through.apply(x, layer.activation(x.detach(), params, apart))

    waiting = [flow.stop for flow in flows if flow.stop is not None and flow.stop.module is module]
    for stop in waiting:  # hooks that are added now come too late for them
        stop.change = change
    if not waiting:
        transform_input(module, change)
