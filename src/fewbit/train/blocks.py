"""Block by block: all that a block has learns to give the float block's outputs from the quantized prefix.

    min over theta = {W, s, z, norms} of  mean over tokens t of  ||F_theta(X_q)_t - F(X)_t||^2 / ||F(X)_t||^2

Block-AP, the first phase of EfficientQAT: Chen et al. 2024, https://arxiv.org/abs/2407.11062, section 3.2. F
is the float block, X its inputs in the float model, X_q those that come through the blocks trained before.
Memory is that of one block's training. `fewbit.train.steps` is the second phase.

The optimization is that of ``fewbit.solve.blocktune``, which tunes what is float in a block between the
groups of GPTQ: here all of the block is, with its rounding in the loop. So rates are shares of each
parameter's root mean square, errors count relative to each token's size, and the state that is best on calls
that teach nothing is kept: no block becomes worse on them.

Road not taken: to solve blocks inside the streaming loop. A prepared model is in memory as a whole anyway,
since the second phase trains it as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fewbit.errors import InputError
from fewbit.nn.blocks import find_blocks
from fewbit.solve.blocktune import BlockTuning, tune_rest
from fewbit.solve.calls import Calls
from fewbit.train.linear import FakeLinear


@dataclass(frozen=True, kw_only=True)
class BlockError:
    """Mean relative squared error of a token on the calls held out: rounded before training, and after."""

    block: str
    before: float
    after: float


@torch.no_grad()
def train_blocks(
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    tuning: BlockTuning | None = None,
    *,
    progress: Callable[[BlockError], None] | None = None,
) -> list[BlockError]:
    """Train every block of ``model``, prepared, in place, one after another; the errors of each.

    batches: keyword arguments of calls of the model, one an update, the last of them held out. tuning:
    updates and rates, 200 updates where None. Weights stay wide; ``convert`` makes codes. Raises
    ``InputError`` where there is nothing to train or fewer than two batches.
    """
    tuning = BlockTuning(steps=200) if tuning is None else tuning
    blocks, batches = find_blocks(model), list(batches)
    if not any(isinstance(m, FakeLinear) for m in model.modules()):
        raise InputError(f"{type(model).__name__} has no fake-quantized layers; call prepare first")
    if len(batches) < 2:
        raise InputError(f"training by blocks needs two batches or more, one to hold out, got {len(batches)}")
    training, found = model.training, []
    model.eval()
    starts, keywords = _inputs(model, blocks.modules, batches)
    wide, narrow = starts, list(starts)
    cut = tuning.split(len(batches))
    for name, block, known in zip(blocks.names, blocks.modules, keywords, strict=True):
        with plain(block):
            wide = [_output(block(x, **k)) for x, k in zip(wide, known, strict=True)]
        calls = [((x,), k) for x, k in zip(narrow, known, strict=True)]
        train, held = (Calls(block, {}, calls[part], wide[part]) for part in (slice(cut), slice(cut, None)))
        leaves = dict(block.named_parameters())
        outcome = tune_rest(train, held, leaves, tuning, {})
        for key, value in outcome.values.items():
            leaves[key].copy_(value)
        narrow = [_output(block(x, **k)) for x, k in zip(narrow, known, strict=True)]
        found.append(BlockError(block=name, before=outcome.start, after=outcome.error))
        if progress is not None:
            progress(found[-1])
    model.train(training)
    return found


@contextmanager
def plain(module: nn.Module) -> Iterator[None]:
    """Within, the fake-quantized layers of ``module`` compute as plain linears."""
    layers = [m for m in module.modules() if isinstance(m, FakeLinear)]
    for layer in layers:
        layer.forward = nn.Linear.forward.__get__(layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _inputs(
    model: nn.Module, blocks: Iterable[nn.Module], batches: list[Mapping[str, Tensor]]
) -> tuple[list[Tensor], list[list[dict[str, Any]]]]:
    """What the first block receives, batch by batch; of each block its other arguments, batch by batch."""
    blocks = list(blocks)
    first: list[Tensor] = []
    others: list[list[dict[str, Any]]] = [[] for _ in blocks]

    def watch(i: int):
        def look(module: nn.Module, args: tuple, kwargs: dict) -> None:
            rest = {k: v for k, v in kwargs.items() if k != "hidden_states"}
            if len(args) > 1:
                raise InputError(
                    f"{type(module).__name__} takes more than its hidden states by position; blocks of this "
                    "model cannot be trained one by one"
                )
            if i == 0:
                first.append((args[0] if args else kwargs["hidden_states"]).detach())
            others[i].append(rest)

        return look

    hooks = [b.register_forward_pre_hook(watch(i), with_kwargs=True) for i, b in enumerate(blocks)]
    try:
        with plain(model):
            for batch in batches:
                model(**batch, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return first, others


def _output(out: Any) -> Tensor:
    return out[0] if isinstance(out, tuple) else out
