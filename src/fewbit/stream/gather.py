"""What the linears of a block read, gathered from the batches that wait at it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType

from torch import nn

from fewbit.solve.calls import Call
from fewbit.stream.inputs import Inputs
from fewbit.stream.planned import PlannedLayer
from fewbit.stream.suspend import Flow, Stop

EMPTY: Mapping[str, list[Call]] = MappingProxyType({})


def outside_flow(block: nn.Module, stop: Stop) -> object:
    """Call a block with the inputs of a waiting flow; hooks that suspend do nothing here."""
    return block(*stop.args, **stop.kwargs)


def block_runs(block: nn.Module, flows: Sequence[Flow]) -> list[Callable[[], object]]:
    """The block on every batch that waits at it."""
    return [functools.partial(outside_flow, block, flow.stop) for flow in flows]


def inputs_of(group: Sequence[PlannedLayer], batches: int) -> Inputs:
    """An accumulator of what the layers of a group need of their common input, over ``batches`` of it."""
    needs = frozenset().union(*(layer.rule.needs for layer in group))
    return Inputs(needs, batches, [layer.activation for layer in group])


def gather(
    model: nn.Module,
    seen: Mapping[str, Inputs],
    runs: Iterable[Callable[[], object]],
    calls: Mapping[str, list[Call]] = EMPTY,
) -> None:
    """Let each module's ``Inputs`` see what it reads while ``runs`` are run, one for each batch.

    seen: by the full name of the module; calls: of these modules every call is added to their list.
    """
    handles = [
        model.get_submodule(m).register_forward_pre_hook(
            lambda mod, args, kwargs, own=own: own.add(args[0] if args else next(iter(kwargs.values()))),
            with_kwargs=True,
        )
        for m, own in seen.items()
    ]
    handles += [
        model.get_submodule(m).register_forward_pre_hook(
            lambda mod, args, kwargs, own=own: own.append((args, kwargs)), with_kwargs=True
        )
        for m, own in calls.items()
    ]
    try:
        for run in runs:
            run()
    finally:
        for handle in handles:
            handle.remove()
