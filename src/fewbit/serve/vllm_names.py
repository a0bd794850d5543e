"""How a compiled graph of vLLM finds a layer again: by name, among the layers of the engine that runs.

torch.compile shall not look into a layer's arithmetic, so an operator stands for it in the graph, which says
which layer it means. vLLM keeps compiled graphs on disk and several engines may live in a process, so it is
a name that says so, and the context of the running forward has the layer of that name.

Road not taken: a number counted up in the process. A graph from disk would mean the layers of whichever
engine was there first.
"""

from __future__ import annotations

from torch import nn
from vllm.config import get_current_vllm_config
from vllm.forward_context import get_forward_context


def remember(name: str, layer: nn.Module) -> str:
    """Make ``layer`` of the model that is being built known as ``name``; returns what ``find`` takes."""
    name = f"fewbit.{name}"
    get_current_vllm_config().compilation_config.static_forward_context[name] = layer
    return name


def find(name: str) -> nn.Module:
    """The layer of that name in the engine whose forward runs."""
    return get_forward_context().no_compile_layers[name]
