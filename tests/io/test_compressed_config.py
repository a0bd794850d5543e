"""compressed-tensors in config.json: written as the library validates it, read as other tools write it; what
readers would change is named.
"""

import json

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig
from quantized import int_format

from fewbit.errors import InputError
from fewbit.format import (
    FP16,
    FP32,
    Block2d,
    Channel,
    Divisor,
    Format,
    Group,
    Zero,
    format_by_name,
)
from fewbit.grid import Int
from fewbit.io import compressed_tensors as ct

from .compressed import E4M3, HELD


def test_one_scheme_targets_all_linears_and_several_name_their_modules():
    one = ct.quantization_config({"a": int_format(4), "b": int_format(4)}, ["lm_head"])
    assert [g["targets"] for g in one["config_groups"].values()] == [["Linear"]]
    assert (one["format"], one["ignore"]) == ("pack-quantized", ["lm_head"])
    formats = {"a": int_format(4), "b": int_format(8), "c": Format(grid=E4M3, block=Channel(), scale=FP32)}
    mixed = ct.quantization_config(formats | {"d": int_format(4, divisor=Divisor.FULL)}, ["lm_head"])
    assert [g["targets"] for g in mixed["config_groups"].values()] == [["a", "d"], ["b"], ["c"]]
    assert mixed["format"] == "mixed-precision"
    assert [g["format"] for g in mixed["config_groups"].values()] == ["pack-quantized"] * 2 + [
        "naive-quantized"
    ]
    read = ct.formats_from_config(json.loads(json.dumps(mixed)), dict.fromkeys("abcd", torch.float32))
    assert {m: (f.grid, f.block) for m, f in read.items()} == {
        "a": (Int(4), Group(32)),
        "b": (Int(8), Group(32)),
        "c": (E4M3, Channel()),
        "d": (Int(4), Group(32)),
    }


def test_packed_zero_points_ask_transformers_to_decode_while_loading():
    assert ct.quantization_config({"m": int_format(4, asymmetric=True)}, [])["dequantize"] is True
    assert "dequantize" not in ct.quantization_config({"m": int_format(4)}, [])


def test_the_library_accepts_every_configuration():
    for fmt in HELD:
        config = QuantizationConfig.model_validate(ct.quantization_config({"m": fmt}, ["lm_head"]))
        weights = config.config_groups["group_0"].weights
        assert (weights.num_bits, weights.symmetric) == (fmt.grid.bits, fmt.zero is Zero.NONE)


def test_configurations_of_other_tools_are_read():
    """Presets as llm-compressor writes them: regex targets, FP8 as float-quantized, a channel as group -1."""
    scheme = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128}
    fp8 = {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128]}
    config = {
        "format": "pack-quantized",
        "config_groups": {
            "group_0": {
                "targets": ["re:.*q_proj$"],
                "weights": scheme | {"strategy": None, "group_size": -1},
            },
            "group_1": {"targets": ["model.v_proj"], "weights": fp8, "format": "float-quantized"},
            "group_2": {
                "targets": ["Linear"],
                "weights": scheme | {"symmetric": False, "actorder": "static"},
            },
        },
    }
    modules = {"model.q_proj": torch.bfloat16, "model.v_proj": torch.float32, "model.o_proj": torch.float16}
    read = ct.formats_from_config(config, modules)
    assert [(f.grid.name, f.block, f.zero, f.scale.grid.name) for f in read.values()] == [
        ("int4", Channel(), Zero.NONE, "bf16"),
        ("e4m3fn", Block2d(128, 128), Zero.NONE, "fp32"),
        ("int4", Group(128), Zero.INTEGER, "fp16"),
    ]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sparsity_config": {"format": "sparse-24"}}, "sparsity_config"),
        (
            {"input_activations": {"num_bits": 4, "dynamic": True, "strategy": "token"}},
            "int4 with inputs in int4",
        ),
        (
            {"input_activations": {"num_bits": 4, "type": "float", "dynamic": "local"}},
            "their words are not known",
        ),
        ({"output_activations": {"num_bits": 8}}, "quantizes outputs"),
        ({"weights": None}, "describes no weights"),
        ({"weights": {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 16}}, "4-bit float"),
        (
            {
                "format": "int-quantized",
                "weights": {"num_bits": 4, "strategy": "group", "group_size": 32, "actorder": "group"},
            },
            r"actorder group\), which is not read",
        ),
        ({"format": "marlin-24"}, "as marlin-24"),
        ({"targets": ["other"]}, "no config group names"),
    ],
)
def test_what_is_not_read_is_refused_in_words(change, words):
    config = ct.quantization_config({"m": int_format(4)}, [])
    group = config["config_groups"]["group_0"]
    for key, value in change.items():
        (group if key in group else config)[key] = value
    with pytest.raises(InputError, match=words):
        ct.formats_from_config(config, {"m": torch.float32})


def test_readers_that_would_change_something_are_named():
    def said(formats, dtype=torch.float16):
        return " ".join(ct.caveats(formats, dtype))

    four = int_format(4, scale=FP16)
    assert said({"m": four}) == ""
    assert said({"m": four}, torch.float32) == ""  # widening is exact
    assert "round the float16 scales to the model's bfloat16" in said({"m": four}, torch.bfloat16)
    assert "float32 scales" in said({"m": int_format(4)})
    asymmetric = int_format(4, asymmetric=True, scale=FP16)
    assert said({"m": asymmetric}) == ""
    assert "to the dtype of their scales" in said({"m": asymmetric}, torch.float32)
    assert "several formats when one of them is asymmetric" in said({"m": asymmetric, "n": four})
    fp8 = Format(grid=E4M3, block=Channel(), scale=FP32)  # vLLM keeps these scales in float32
    assert (
        said({"m": fp8})
        == "transformers rounds the float32 scales to the model's float16; use float16 scales"
    )
    assert "fails in a model of float16" in said({"m": format_by_name("mxfp4")})
    assert said({"m": format_by_name("nvfp4")}, torch.bfloat16) == ""
    assert "2 to 8 bits" in said({"m": int_format(1, scale=FP16)})
    assert "128 x 128" in said({"m": Format(grid=E4M3, block=Block2d(64, 64), scale=FP16)})
    assert "128" not in said({"m": Format(grid=E4M3, block=Block2d(128, 128), scale=FP16)})
    qkv = {f"l.{p}_proj": four for p in "qkv"}
    assert said(qkv) == ""
    assert "q_proj, k_proj, v_proj of l" in said(qkv | {"l.v_proj": int_format(8, scale=FP16)})
    assert "gate_proj, up_proj of l" in said({"l.gate_proj": four})
