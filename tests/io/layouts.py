"""Weights through the layouts of other tools, and decoders written from their specifications alone.

The decoders use numpy and nothing of fewbit: loops over fields of words, as the specifications put it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

import numpy as np
import torch

from fewbit.io.base import TensorInfo


def infos_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, TensorInfo]:
    """What a file's header would say of them."""
    return {n: TensorInfo(shape=tuple(t.shape), dtype=t.dtype, nbytes=t.nbytes) for n, t in tensors.items()}


def read_of(tensors: Mapping[str, torch.Tensor]):
    """The reader that codecs get."""
    return lambda names: {n: tensors[n] for n in names}


def entries_of(codec, config: dict, tensors: Mapping[str, torch.Tensor]):
    """What a codec makes of a file with this configuration, which goes through JSON."""
    return codec.entries(json.loads(json.dumps(config)), infos_of(tensors), read_of(tensors))


def fields(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """[words] int32 -> [count]: field i is bits i b ... i b + b - 1 of the stream of words, LSB first."""
    stream = sum(int(np.uint32(np.int64(w) & 0xFFFFFFFF)) << (32 * i) for i, w in enumerate(words.tolist()))
    return np.array([(stream >> (i * bits)) & ((1 << bits) - 1) for i in range(count)])


def decode_gptq(t: Mapping[str, torch.Tensor], module: str, bits: int, v2: bool) -> np.ndarray:
    """W [out, in] float32 of a GPTQ module."""
    get = lambda name: t[f"{module}.{name}"].numpy()  # noqa: E731
    qweight, qzeros, scales, g_idx = get("qweight"), get("qzeros"), get("scales"), get("g_idx")
    columns, rows = len(g_idx), qweight.shape[1]
    u = np.stack([fields(qweight[:, o], bits, columns) for o in range(rows)])
    z = np.stack([fields(row, bits, rows) for row in qzeros])
    z = z if v2 else (z + 1) % 2**bits
    scale = scales.astype(np.float32)[g_idx].T  # [out, in]
    return (u - z[g_idx].T).astype(np.float32) * scale


def decode_awq(t: Mapping[str, torch.Tensor], module: str, group: int) -> np.ndarray:
    """W [out, in] float32 of an AWQ module."""
    get = lambda name: t[f"{module}.{name}"].numpy()  # noqa: E731

    def unpack(words: np.ndarray) -> np.ndarray:
        out = np.zeros((words.shape[0], words.shape[1] * 8), dtype=np.int64)
        for nibble, column in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
            out[:, column::8] = (words.astype(np.int64) >> (4 * nibble)) & 15
        return out

    g = np.arange(get("qweight").shape[0]) // group
    whole = unpack(get("qweight")) - unpack(get("qzeros"))[g]
    return (whole.astype(np.float32) * get("scales").astype(np.float32)[g]).T


def decode_bitsandbytes(t: Mapping[str, torch.Tensor], module: str) -> np.ndarray:
    """W float32 of a bitsandbytes module of 4 bits."""
    name = next(n for n in t if n.startswith(f"{module}.weight.quant_state"))
    state = json.loads(bytes(t[name].tolist()))
    packed = t[f"{module}.weight"].numpy().flatten()
    codes = np.stack([packed >> 4, packed & 15], 1).flatten()[: np.prod(state["shape"])]
    absmax = t[f"{module}.weight.absmax"].numpy()
    if "nested_blocksize" in state:
        step = np.repeat(t[f"{module}.weight.nested_absmax"].numpy(), state["nested_blocksize"])
        inner = t[f"{module}.weight.nested_quant_map"].numpy()[absmax]
        absmax = inner * step[: len(absmax)] + np.float32(state["nested_offset"])
    each = np.repeat(absmax, state["blocksize"])[: len(codes)]
    return (t[f"{module}.weight.quant_map"].numpy()[codes] * each).reshape(state["shape"])


def decode_fp8(t: Mapping[str, torch.Tensor], module: str, size: int = 128) -> np.ndarray:
    """W float32 of an FP8 module with tiles, those at the edges cut short."""
    w, s = t[f"{module}.weight"].float().numpy(), t[f"{module}.weight_scale_inv"].numpy()
    i, j = (np.arange(n) // size for n in w.shape)
    return w * s[i][:, j]


def decode_ordered(t: Mapping[str, torch.Tensor], module: str, bits: int) -> np.ndarray:
    """W [out, in] float32 of a compressed-tensors module of packed integers with columns in any order."""
    get = lambda name: t[f"{module}.{name}"].numpy()  # noqa: E731
    rows, columns = get("weight_shape").tolist()
    u = np.stack([fields(row, bits, columns) for row in get("weight_packed")]).astype(np.int64)
    z = np.full(get("weight_scale").shape, 2 ** (bits - 1))
    if f"{module}.weight_zero_point" in t:
        z = np.stack([fields(column, bits, rows) for column in get("weight_zero_point").T], 1)
    g = np.arange(columns) // (columns // z.shape[1])
    g = get("weight_g_idx") if f"{module}.weight_g_idx" in t else g
    return (u - z[:, g]).astype(np.float32) * get("weight_scale").astype(np.float32)[:, g]
