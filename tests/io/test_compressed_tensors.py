"""compressed-tensors: the words are the library's own bit for bit, its readers decode our values, and what
does not fit is refused in words.
"""

import json
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme, QuantizationStatus
from compressed_tensors.quantization.lifecycle.forward import forward_quantize
from quantized import FORMATS, int_format, save_quantized
from tiny import tiny_ids

from fewbit.errors import InputError
from fewbit.format import (
    BF16,
    E8M0,
    FP16,
    FP32,
    Block2d,
    Channel,
    Divisor,
    Flat,
    Format,
    Group,
    MinMax,
    Percentile,
    PerTensor,
    QTensor,
    Token,
    Zero,
    format_by_name,
)
from fewbit.format.activation import Activation
from fewbit.grid import Int, by_name
from fewbit.io import compressed_tensors as ct

from .layouts import entries_of

SHAPE = (64, 96)
E4M3 = by_name("e4m3fn")
HELD = (
    *(
        int_format(b, asymmetric=a, block=k)
        for b in range(1, 9)
        for a in (False, True)
        for k in (Group(32), Channel())
    ),
    *(int_format(4, asymmetric=True, scale=s) for s in (FP16, BF16)),
    int_format(4, divisor=Divisor.FULL, scale=FP16),
    Format(grid=Int(4, narrow=True), block=Group(32), scale=FP16),
    Format(grid=by_name("uint4"), block=Group(32), zero=Zero.INTEGER, range=MinMax(), scale=FP16),
    *(Format(grid=E4M3, block=k, scale=FP32) for k in (PerTensor(), Channel(), Block2d(32, 48))),
    Format(grid=E4M3, block=Channel(), scale=BF16),
    *(format_by_name(name) for name in ("nvfp4", "mxfp4", "mxfp6-e2m3", "mxfp8-e4m3")),
)
TOKEN, TENSOR = ({"block": block, "scale": FP32} for block in (Token(), PerTensor()))
# Weights with inputs: W8A8 in int8 and FP8, dynamic and static, and MX formats.
WITH_INPUTS = (
    *(
        (int_format(8, block=b, asymmetric=z), Activation(format=Format(grid=Int(8), **x), static=s))
        for b, z, x, s in (
            (Channel(), False, TOKEN, False),
            (Channel(), True, TOKEN, False),
            (PerTensor(), False, TENSOR, False),
            (PerTensor(), True, TENSOR, True),
        )
    ),
    *(  # W4A8: fewer bits for the weights than for inputs
        (int_format(b, block=k, asymmetric=z), Activation(format=int_format(8, block=Token(), asymmetric=y)))
        for b, k, z, y in (
            (4, Group(32), False, False),
            (4, Channel(), False, True),
            (4, Group(32), True, False),
            (3, Group(32), False, False),
            (8, Channel(), False, True),
        )
    ),
    *(
        (Format(grid=E4M3, block=b, scale=FP32), Activation(format=Format(grid=E4M3, **x), static=s))
        for b, x, s in (
            (Channel(), TOKEN, False),
            (PerTensor(), TENSOR, True),
            (Block2d(32, 48), {"block": Group(48), "scale": FP32}, False),
        )
    ),
    *((format_by_name(name), Activation(format=format_by_name(name))) for name in ("mxfp4", "mxfp8-e4m3")),
)


