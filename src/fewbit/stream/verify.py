"""Proof of the file: a checkpoint is read back from disk, block by block, and must give the logits of the
run.

The reader is the one that every user of the file goes through (``open_source``), so packing, names,
configuration and tied weights are all inside the check. Memory stays at one block.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from fewbit.errors import InputError
from fewbit.io.checkpoint import Checkpoint
from fewbit.io.skeleton import build_skeleton, dematerialize, materialize, parameter_map
from fewbit.io.source import Source, open_source
from fewbit.nn.linear import see_quantized
from fewbit.stream.blocks import find_blocks
from fewbit.stream.memory import Heap
from fewbit.stream.suspend import Flow, advance, wait


@torch.no_grad()
def verify(folder: Path, witness: Tensor, expected: Tensor, device: str) -> float:
    """Read a checkpoint back block by block and compare its logits; returns the largest relative difference.

    Raises ``InputError`` when they differ by more than 1e-3 of the largest logit, or are not finite.
    """
    return compare(folder, stream_logits(open_source(folder), witness, device), expected)


def compare(folder: Path, got: Tensor, expected: Tensor) -> float:
    """The largest difference of two answers, relative to the largest of the ``expected``; raises as above."""
    if not torch.isfinite(got).all():
        raise InputError(f"the checkpoint written to {folder} gives NaN or Inf logits; nothing was published")
    difference = float((got - expected).abs().max() / expected.abs().max().clamp(min=1e-30))
    if difference > 1e-3:
        raise InputError(
            f"the checkpoint written to {folder} does not reproduce the model in memory (logits differ by "
            f"{difference:.2g} of the largest); nothing was published; please report this"
        )
    return difference


def _quantize_inputs(model, names, source: Source, mapping: dict[str, str], device: str) -> None:
    """Make the float layers of one block see inputs as the checkpoint says they are quantized."""
    for name in names if isinstance(source, Checkpoint) else ():
        stored, module = mapping[name].removesuffix(".weight"), name.removesuffix(".weight")
        entry = source.entries.get(stored) if name.endswith(".weight") else None
        if entry is not None and (entry.activation or entry.online or entry.output):
            params = source.read_input(stored)
            see_quantized(
                model.get_submodule(module),
                entry.activation,
                None if params is None else params.to(device),
                entry.online,
                entry.output,
                None if (apart := source.read_apart(stored)) is None else apart.to(device),
            )


@torch.no_grad()
def stream_logits(source: Source, tokens: Tensor, device: str = "cpu") -> Tensor:
    """Logits [batch, L, vocabulary] of any source, float32 on the CPU, with one block's weights in memory at
    a time.
    """
    model = build_skeleton(source)
    mapping, _ = parameter_map(source, model)
    blocks = find_blocks(model)
    dtype = torch.float32 if device == "cpu" else source.dtype
    inside = tuple(n + "." for n in blocks.names)
    outside = [n for n in mapping if not n.startswith(inside)]
    materialize(model, outside, source, mapping, device, dtype)
    handles = [b.register_forward_pre_hook(wait, with_kwargs=True) for b in blocks.modules]
    heap = Heap()
    flow = Flow(lambda: model(tokens.to(device), use_cache=False)[0])
    try:
        for i, block in enumerate(blocks.modules):
            advance([flow], block)
            if i:
                dematerialize(blocks.modules[i - 1])
            names = [n for n in mapping if n.startswith(blocks.names[i] + ".")]
            materialize(model, names, source, mapping, device, dtype)
            _quantize_inputs(model, names, source, mapping, device)
            heap.settle(source)
        flow.resume()
    finally:
        for handle in handles:
            handle.remove()
        flow.abandon()
    return flow.result.float().cpu()
