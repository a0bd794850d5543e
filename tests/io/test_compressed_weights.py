"""compressed-tensors' weights: the words are the library's own bit for bit, its readers decode our values,
and what does not fit is refused in words.
"""

import re
from dataclasses import replace

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationScheme
from quantized import FORMATS, int_format

from fewbit.errors import InputError
from fewbit.format import (
    E8M0,
    FP16,
    FP32,
    Block2d,
    Channel,
    Flat,
    Format,
    Group,
    PerTensor,
    QTensor,
    Zero,
)
from fewbit.format.activation import Activation
from fewbit.grid import by_name
from fewbit.io import compressed_tensors as ct

from .compressed import E4M3, HELD, INT8, SHAPE, read_back, weight
from .layouts import entries_of


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