def weight(shape=SHAPE, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def read_back(fmt: Format, shape=SHAPE):
    """A weight through ``to_dict``, the configuration as JSON, and back."""
    q = fmt.quantize(weight(shape))
    stored = ct.to_dict("m", q)
    config = json.loads(json.dumps(ct.quantization_config({"m": fmt}, [])))
    read = ct.formats_from_config(config, {"m": stored["m.weight_scale"].dtype})["m"]
    assert sorted(ct.names("m", read, shape)) == sorted(stored)
    return q, ct.from_dict("m", stored, read, shape)


# -- the words --


@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_and_zeros_are_packed_as_the_library_packs_them(bits):
    for out, columns in ((64, 96), (7, 33), (5, 128)):
        fmt = int_format(bits, block=Channel(), asymmetric=True)
        q = fmt.quantize(weight((out, columns)))
        stored = ct.to_dict("m", q)
        assert torch.equal(stored["m.weight_packed"], pack_to_int32(q.codes, bits))
        assert torch.equal(stored["m.weight_zero_point"], pack_to_int32(q.zero, bits, packed_dim=0))
        assert torch.equal(
            unpack_from_int32(stored["m.weight_packed"], bits, torch.Size((out, columns))), q.codes
        )
        assert all(t.is_contiguous() for t in stored.values())


def test_the_words_of_all_codes_include_negative_ones():
    fmt = int_format(4, block=Channel())
    q = replace(fmt.quantize(weight((1, 16))), codes=torch.arange(-8, 8, dtype=torch.int8)[None])
    assert ct.to_dict("m", q)["m.weight_packed"].tolist() == [[0x76543210, 0xFEDCBA98 - 2**32]]


@pytest.mark.parametrize("fmt", HELD, ids=str)
def test_the_library_s_decompressor_gives_our_values(fmt):
    q = fmt.quantize(weight())
    local = {name.removeprefix("m."): t for name, t in ct.to_dict("m", q).items()}
    group = ct.quantization_config({"m": fmt}, [])["config_groups"]["group_0"]
    scheme = QuantizationScheme.model_validate(group)
    decoded = BaseCompressor.get_value_from_registry(group["format"]).decompress(local, scheme)["weight"]
    # The library decodes 4 and 6 bits in bfloat16, their steps first; ours are rounded once.
    rounded = decoded.dtype == torch.bfloat16 and isinstance(q.scale, QTensor)
    torch.testing.assert_close(
        decoded.float(), q.dequantize(decoded.dtype).float(), rtol=1e-2 if rounded else 0, atol=0
    )


@pytest.mark.parametrize(("fmt", "activation"), WITH_INPUTS, ids=str)
def test_weights_with_quantized_inputs_come_back_and_the_library_decodes_them(fmt, activation):
    assert ct.refusal(fmt, activation=activation) is None
    q = fmt.quantize(weight())
    stored = ct.to_dict("m", q, activation)
    config = json.loads(json.dumps(ct.quantization_config({"m": fmt}, [], {"m": activation})))
    assert "dequantize" not in config  # its readers would drop the inputs' rounding
    static = {"m.input_scale": torch.ones(1)} if activation.static else {}
    entry = entries_of(ct, config, stored | static)["m"]
    assert sorted(ct.names("m", *entry.stored, activation=activation)) == sorted(stored)
    back = ct.from_dict("m", stored, *entry.stored)
    assert torch.equal(back.codes, q.codes)
    assert torch.equal(back.dequantize(), q.dequantize())
    own, read = activation.format, entry.activation.format
    assert (read.grid.bits, read.block, read.scale) == (own.grid.bits, own.block, own.scale)
    assert read.zero == own.zero
    assert entry.activation.static == activation.static
    scheme = QuantizationConfig.model_validate(config).config_groups["group_0"]
    local = {name.removeprefix("m."): t for name, t in stored.items()}
    codec = BaseCompressor.get_value_from_registry(str(scheme.format))
    decoded = codec.decompress(local, scheme)["weight"]
    torch.testing.assert_close(decoded.float(), q.dequantize(), rtol=1e-2, atol=0)
    assert scheme.input_activations.num_bits == own.grid.bits
    assert scheme.input_activations.dynamic == (not activation.static)


def test_w4a8_is_what_the_library_infers_and_is_read_packed_as_well():
    """Its own choice is int-quantized; files that say pack-quantized hold the words of W4A16."""
    fmt, activation = int_format(4), Activation(format=INT8)
    config = ct.quantization_config({"m": fmt}, [], {"m": activation})
    group = config["config_groups"]["group_0"]
    scheme = QuantizationScheme.model_validate(group)
    assert infer_module_format(torch.nn.Linear, scheme).value == group["format"] == config["format"]
    q = fmt.quantize(weight())
    config["config_groups"]["group_0"]["format"] = config["format"] = "pack-quantized"
    stored = ct.to_dict("m", q)
    entry = entries_of(ct, config, stored)["m"]
    assert sorted(ct.names("m", *entry.stored, activation=entry.activation, packed=True)) == sorted(stored)
    assert torch.equal(ct.from_dict("m", stored, *entry.stored).codes, q.codes)


def test_local_steps_of_nvfp4_inputs_are_those_of_the_library():
    """One stored step for the tensor, one per 16 of every call in its units: the values agree."""
    nvfp4 = format_by_name("nvfp4")
    activation = Activation(format=nvfp4, static=True)
    x = weight((96, 64), seed=1) * weight((96, 1), seed=2)
    params = activation.fit(x, x.amin(0), x.amax(0))
    config = json.loads(json.dumps(ct.quantization_config({"m": nvfp4}, [], {"m": activation})))
    stored = ct.to_dict("m", nvfp4.quantize(weight()), activation)
    stored |= ct.input_to_dict("m", activation, params)
    assert entries_of(ct, config, stored)["m"].activation == activation
    scheme = QuantizationConfig.model_validate(config).config_groups["group_0"]
    assert scheme.input_activations.dynamic == "local"
    module = torch.nn.Linear(64, 8)
    module.quantization_status = QuantizationStatus.COMPRESSED
    module.input_global_scale = torch.nn.Parameter(stored["m.input_global_scale"], requires_grad=False)
    other = torch.cat([x[:7], 3 * x[:7], torch.zeros(1, 64)])[None]  # beyond what was calibrated: saturates
    want = forward_quantize(module, other, "input", scheme.input_activations)
    torch.testing.assert_close(activation(other, params), want, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(activation(other, params), Activation(format=nvfp4)(other), rtol=1e-3)


def test_bytes_that_do_not_fit_into_the_bits_of_a_weight_are_refused():
    fmt, activation = int_format(4), Activation(format=INT8)
    stored = ct.to_dict("m", fmt.quantize(weight()), activation)
    stored["m.weight"][3, 5] = 8
    with pytest.raises(InputError, match=r"m.weight holds numbers of more than 4 bits"):
        ct.from_dict("m", stored, fmt, SHAPE)


def test_tiles_cut_short_at_the_edges_are_read_with_every_value():
    w, fmt = weight((192, 320)), Format(grid=E4M3, block=Block2d(128, 128), scale=FP32)
    scale = torch.rand(2, 3) + 0.5
    stored = {"m.weight": w.to(torch.float8_e4m3fn), "m.weight_scale": scale}
    entry = entries_of(ct, ct.quantization_config({"m": fmt}, []), stored)["m"]
    assert entry.format.block == Block2d(64, 64)
    i, j = torch.arange(192) // 128, torch.arange(320) // 128
    want = stored["m.weight"].float() * scale[i][:, j]
    assert torch.equal(ct.from_dict("m", stored, *entry.stored).dequantize(), want)


INT8 = Format(grid=Int(8), **TOKEN)
ROWS = int_format(8, block=Channel())


@pytest.mark.parametrize(
    ("fmt", "activation", "words"),
    [
        (ROWS, {"format": INT8, "outliers": 6.0}, "outliers"),
        (int_format(4, block=PerTensor()), {"format": INT8}, "per group or channel"),
        (int_format(4), {"format": replace(INT8, grid=Int(4))}, "int4 with inputs in int4"),
        (int_format(8), {"format": INT8}, "per channel or tensor"),
        (ROWS, {"format": Format(grid=E4M3, **TOKEN)}, "inputs in e4m3fn"),
        (ROWS, {"format": replace(INT8, range=Percentile())}, "largest magnitude there, not Percentile"),
        (
            Format(grid=E4M3, block=Channel(), scale=FP32),
            {"format": Format(grid=E4M3, **TENSOR, zero=Zero.OFFSET), "static": True},
            "static inputs have one step, and integers one integer zero",
        ),
        (format_by_name("nvfp4"), {"format": format_by_name("nvfp4")}, "one stored step per tensor"),
        (format_by_name("mxfp4"), {"format": format_by_name("mxfp8-e4m3")}, "same MX format"),
        (format_by_name("mxfp4"), {"format": format_by_name("mxfp4-ceil")}, "OCP's own rule"),
    ],
)
def test_inputs_that_do_not_fit_are_refused_in_words(fmt, activation, words):
    assert words in ct.refusal(fmt, activation=Activation(**activation))


# -- what is held --


@pytest.mark.parametrize("fmt", HELD, ids=str)
def test_what_is_held_comes_back_by_value(fmt):
    assert ct.refusal(fmt) is None
    q, back = read_back(fmt)
    assert torch.equal(back.dequantize(), q.dequantize())
    assert back.bits_per_weight == q.bits_per_weight
    assert back.format.grid.bits == fmt.grid.bits
    assert (back.format.block, back.format.scale) == (fmt.block, fmt.scale)


def test_every_format_is_either_held_or_refused_with_a_reason():
    held = 0
    for fmt in FORMATS:
        reason = ct.refusal(fmt)
        if reason is None:
            q, back = read_back(fmt)
            assert torch.equal(back.dequantize(), q.dequantize())
            held += 1
        else:
            assert len(reason.split()) > 5
            with pytest.raises(InputError, match=re.escape(reason)):
                ct.to_dict("m", fmt.quantize(weight()))
    assert 20 <= held < len(FORMATS)


@pytest.mark.parametrize(
    ("fmt", "kind", "words"),
    [
        (int_format(4), "Conv1D", "Linear modules only, and this is a Conv1D"),
        (Format(grid=by_name("bf16")), "Linear", "without scales"),
        (int_format(4, scale=E8M0), "Linear", "scales are float32, float16 or bfloat16"),
        (Format(grid=by_name("nf4"), block=Group(32), scale=FP16), "Linear", "not nf4"),
        (Format(grid=by_name("e2m1"), block=Group(16), scale=E8M0), "Linear", "MXFP4"),
        (Format(grid=by_name("e3m2"), block=Group(32), scale=E8M0), "Linear", "MXFP6 (E2M3)"),
        (Format(grid=by_name("e5m2"), block=Channel(), scale=FP32), "Linear", "not e5m2"),
        (int_format(4, block=Flat(64)), "Linear", "per group or channel"),
        (int_format(4, block=PerTensor()), "Linear", "per group or channel"),
        (int_format(4, zero=Zero.FLOAT), "Linear", "not a float zero"),
        (int_format(4, zero=Zero.OFFSET), "Linear", "not a offset zero"),
        (Format(grid=by_name("uint4"), block=Group(32), scale=FP16), "Linear", "unsigned"),
        (Format(grid=E4M3, block=Group(32), scale=FP32), "Linear", "FP8 weights have one scale per tensor"),
        (Format(grid=E4M3, block=Channel(), scale=FP32, zero=Zero.OFFSET), "Linear", "no zero point"),
    ],
)
def test_what_does_not_fit_is_refused_in_words(fmt, kind, words):
    assert words in ct.refusal(fmt, kind)


# -- the configuration --


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


def test_the_padded_words_of_older_versions_are_refused_not_misread():
    fmt = int_format(3, block=Channel())
    stored = ct.to_dict("m", fmt.quantize(weight((4, 64))))
    assert stored["m.weight_packed"].shape == (4, 6)
    padded = stored | {"m.weight_packed": torch.zeros(4, 7, dtype=torch.int32)}
    with pytest.raises(InputError, match=r"7 words instead of 6.*before 0\.18"):
        ct.from_dict("m", padded, fmt, (4, 64))


def test_tensors_that_do_not_belong_are_refused():
    fmt = int_format(4, asymmetric=True)
    stored = ct.to_dict("m", fmt.quantize(weight()))
    for name in ("weight_packed", "weight_scale", "weight_zero_point"):
        with pytest.raises(InputError, match=f"no tensor m.{name}"):
            ct.from_dict("m", {k: v for k, v in stored.items() if k != f"m.{name}"}, fmt, SHAPE)
    with pytest.raises(InputError, match=r"weight_scale has shape \[64, 3\].* \[64, 6\]"):
        ct.from_dict("m", stored, replace(fmt, block=Group(16)), SHAPE)


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


# -- plain transformers --

READER = """
import sys, torch
from transformers import AutoModelForCausalLM
ids = torch.load(sys.argv[1])
for folder in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        torch.save((model(ids).logits, model.dtype), folder + "/logits.pt")
assert "fewbit" not in sys.modules
"""


def mixed(name: str) -> Format:
    """Another scheme for each projection, dense odd widths among them; all symmetric (see ``caveats``)."""
    kinds = {
        "q_proj": int_format(3, scale=FP16),
        "k_proj": int_format(5, block=Channel(), scale=FP16),
        "v_proj": int_format(8, block=Channel(), scale=FP16),
        "o_proj": Format(grid=E4M3, block=Channel(), scale=FP16),
        "gate_proj": Format(grid=E4M3, block=PerTensor(), scale=FP32),
        "up_proj": Format(grid=E4M3, block=Block2d(32, 32), scale=FP32),
        "down_proj": int_format(1, scale=FP32),
    }
    return kinds[name.rpartition(".")[2]]


def test_a_tiny_llama_loads_in_plain_transformers_with_our_values(tmp_path):
    cases = {
        "symmetric": (int_format(4, scale=FP16), torch.float32),
        "asymmetric": (int_format(3, block=Channel(), asymmetric=True), torch.float32),
        "bf16": (int_format(4, asymmetric=True, scale=BF16), torch.bfloat16),
        "fp8": (Format(grid=E4M3, block=Channel(), scale=BF16), torch.bfloat16),
        "mixed": (mixed, torch.float32),
    }
    ids, want = tiny_ids(), {}
    for name, (formats, dtype) in cases.items():
        model = save_quantized("llama", tmp_path / name, formats, layout=ct, dtype=dtype)
        with torch.no_grad():
            want[name] = model(ids).logits
    torch.save(ids, tmp_path / "ids.pt")
    folders = [str(tmp_path / name) for name in cases]
    done = subprocess.run(
        [sys.executable, "-c", READER, str(tmp_path / "ids.pt"), *folders], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for name, (_, dtype) in cases.items():
        got, used = torch.load(tmp_path / name / "logits.pt")
        assert used == dtype
        assert torch.equal(got, want[name]), f"{name}: {(got - want[name]).abs().max()}"
