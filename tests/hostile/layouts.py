"""Damage that only one layout can have: to its configuration and its tensors."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from hostile.mutations import HUGE, HUGER, Mutation, said, tensor

Q = "quantization_config"
NAN, INF = float("nan"), float("inf")


def _all(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def fill(t: torch.Tensor) -> torch.Tensor:
        if t.dtype == torch.float8_e4m3fn:  # which has no infinity
            return torch.full_like(t.view(torch.uint8), 0 if value == 0 else 127).view(t.dtype)
        return torch.full_like(t, value)

    return fill


def _parts(*names: str) -> Iterator[Mutation]:
    """Tensors of a weight that are missing, of another shape or dtype."""
    for name in names:
        yield Mutation(name=f"{name} missing", change=tensor(name, lambda t: None))
        yield Mutation(name=f"{name} longer", change=tensor(name, lambda t: torch.cat([t.reshape(-1)] * 2)))
        yield Mutation(name=f"{name} empty", change=tensor(name, lambda t: t.reshape(-1)[:0]))
        yield Mutation(name=f"{name} deep", change=tensor(name, lambda t: t[None, None]))
        yield Mutation(
            name=f"{name} double", change=tensor(name, lambda t: t.reshape(t.shape).to(torch.int64))
        )


def _steps(name: str) -> Iterator[Mutation]:
    for value in (NAN, INF, -INF, 0.0):
        yield Mutation(name=f"{name} all {value}", change=tensor(name, _all(value)), values=value == 0)


def _config(key: str, *values: object, values_ok: bool = False) -> Iterator[Mutation]:
    for value in values:
        yield Mutation(name=f"{key} = {value!r:.30}", change=said(Q, key, value=value), values=values_ok)


def _each_module(key: str, value: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        config = json.loads(path.read_text())
        module = next(iter(config[Q]["modules"].values()))
        module[key] = value
        path.write_text(json.dumps(config))

    return change


def _deep(folder: Path) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    fmt = config[Q]["formats"][0]
    for _ in range(200):
        fmt = {"type": "Format", "grid": "e4m3fn", "scale": fmt}
    config[Q]["formats"][0] = fmt
    path.write_text(json.dumps(config))


def native() -> Iterator[Mutation]:
    """fewbit's own."""
    yield from _config("version", 2, "x", None, 10**400)
    yield from _config("formats", [], "x", [5], ["int4"], [None], {}, [{"type": "Group", "size": 32}])
    yield from _config("modules", [], "x", {"x": {}}, {"x" * 10**6: {"format": 0, "shape": [2, 2]}})
    for key, values in {
        "grid": ("int9", 5, None, "qtip-mad-2b-l99", "learned-p64-b16-x8", "x" * 10**5, ["int4"], "q999.999"),
        "block": (
            {"type": "Group", "size": 0},
            {"type": "Group", "size": -5},
            {"type": "Group", "size": "x"},
            {"type": "Group", "size": 2.5},
            {"type": "Group", "size": HUGE},
            {"type": "Flat", "size": 10**400},
            {"type": "Tiles", "size": HUGER, "most": 0},
            {"type": "Format", "grid": "int4"},
            {"type": ["x"]},
            "Group",
            5,
        ),
        "range": ("x", {"type": "Format", "grid": "int4"}, {"type": "Percentile", "percent": "x"}),
        "zero": ("x", 5, ["none"]),
        "scale": ("x", {"type": "Group", "size": 32}, {"type": "Format", "grid": "int4", "scale": 5}),
        "codebook": (5, {"type": "Codebook"}),
        "type": ("x", 5, [], "Hadamard"),
        "no field": (1,),
    }.items():
        for value in values:
            change = said(Q, "formats", 0, key, value=value)
            yield Mutation(name=f"formats.{key} = {value!r:.50}", change=change, values=key == "range")
    for key, values in {
        "format": (HUGE, -1, "x", None, 1.5, True),
        "shape": (
            [HUGE, HUGE],
            [0, 64],
            [-64, 64],
            [64],
            "x",
            [64, "x"],
            [64.0, 64.0],
            [HUGER, HUGER],
            [1] * 99,
        ),
        "transposed": ("x", 5),
        "ordered": (True, "x"),
        "activation": (5, {"type": "Activation"}, {"type": "Group", "size": 5}, [1]),
        "online": (
            {"type": "Hadamard", "size": HUGE},
            {"type": "Hadamard", "size": "x"},
            {"type": "Kronecker", "size": 10**15},
        ),
        "output": (5, {"type": "Kronecker", "size": 63}),
        "apart": ({"type": "Apart", "columns": HUGE}, {"type": "Apart", "columns": -1}, 5),
    }.items():
        for value in values:
            yield Mutation(name=f"module.{key} = {value!r:.60}", change=_each_module(key, value))
    yield Mutation(name="format deep", change=_deep)
    sites = [{"module": "model.norm", "at": "input", "activation": 0, "columns": HUGE}]
    yield from _config("sites", sites, "x", [5], [{}])
    yield from _parts("_proj.codes", "_proj.scale")
    yield from _steps("_proj.scale")
    yield Mutation(name="codes all set", change=tensor("_proj.codes", _all(255)), values=True)


