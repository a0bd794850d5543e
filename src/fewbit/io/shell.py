"""From what a file holds of a layer to the module that runs it, and back."""

from __future__ import annotations

from torch import Tensor

from fewbit.format.format import Params
from fewbit.format.qtensor import QTensor
from fewbit.format.split import SplitTensor
from fewbit.io.native import Entry
from fewbit.io.ordered import OrderedTensor
from fewbit.nn.embedding import QEmbedding
from fewbit.nn.linear import QLinear
from fewbit.transform.maps import Permutation

Stored = QTensor | SplitTensor | OrderedTensor


def linear_of(weight: Stored, bias: Tensor | None, entry: Entry, params: Params | None) -> QLinear:
    """The layer of a weight [out, in]; one whose columns are ordered gathers its input first."""
    online = entry.online
    if isinstance(weight, OrderedTensor):
        assert online is None, "an order of columns and another map of the input"
        weight, online = weight.rest, weight.map
    activation, output = entry.activation, entry.output
    return QLinear(weight, bias, activation=activation, params=params, online=online, output=output)


def stored_of(module: QLinear | QEmbedding) -> Stored:
    """The weight as a file holds it: inverse of ``linear_of``."""
    online = getattr(module, "online", None)
    if isinstance(online, Permutation):
        return OrderedTensor(rest=module.qweight, order=online.order)
    return module.qweight
