"""What the linears of a block read, gathered from the batches that wait at it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from fewbit.stream.inputs import Inputs
from fewbit.stream.planned import PlannedLayer
from fewbit.stream.suspend import Flow, Stop


def outside_flow(block: nn.Module, stop: Stop) -> object:
    """Call a block with the inputs of a waiting flow; hooks that suspend do nothing here."""
    return block(*stop.args, **stop.kwargs)


def inputs_of(group: Sequence[PlannedLayer], batches: int) -> Inputs:
    """An accumulator of what the layers of a group need of their common input, over ``batches`` of it."""
    needs = frozenset().union(*(layer.rule.needs for layer in group))
    return Inputs(needs, batches, [layer.activation for layer in group])


def gather(model: nn.Module, block: nn.Module, seen: Mapping[str, Inputs], flows: Sequence[Flow]) -> None:
    """Run the block once on every waiting batch and let each module's ``Inputs`` see what it reads.

    seen: by the full name of the module.
    """
    handles = [
        model.get_submodule(m).register_forward_pre_hook(
            lambda mod, args, kwargs, own=own: own.add(args[0] if args else next(iter(kwargs.values()))),
            with_kwargs=True,
        )
        for m, own in seen.items()
    ]
    try:
        for flow in flows:
            outside_flow(block, flow.stop)
    finally:
        for handle in handles:
            handle.remove()
