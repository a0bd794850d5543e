"""A model ready to run, from any source: ``load("out")``, ``load("smollm2")``, ``load("model.gguf")``.

Quantized modules become ``QLinear`` or ``QEmbedding`` on their codes; quantizers of an encoder's sums and
outputs are set at their sites; everything else is materialized as it is stored. The model's class,
its buffers and its tied parameters are transformers' own (``fewbit.io.skeleton``).
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
from fewbit.io.shell import linear_of
from fewbit.io.skeleton import build_skeleton, materialize, parameter_map
from fewbit.io.source import Source, open_source
from fewbit.nn.embedding import QEmbedding
from fewbit.nn.sites import place


def load(path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> nn.Module:
    """The transformers model of a checkpoint, folder, GGUF file, hub id or ``smollm2``, in evaluation mode.

    dtype: of everything that is not quantized and of the computation; by default float32 on a CPU and the
    checkpoint's own elsewhere. Raises ``InputError`` for what cannot be opened.
    """
    source = open_source(path)
    if dtype is None:
        dtype = torch.float32 if torch.device(device).type == "cpu" else source.dtype
    model = build_skeleton(source)
    mapping, _ = parameter_map(source, model)
    quantized = _quantized(source, mapping)
    for name, module in quantized.items():
        q, entry = source.read_qtensor(module).to(device), source.entries[module]
        if isinstance(model.get_submodule(name), nn.Embedding):
            model.set_submodule(name, QEmbedding(q, dtype))
            continue
        params = source.read_input(module)
        params = None if params is None else params.to(device)
        model.set_submodule(name, linear_of(q, model.get_submodule(name).bias, entry, params))
    rest = [name for name in mapping if name.removesuffix(".weight") not in quantized]
    materialize(model, rest, source, {name: mapping[name] for name in rest}, device, dtype)
    sites = source.sites if isinstance(source, Checkpoint) else ()
    place(model, {entry.site: source.read_site(entry).to(device) for entry in sites})
    keep_kv(model, source, mapping, device)
    model.config.dtype = dtype
    _generation_config(model, source)
    if isinstance(source, Checkpoint):
        from fewbit.io.hf_quantizer import attach

        attach(model, {name: source.entries[module] for name, module in quantized.items()}, sites)
    return model.eval()


def _quantized(source: Source, mapping: dict[str, str]) -> dict[str, str]:
    """Module name in the model -> in the checkpoint, of every quantized module."""
    if not isinstance(source, Checkpoint):
        return {}
    found = {
        name: stored.removesuffix(".weight") for name, stored in mapping.items() if name.endswith(".weight")
    }
    return {
        name.removesuffix(".weight"): stored for name, stored in found.items() if stored in source.entries
    }


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
