"""Fixed steps of keys and values in a file, whatever the layout: X.k_scale and X.v_scale of attention X.

    float [1], or [heads, 1, 1] where each head has a step; x ~ q s

The names are those of compressed-tensors and vLLM, and of the buffers that a model keeps
(``fewbit.nn.kvsteps``). What the codes are, a ``KVFormat``, the configuration says: ``"kv"`` in fewbit's own
layout, ``kv_cache_scheme`` in compressed-tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from fewbit.errors import InputError
from fewbit.format.block import PerTensor
from fewbit.format.codec import FORMAT_CLASSES, from_plain, to_plain
from fewbit.io.base import TensorInfo
from fewbit.io.typed import check_types
from fewbit.nn.kvcache import Along, KVFormat

STEPS, ZEROS = ("k_scale", "v_scale"), ("k_zero_point", "v_zero_point")
Pair = tuple[Tensor, Tensor]

LEFT_BEHIND = "the fixed steps of keys and values stay behind: engines find their own, or keep floats"


def to_config(kv: KVFormat | None) -> dict:
    """Its part of a native ``quantization_config``."""
    return {} if kv is None else {"kv": to_plain(kv)}


def from_config(config: Mapping) -> KVFormat | None:
    """Inverse of ``to_config``. Raises ``InputError`` for what is no format with fixed steps."""
    if config.get("kv") is None:
        return None
    kv = from_plain(config["kv"], (KVFormat, *FORMAT_CLASSES))
    if not isinstance(kv, KVFormat) or not kv.static:
        raise InputError("the entry 'kv' of this checkpoint is no format of keys and values with fixed steps")
    check_types(kv, (KVFormat, Along, *FORMAT_CLASSES))
    return kv


def modules(infos: Mapping[str, TensorInfo]) -> list[str]:
    """The attentions that have steps, by name."""
    ends = tuple(f".{name}" for name in STEPS)
    return list(dict.fromkeys(n.rpartition(".")[0] for n in infos if n.endswith(ends)))


def stored(infos: Mapping[str, TensorInfo]) -> list[str]:
    """Names of all tensors that belong to steps of keys and values."""
    return [name for m in modules(infos) for part in (*STEPS, *ZEROS) if (name := f"{m}.{part}") in infos]


def to_dict(scales: Mapping[str, Pair]) -> dict[str, Tensor]:
    """The tensors of a file, by attention."""
    pairs = ((f"{m}.{n}", s) for m, both in scales.items() for n, s in zip(STEPS, both, strict=True))
    return {name: scale.float().contiguous() for name, scale in pairs}


def read(
    kv: KVFormat,
    infos: Mapping[str, TensorInfo],
    reader: Callable[[Iterable[str]], Mapping[str, Tensor]],
    heads: int,
) -> dict[str, Pair]:
    """Inverse of ``to_dict``. heads: of keys, in a layer.

    Raises ``InputError`` for steps that are missing, of another shape or not positive, and for zeros beside
    them.
    """
    tensors, out = reader(stored(infos)), {}
    for module in modules(infos):
        for part in ZEROS:
            if f"{module}.{part}" in tensors and tensors[f"{module}.{part}"].any():
                raise InputError(f"{module}.{part} is not 0, and keys and values are symmetric here")
        pair = []
        for name, part in zip(STEPS, kv.parts(), strict=True):
            scale = tensors.get(f"{module}.{name}")
            shape = (1,) if part.format.block == PerTensor() else (heads, 1, 1)
            if scale is None or not scale.is_floating_point() or scale.numel() != math.prod(shape):
                got = "missing" if scale is None else f"{scale.dtype} of shape {list(scale.shape)}"
                raise InputError(
                    f"{module}.{name} is {got} instead of floats of shape {list(shape)}; configuration and "
                    "file do not belong together"
                )
            scale = scale.float().reshape(shape)
            if not (torch.isfinite(scale).all() and (scale > 0).all()):
                raise InputError(f"{module}.{name} holds steps of 0 or less; the checkpoint is damaged")
            pair.append(scale)
        out[module] = tuple(pair)
    if not out:
        raise InputError("the checkpoint has no k_scale and v_scale, which its configuration asks for")
    return out
