"""compressed-tensors' ``kv_cache_scheme``: keys and values in 8 bits with fixed steps.

    self_attn.k_scale, self_attn.v_scale   float32 [1], or [heads, 1, 1] ("attn_head")       x ~ q s

for every attention of the model: the library and vLLM quantize all layers or none. vLLM reads E4M3 and no
int8. transformers rounds what it puts into its cache, and so also what a call attends to itself, where
fewbit's cache rounds earlier calls only.
"""

from __future__ import annotations

from collections.abc import Mapping

from fewbit.errors import InputError
from fewbit.format.block import Channel, PerTensor
from fewbit.format.format import Format, Zero
from fewbit.format.named import FP32
from fewbit.grid.integer import Int
from fewbit.io.compressed_args import E4M3
from fewbit.nn.kvcache import Along, KVFormat

KEY = "kv_cache_scheme"


def refusal(kv: KVFormat) -> str | None:
    """Why keys and values in ``kv`` cannot be held; None when they can."""
    plain = KVFormat(key=kv.key, value=kv.value, key_along=kv.key_along, value_along=kv.value_along)
    if kv != plain:
        return "all keys and values of all layers are quantized there, none are kept in float"
    fmt, along = kv.key, kv.key_along
    if (kv.value, kv.value_along) != (fmt, along) or fmt is None or not kv.static:
        return "keys and values have one kind of fixed steps there"
    per = {Along.CHANNELS: PerTensor(), Along.HEADS: Channel()}.get(along)
    if fmt.grid not in (E4M3, Int(8)) or fmt.block != per or fmt.zero is not Zero.NONE:
        return f"keys and values are E4M3 or int8 per tensor or head there, not {fmt}"
    return None


def caveats(kv: KVFormat | None, asymmetric: bool) -> list[str]:
    """What readers of a file do otherwise; asymmetric: a weight with float inputs has zeros."""
    if kv is None:
        return []
    out = ["vLLM reads keys and values in E4M3 and no int8"] if isinstance(kv.key.grid, Int) else []
    late = "transformers 5.23 decodes asymmetric weights as it loads, and leaves keys and values in float"
    return out + [late] * asymmetric


def to_config(kv: KVFormat) -> dict:
    """Its QuantizationArgs."""
    return {
        "num_bits": 8,
        "type": "int" if isinstance(kv.key.grid, Int) else "float",
        "symmetric": True,
        "strategy": "tensor" if kv.key_along is Along.CHANNELS else "attn_head",
        "dynamic": False,
    }


def from_config(config: Mapping) -> KVFormat | None:
    """How keys and values are stored; None without a scheme. Raises ``InputError`` for what is not read."""
    args = config.get(KEY)
    if not args:
        return None
    if not isinstance(args, Mapping):
        raise InputError(f"the {KEY} of this checkpoint is {args!r:.40} and no object; it is broken")
    kind = (args.get("num_bits", 8), args.get("type", "int"), args.get("symmetric", True))
    grid = {(8, "float", True): E4M3, (8, "int", True): Int(8)}.get(kind)
    along = {"tensor": Along.CHANNELS, "attn_head": Along.HEADS}.get(args.get("strategy") or "tensor")
    if grid is None or along is None or args.get("dynamic", False) is not False:
        dynamic = args.get("dynamic", False)
        raise InputError(
            f"this compressed-tensors checkpoint has a {KEY} of {kind[0]!r:.20}-bit {kind[1]!s:.20} per "
            f"{args.get('strategy')!s:.20} (symmetric {kind[2]!s:.20}, dynamic {dynamic!s:.20}), which is "
            "not read; E4M3 and symmetric int8 with fixed steps per tensor or head are"
        )
    fmt = Format(grid=grid, block=PerTensor() if along is Along.CHANNELS else Channel(), scale=FP32)
    return KVFormat(key=fmt, value=fmt, key_along=along, value_along=along)
