"""Suspended forwards: the model's own ``forward`` as a coroutine.

Each calibration batch runs ``model(input_ids)`` once, in a greenlet. A forward pre-hook on a module calls
``wait``, which switches back to the loop and leaves the whole Python stack of the forward standing where it
is: masks, rotary tables, residuals and all. When every batch waits at the same place, the loop does its work
there (gather, solve, swap weights) and resumes them. No input catcher, no tracing, no per-architecture code;
outputs are bit-identical to plain forwards.

Road not taken: capturing the first block's inputs by an exception and calling blocks in our own loop, as
every existing tool does. It must know what each architecture passes to its blocks, and it computes each block
twice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import greenlet
import torch
from torch import nn

from fewbit.errors import InputError
from fewbit.nn.linear import change_input


@dataclass
class Stop:
    """Where a flow waits: the module whose pre-hook suspended it, and what it is about to be called with."""

    module: nn.Module
    args: tuple
    kwargs: dict
    change: Callable[[torch.Tensor], torch.Tensor] | None = None  # of x, when the flow goes on

    @property
    def x(self) -> torch.Tensor:
        """The first input, positional or by name: what a linear layer multiplies."""
        return self.args[0] if self.args else next(iter(self.kwargs.values()))


class Flow(greenlet.greenlet):
    """One forward pass that can be suspended at hooked modules."""

    def __init__(self, forward: Callable[[], object]):
        super().__init__(forward)
        self.result: object = None
        self.stop: Stop | None = None  # where it waits

    def resume(self) -> Stop | None:
        """Run to the next hooked module and return the ``Stop`` there; None when the forward has ended.

        The forward's exceptions surface here. The forward's value is then in ``result``.
        """
        out = self.switch()
        self.stop = out if isinstance(out, Stop) else None
        if self.stop is None:
            self.result = out
        return self.stop

    def abandon(self) -> None:
        """End a suspended forward whose outcome nobody needs, and free what its stack holds."""
        if not self.dead:
            self.throw(greenlet.GreenletExit)


def wait(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    """Forward pre-hook (``with_kwargs=True``): suspend when called inside a ``Flow``, do nothing
    elsewhere. The input may be changed meanwhile through ``Stop.change``.
    """
    here = greenlet.getcurrent()
    if isinstance(here, Flow):
        stop = Stop(module, args, kwargs)
        here.parent.switch(stop)
        if stop.change is not None:
            return change_input(stop.change, args, kwargs)
    return None


def advance(flows: list[Flow], module: nn.Module) -> list[Stop]:
    """Resume flows to ``module``, where they must stop; a flow that waits there already stays."""
    stops = []
    for flow in flows:
        if flow.stop is None or flow.stop.module is not module:
            flow.resume()
        if flow.stop is None or flow.stop.module is not module:
            raise InputError(
                f"the forward of this model did not reach a {type(module).__name__} where it was expected; "
                "its blocks are "
                "not called in their order, which the streaming loop needs"
            )
        stops.append(flow.stop)
    return stops