def gptq() -> Iterator[Mutation]:
    """GPTQ."""
    yield from _config("bits", HUGE, 0, -5, "x", None, [4] * 10**5, 8)
    yield from _config("group_size", HUGE, 0, -5, "x", None, {"a": 1}, values_ok=True)
    yield from _config("desc_act", True, "x")
    yield from _config("sym", True, False, "x", values_ok=True)
    yield from _config(
        "checkpoint_format", "x", 5, "marlin", ["gptq"], "x" * 10**5, "gptq_v2", values_ok=True
    )
    yield from _config("dynamic", "x", {"-:(.+)+x": {}}, 5)
    yield from _parts("qweight", "qzeros", "scales", "g_idx")
    yield from _steps("scales")
    for value in (-1, HUGE, 0):
        yield Mutation(name=f"g_idx all {value}", change=tensor("g_idx", _all(value)))


def awq() -> Iterator[Mutation]:
    """AWQ."""
    yield from _config("bits", HUGE, 0, -5, "x", None, [4] * 10**5, 8)
    yield from _config("group_size", HUGE, 0, -5, "x", None, {"a": 1}, 2.5)
    yield from _config("version", "x", 5, "gemv", ["gemm"], "x" * 10**5)
    yield from _config("zero_point", False, "x")
    yield from _parts("qweight", "qzeros", "scales")
    yield from _steps("scales")


def _state(**change: object) -> Callable[[Path], None]:
    def edit(t: torch.Tensor) -> torch.Tensor:
        state = json.loads(bytes(t.tolist())) | change
        return torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)

    return tensor("bitsandbytes__nf4", edit)


def _raw(raw: bytes) -> Callable[[Path], None]:
    return tensor("bitsandbytes__nf4", lambda t: torch.tensor(list(raw), dtype=torch.uint8))


def bitsandbytes() -> Iterator[Mutation]:
    """bitsandbytes, 4 bits doubly quantized."""
    for key, values in {
        "shape": ([HUGE, HUGE], [0, 64], [-64, -64], [64], "x", [64, "x"], [HUGER] * 2, [NAN, 1], None),
        "blocksize": (HUGE, 0, -5, "x", None, 10**400, 2.5, INF),
        "nested_blocksize": (HUGE, 0, "x"),
        "nested_offset": ("x", INF, NAN, 10**400, None, [1]),
        "dtype": ("x", 5),
        "quant_type": ("x", 5),
    }.items():
        for value in values:
            yield Mutation(name=f"state.{key} = {value!r:.30}", change=_state(**{key: value}))
    for raw in (b"{", b"[]", b"7", b"[" * 4000, b"\xff", b" " * 5000, b'{"a":' * 700):
        yield Mutation(name=f"state {raw[:10]!r}", change=_raw(raw))
    yield from _config("load_in_8bit", True, "x", [1], values_ok=True)
    yield from _parts(
        "weight.absmax", "nested_absmax", "weight.quant_map", "nested_quant_map", "bitsandbytes__nf4"
    )
    yield from _steps("nested_absmax")
    rename = {"rename": "model.layers.0.mlp.down_proj.weight.quant_state.bitsandbytes__x4"}
    yield Mutation(name="kind unknown", change=tensor("bitsandbytes__nf4", lambda t: t, **rename))


