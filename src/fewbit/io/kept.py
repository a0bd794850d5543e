"""Steps of keys and values, from a checkpoint to the attentions of its model."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from fewbit.errors import InputError
from fewbit.io.checkpoint import Checkpoint
from fewbit.io.source import Source


def keep_kv(model: nn.Module, source: Source, mapping: Mapping[str, str], device: torch.device | str) -> None:
    """Give the attentions of ``model`` the steps that ``source`` holds, if it holds any.

    mapping: parameters of the model to stored tensors. Raises ``InputError`` where steps and model differ.
    """
    if not isinstance(source, Checkpoint) or source.kv is None:
        return
    from fewbit.nn.kvsteps import attentions, keep

    names = {stored_name(name, mapping): name for name in attentions(model, source.kv).values()}
    scales = source.read_kv()
    if names.keys() != scales.keys():
        odd = sorted(names.keys() ^ scales.keys())[0]
        raise InputError(
            f"{source.name} has steps for keys and values of other attentions than its model: {odd}; "
            "configuration and file do not belong together"
        )
    keep(model, source.kv, {names[n]: tuple(s.to(device) for s in pair) for n, pair in scales.items()})


def stored_name(name: str, mapping: Mapping[str, str]) -> str:
    """What a module that holds parameters is called in the checkpoint."""
    for parameter in (n for n in mapping if n.startswith(f"{name}.")):
        rest = parameter.removeprefix(name)
        if mapping[parameter].endswith(rest):
            return mapping[parameter].removesuffix(rest)
    return name
