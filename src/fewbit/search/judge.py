"""What a change costs the model: KL(float model || changed model), measured.

For one layer alone this is the truth that the linear model (`fewbit.search.linearity`) estimates, at the
price of a forward for every layer and format. Nothing before the layer changes with it, so `Judge.start_at`
has blocks before its own give what they gave to the float model, which halves the work over a model. That is
proved at every block: with no weight changed the shortened forward must reproduce the float model; where it
does not (blocks that hand each other more than their output) whole forwards are run.

Shapes: tokens [windows, l]. KL in nats per token, p the float model's distribution:

    KL = 1 / tokens * sum_t sum_v p(v | t) (log p(v | t) - log q(v | t))
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import torch
from torch import Tensor, nn
from torch.nn import functional

from fewbit.errors import InputError
from fewbit.nn.blocks import find_blocks, linears

SAME = 1e-6  # nats per token between two runs of one model: what float32 rounds away
Tick = Callable[[int, int], None]  # told (done, total)
_LOGITS = 2**27  # elements of logits at once: 512 MiB


class Judge:
    """The divergence of the model from what it was at first, over ``tokens`` [w, l].

    Keeps the log probabilities of the first pass, float32: l * vocabulary * 4 bytes a window. Leave it by
    ``close`` (or as a context) when forwards were shortened.
    """

    def __init__(self, model: nn.Module, tokens: Tensor):
        if model.training:
            raise InputError(f"{type(model).__name__} is in training mode: call model.eval()")
        self.model, self.tokens = model, tokens
        first = logits_of(model, tokens[:1])
        self.parts = tokens.split(max(1, _LOGITS // first.numel()))
        with torch.no_grad():
            self.float = [logits_of(model, part).log_softmax(-1) for part in self.parts]
        self._part = self._at = 0
        self._given: list[object] = []  # what the last block that does not run gave, for each part
        self._whole = False

    def __enter__(self) -> Judge:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @torch.no_grad()
    def kl(self) -> float:
        """The divergence now."""
        total = 0.0
        for i, (ids, p) in enumerate(zip(self.parts, self.float, strict=True)):
            self._part = i
            q = logits_of(self.model, ids).log_softmax(-1)
            total += float(functional.kl_div(q, p, reduction="sum", log_target=True).double())
        return max(total / self.tokens.numel(), 0.0)

    def start_at(self, layer: str) -> None:
        """From now on run the blocks from that of ``layer`` on; weights must be as at first."""
        names = find_blocks(self.model).names
        index = next(i for i, name in enumerate(names) if layer.startswith(f"{name}."))
        if index < self._at:
            self.close()
        while self._at < index and not self._whole:
            self._pass_block(find_blocks(self.model).modules[self._at])

    def close(self) -> None:
        """Run whole forwards again."""
        for block in find_blocks(self.model).modules:
            with suppress(AttributeError):
                del block.forward  # the class's own appears again
        self._at, self._given = 0, []

    def _pass_block(self, block: nn.Module) -> None:
        found: list[object] = []
        handle = block.register_forward_hook(lambda module, args, out: found.append(out))
        try:
            self.kl()
        finally:
            handle.remove()
        self._given, self._at = found, self._at + 1
        block.forward = lambda *args, **kwargs: self._given[self._part]
        if self.kl() > SAME:
            self.close()
            self._whole = True


@contextmanager
def replaced(weight: nn.Parameter, value: Tensor) -> Iterator[None]:
    """Other values in a parameter, for a while."""
    before = weight.data
    weight.data = value.to(weight.dtype)
    try:
        yield
    finally:
        weight.data = before


def logits_of(model: nn.Module, ids: Tensor) -> Tensor:
    """Float32 logits [w, l, v]."""
    device = next(model.parameters()).device
    cache = {"use_cache": False} if getattr(model.config, "use_cache", False) else {}
    return model(input_ids=ids.to(device), **cache).logits.float()


def block_linears(model: nn.Module) -> dict[str, nn.Module]:
    """Every linear layer in the blocks of a model by its full name, in order: what recipes quantize."""
    blocks = find_blocks(model)
    return {
        f"{b}.{n}": m
        for b, block in zip(blocks.names, blocks.modules, strict=True)
        for n, m in linears(block).items()
    }
