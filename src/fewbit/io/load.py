"""A model ready to run, from any source: ``load("out")``, ``load("smollm2")``, ``load("model.gguf")``.

Quantized modules, those of GGUF files too, become ``QLinear`` or ``QEmbedding`` on their codes; quantizers of
an encoder's sums and outputs are set at their sites; everything else is materialized as it is stored. The
model's class, its buffers and its tied parameters are transformers' own (``fewbit.io.skeleton``).
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import nn

from fewbit.errors import InputError
from fewbit.io.base import first_line
from fewbit.io.checkpoint import Checkpoint
from fewbit.io.kept import keep_kv
from fewbit.io.locate import PACKAGED
from fewbit.io.shell import linear_of
from fewbit.io.skeleton import build_skeleton, materialize, parameter_map
from fewbit.io.source import Source, open_source
from fewbit.nn.embedding import QEmbedding
from fewbit.nn.sites import place


def load(
    path: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    *,
    dequantize: bool = False,
) -> nn.Module:
    """The transformers model of a checkpoint, folder, GGUF file, hub id or ``smollm2``, in evaluation mode.

    dtype: of everything that is not quantized and of the computation; by default float32 on a CPU and the
    checkpoint's own elsewhere. dequantize: hold weights in ``dtype`` instead of their codes, for a model that
    is to be trained or changed; ``smollm2``, which stands for a float model, always does. Raises
    ``InputError`` for what cannot be opened, and for layers to dequantize that are more than a weight.
    """
    source = open_source(path)
    if dtype is None:
        dtype = torch.float32 if torch.device(device).type == "cpu" else source.dtype
    model = build_skeleton(source)
    mapping, _ = parameter_map(source, model)
    quantized = _quantized(source, mapping, model)
    if dequantize or str(path) == PACKAGED:
        _check_weights_alone(source)
        quantized = {}
    shared = {}  # a table and the head that is tied to it are one weight
    for name, module in quantized.items():
        entry = source.entries[module]
        q = shared.get(module)
        if q is None:
            q = shared[module] = source.read_qtensor(module).to(device)
        if isinstance(model.get_submodule(name), nn.Embedding):
            model.set_submodule(name, QEmbedding(q, dtype))
            continue
        params = None if entry.activation is None else source.read_input(module)
        params = None if params is None else params.to(device)
        model.set_submodule(name, linear_of(q, model.get_submodule(name).bias, entry, params))
    rest = [name for name in mapping if name.removesuffix(".weight") not in quantized]
    materialize(model, rest, source, {name: mapping[name] for name in rest}, device, dtype)
    sites = source.sites if isinstance(source, Checkpoint) else ()
    place(model, {entry.site: source.read_site(entry).to(device) for entry in sites})
    keep_kv(model, source, mapping, device)
    model.config.dtype = dtype
    _generation_config(model, source)
    if quantized or sites:
        from fewbit.io.hf_quantizer import attach

        attach(model, {name: source.entries[module] for name, module in quantized.items()}, sites)
    return model.eval()


def _quantized(source: Source, mapping: dict[str, str], model: nn.Module) -> dict[str, str]:
    """Module name in the model -> in the checkpoint, of every quantized module.

    Of a GGUF those that have a module for codes: not a router, nor a table whose rows do not decode alone.
    """
    entries = getattr(source, "entries", {})
    found = {
        name.removesuffix(".weight"): stored.removesuffix(".weight")
        for name, stored in mapping.items()
        if name.endswith(".weight") and stored.removesuffix(".weight") in entries
    }
    if isinstance(source, Checkpoint):
        return found
    tables = {n for n, m in model.named_modules() if isinstance(m, nn.Embedding)}
    held = tables | {n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    slow = {module for name, module in found.items() if name in tables} - {
        module for module in found.values() if entries[module].format.rows_independent
    }
    return {name: module for name, module in found.items() if name in held and module not in slow}


def _check_weights_alone(source: Source) -> None:
    """Refuse to dequantize what computes with more than a decoded weight."""
    for name, entry in getattr(source, "entries", {}).items():
        if entry.activation is not None or entry.online is not None or entry.output is not None:
            raise InputError(
                f"{name} of {source.name} rounds or maps its input at every call, which a decoded weight "
                "does not; load it without dequantize"
            )


def _generation_config(model: nn.Module, source: Source) -> None:
    """The checkpoint's own generation settings, where it has any."""
    from transformers import GenerationConfig

    with tempfile.TemporaryDirectory() as folder:
        if "generation_config.json" not in source.companions(Path(folder)):
            return
        try:
            model.generation_config = GenerationConfig.from_pretrained(folder)
        except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            raise InputError(
                f"transformers cannot use the generation_config.json of {source.name} ({first_line(error)}); "
                "correct or remove it."
            ) from error