def bitsandbytes8() -> Iterator[Mutation]:
    """bitsandbytes, 8 bits."""
    yield from _config("llm_int8_threshold", "x", -1, NAN, INF, 10**400, None, [6.0], {}, values_ok=True)
    yield from _config("load_in_8bit", False, 0, "x")
    yield from _parts("SCB", "weight_format", "down_proj.weight")
    yield from _steps("SCB")
    yield Mutation(name="tiled", change=tensor("weight_format", _all(2)))


def fp8() -> Iterator[Mutation]:
    """Fine-grained FP8."""
    sizes = (
        [HUGE, HUGE],
        [0, 128],
        [-5, 128],
        "x",
        [128],
        [128, "x"],
        [2.5, 128],
        None,
        5,
        [64, 64],
        [HUGER] * 2,
    )
    yield from _config("weight_block_size", *sizes, values_ok=True)
    yield from _config("fmt", "x", 5, None, "e5m2")
    yield from _config("scale_fmt", "ue8m0", 5, "x" * 10**5)
    yield from _config("activation_scheme", "static", 5, [1], values_ok=True)
    yield from _parts("weight_scale_inv", "down_proj.weight")
    yield from _steps("weight_scale_inv")


def _group(*keys: str) -> tuple:
    return (Q, "config_groups", "group_0", *keys)


def _compressed(*parts: str) -> Iterator[Mutation]:
    yield from _config("config_groups", [], "x", {"a": 5}, {"a": {}}, {}, [1], {"a": {"weights": {}}})
    yield from _config("format", "x", 5, None, ["pack-quantized"])
    for key in ("kv_cache_scheme", "transform_config", "sparsity_config"):
        yield from _config(key, {"a": 1}, "x")
    for key, values in {
        "num_bits": (HUGE, 0, -5, "x", None, 2.5, [4] * 10**5, True),
        "group_size": (HUGE, 0, -5, "x", 2.5, [32], 10**400),
        "type": ("x", 5, None, {}),
        "strategy": ("x", 5, "block", "tensor_group", []),
        "symmetric": (False, "x", None),
        "block_structure": ([HUGE, HUGE], [0, 0], "x", [1, 2, 3]),
        "actorder": ("group", 5),
    }.items():
        for value in values:
            change = said(*_group("weights", key), value=value)
            yield Mutation(name=f"weights.{key} = {value!r:.30}", change=change, values=True)
    for key, values in {
        "targets": (
            "x",
            5,
            [5],
            ["re:(.+)+x"],
            ["re:(.*a)*(.*a)*x"],
            ["re:["],
            ["re:" + ".*" * 50 + "~"],
            [],
            None,
        ),
        "format": ("x", 5, {}),
        "input_activations": ("x", 5, {"num_bits": "x"}, {"num_bits": 8, "type": "x"}, {"dynamic": "local"}),
        "output_activations": ({"a": 1},),
        "weights": ("x", 5, None),
    }.items():
        for value in values:
            yield Mutation(name=f"group.{key} = {value!r:.40}", change=said(*_group(key), value=value))
    yield from _parts("weight_scale", *parts)
    yield from _steps("weight_scale")


def compressed_integers() -> Iterator[Mutation]:
    """compressed-tensors, packed integers with zeros."""
    yield from _compressed("weight_packed", "weight_zero_point", "weight_shape")
    for value in ([HUGE, HUGE], [0, 0], [-64, -64], [HUGER - 1, 2], [64, 1]):
        new = torch.tensor(value)
        yield Mutation(name=f"weight_shape {value}", change=tensor("weight_shape", lambda t, new=new: new))


def compressed_floats() -> Iterator[Mutation]:
    """compressed-tensors, FP8 with static inputs."""
    yield from _compressed("down_proj.weight", "input_scale")
    yield from _steps("input_scale")


def compressed_nvfp4() -> Iterator[Mutation]:
    """compressed-tensors, NVFP4."""
    yield from _compressed("weight_packed", "weight_global_scale")
    yield from _steps("weight_global_scale")
