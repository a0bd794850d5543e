"""AWQ, bitsandbytes and FP8 files: decoded by the specifications, back code for code, damage in words."""

import json
import math
from dataclasses import replace

import pytest
import torch
from quantized import int_format

from fewbit.errors import InputError
from fewbit.format import (
    BF16,
    DOUBLE_QUANT,
    FP16,
    FP32,
    Block2d,
    Channel,
    Divisor,
    Flat,
    Format,
    Group,
    PerTensor,
    Token,
)
from fewbit.format.activation import Activation
from fewbit.grid import Int, by_name
from fewbit.io import awq, bitsandbytes, fp8
from fewbit.io.native import Entry

from .layouts import decode_awq, decode_bitsandbytes, decode_fp8, entries_of

SHAPE = (64, 96)
E4M3 = by_name("e4m3fn")


def weight(shape=SHAPE, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def config_of(codec, fmt, activation=None) -> dict:
    entry = Entry(format=codec.stored_format(fmt), shape=SHAPE, activation=activation)
    return codec.quantization_config({"m": entry}, ["lm_head"])


def there_and_back(codec, q, activation=None):
    """(what a file holds, what is read of it, the entry)."""
    stored = codec.to_dict("m", q)
    entry = entries_of(codec, config_of(codec, q.format, activation), stored)["m"]
    assert entry.shape == tuple(q.shape)
    assert set(codec.names("m", *entry.stored)) == set(stored) - {"m.weight_format"}
    assert all(t.is_contiguous() for t in stored.values())
    return stored, codec.from_dict("m", stored, *entry.stored), entry


# -- AWQ --


@pytest.mark.parametrize("block", [Group(32), Channel()], ids=str)
@pytest.mark.parametrize("asymmetric", [False, True])
def test_awq_words_decode_by_the_specification_and_come_back(asymmetric, block):
    q = int_format(4, block=block, asymmetric=asymmetric, scale=FP16).quantize(weight())
    stored, back, _ = there_and_back(awq, q)
    assert torch.equal(torch.from_numpy(decode_awq(stored, "m", getattr(block, "size", 96))), q.dequantize())
    assert torch.equal(back.codes, q.codes)
    assert torch.equal(back.scale, q.scale)
    assert torch.equal(back.zero, torch.zeros_like(back.zero) if q.zero is None else q.zero)


def test_a_word_of_awq_holds_its_rows_interleaved():
    q = int_format(4, block=Channel(), scale=FP16).quantize(weight((8, 1)))
    q = replace(q, codes=torch.arange(-8, 0, dtype=torch.int8)[:, None])
    assert awq.to_dict("m", q)["m.qweight"].tolist() == [[0x75316420]]


def test_other_versions_and_shapes_of_awq_are_refused():
    q = int_format(4, asymmetric=True, scale=FP16).quantize(weight())
    stored, config = awq.to_dict("m", q), config_of(awq, q.format)
    for change, words in (
        ({"version": "gemv"}, "'gemv'"),
        ({"bits": 3}, "3 bits"),
        ({"group_size": 64}, "groups of 64"),
        ({"group_size": -1}, "groups of -1"),
    ):
        with pytest.raises(InputError, match=words):
            entries_of(awq, config | change, stored)
    for name, tensor, words in (
        ("m.qzeros", torch.zeros(3, 7, dtype=torch.int32), "fit no AWQ layout"),
        ("m.qweight", torch.zeros(95, 8, dtype=torch.int32), "fit no AWQ layout"),
        ("m.scales", torch.ones(3, 64, dtype=torch.uint8), "m.scales is uint8"),
    ):
        with pytest.raises(InputError, match=words):
            entries_of(awq, config, stored | {name: tensor})
    assert "integers of 4 bits, not int3" in awq.holds(int_format(3, scale=FP16))
    assert "8 rows into a word" in awq.holds(int_format(4, scale=FP16), (60, 96))
    own = entries_of(awq, {"quant_method": "awq", "w_bit": 4, "q_group_size": 32, "version": "GEMM"}, stored)
    assert own["m"].format.block == Group(32)  # AutoAWQ's own names


# -- bitsandbytes --


@pytest.mark.parametrize("shape", [SHAPE, (7, 11)], ids=str)  # an odd number of codes; blocks across rows
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4-bnb"])
def test_bitsandbytes_bytes_decode_by_the_specification_and_come_back(kind, double, shape):
    fmt = Format(grid=by_name(kind), block=Flat(64), scale=DOUBLE_QUANT if double else FP32)
    q = fmt.quantize(weight(shape))
    stored, back, entry = there_and_back(bitsandbytes, q)
    assert stored["m.weight"].shape == (math.ceil(math.prod(shape) / 2), 1)
    decoded = torch.from_numpy(decode_bitsandbytes(stored, "m"))
    torch.testing.assert_close(decoded, q.dequantize(), rtol=1e-6, atol=0)
    assert entry.format == fmt
    assert torch.equal(back.codes, q.codes)
    assert torch.equal(back.dequantize(), q.dequantize())
    if double:
        assert torch.equal(back.scale.codes, q.scale.codes)
        assert torch.equal(back.scale.zero, q.scale.zero)


@pytest.mark.parametrize("scale", [FP32, DOUBLE_QUANT], ids=str)
def test_groups_that_divide_rows_are_blocks_in_memory_order(scale):
    q = Format(grid=by_name("nf4"), block=Group(32), scale=scale).quantize(weight())
    _, back, _ = there_and_back(bitsandbytes, q)
    assert back.format.block == Flat(32)
    assert torch.equal(back.codes, q.codes)
    assert torch.equal(back.dequantize(), q.dequantize())


@pytest.mark.parametrize("scale", [FP16, BF16], ids=str)
def test_rows_of_llm_int8_come_back_with_every_step(scale):
    q = Format(grid=Int(8), block=Channel(), scale=scale).quantize(weight())
    stored, back, entry = there_and_back(bitsandbytes, q)
    assert torch.equal(back.codes, q.codes)
    assert torch.equal(back.scale, q.scale.float())
    assert torch.equal(stored["m.SCB"] / 127, q.scale.float().flatten())
    # What the engine computes: int8 per token, columns that reach 6 in float.
    assert entry.activation.outliers == 6.0
    assert entry.activation.format.block == Token()


def test_float32_steps_that_are_no_multiple_of_1_over_127_are_refused():
    edge = Format(grid=Int(8), block=Channel(), scale=FP32)
    bitsandbytes.to_dict("m", edge.quantize(weight((4096, 4))))  # max / 127 always is one
    q = replace(edge, divisor=Divisor.FULL).quantize(weight((4096, 4)))
    with pytest.raises(InputError, match=r"of 4096 float32 steps of m .*bf16 or fp16"):
        bitsandbytes.to_dict("m", q)


def test_what_bitsandbytes_does_not_hold_is_refused_in_words():
    nf4 = by_name("nf4")
    for fmt, words in (
        (Format(grid=nf4, block=Channel(), scale=FP32), "memory order"),
        (Format(grid=nf4, block=Flat(48), scale=FP32), "memory order"),
        (Format(grid=by_name("af4"), block=Flat(64), scale=FP32), "not af4"),
        (int_format(4), "not int4"),
        (int_format(8), "one symmetric step per row"),
        (Format(grid=nf4, block=Flat(64), scale=Format(grid=by_name("e8m0"))), "float32 or doubly"),
    ):
        assert words in bitsandbytes.holds(fmt)
    other = Activation(format=Format(grid=E4M3, block=Token(), scale=FP32))
    rows = Format(grid=Int(8), block=Channel(), scale=FP16)
    assert "int8 per token" in bitsandbytes.holds(rows, activation=other)


def test_broken_states_and_tables_of_bitsandbytes_are_refused():
    fmt = Format(grid=by_name("nf4"), block=Flat(64), scale=DOUBLE_QUANT)
    stored, config = bitsandbytes.to_dict("m", fmt.quantize(weight())), config_of(bitsandbytes, fmt)
    name = "m.weight.quant_state.bitsandbytes__nf4"
    state = json.loads(bytes(stored[name].tolist()))

    def raw(data: bytes) -> torch.Tensor:
        return torch.tensor(list(data), dtype=torch.uint8)

    for data, words in (
        (b"{", "no state that bitsandbytes writes"),
        (b"\xff\xfe", "no state"),
        (b"[]", "no state"),
        (json.dumps(state | {"shape": [64, 96, 1]}).encode(), "no matrix"),
        (json.dumps(state | {"shape": [-1, 96]}).encode(), "no matrix"),
        (json.dumps(state | {"blocksize": 3}).encode(), "no matrix"),
        (json.dumps(state | {"nested_offset": math.inf}).encode(), "finite offset"),
        (b" " * 5000, "longer than 4096"),
    ):
        with pytest.raises(InputError, match=words):
            entries_of(bitsandbytes, config, stored | {name: raw(data)})
    entry = entries_of(bitsandbytes, config, stored)["m"]
    for part, tensor, words in (
        ("m.weight", stored["m.weight"][:-1], "3071 bytes instead of 3072"),
        ("m.weight.quant_map", stored["m.weight.quant_map"] * 2, "not nf4's"),
        ("m.weight.nested_quant_map", stored["m.weight.nested_quant_map"].neg(), "not dynamic8's"),
        ("m.weight.absmax", stored["m.weight.absmax"][1:], "m.weight.absmax is uint8 of shape"),
    ):
        with pytest.raises(InputError, match=words):
            bitsandbytes.from_dict("m", stored | {part: tensor}, *entry.stored)
    with pytest.raises(InputError, match="no quantized tensor"):
        entries_of(bitsandbytes, config, {"m.weight": stored["m.weight"]})


# -- FP8 --


@pytest.mark.parametrize("shape", [(256, 128), (192, 320), (64, 96)], ids=str)
def test_fp8_tiles_cut_short_at_the_edges_keep_every_value(shape):
    q = fp8.quantize(weight(shape))
    stored, back, entry = there_and_back(fp8, q)
    assert stored["m.weight_scale_inv"].shape == tuple(math.ceil(n / 128) for n in shape)
    assert torch.equal(torch.from_numpy(decode_fp8(stored, "m")), q.dequantize())
    assert torch.equal(back.codes, q.codes)
    assert torch.equal(back.scale, q.scale)
    runs = shape[1] % 128 == 0
    assert (entry.activation is not None) == runs  # groups of 128 inputs, where they divide


def test_fp8_per_tensor_has_no_tiles_and_static_inputs_a_step_of_their_own():
    q = Format(grid=E4M3, block=PerTensor(), scale=FP32).quantize(weight())
    stored, back, entry = there_and_back(fp8, q, fp8.STATIC)
    assert stored["m.weight_scale_inv"].shape == ()
    assert torch.equal(back.dequantize(), q.dequantize())
    assert entry.activation == fp8.STATIC
    assert config_of(fp8, q.format, fp8.STATIC)["activation_scheme"] == "static"
    flat = stored | {"m.weight_scale_inv": stored["m.weight_scale_inv"].reshape(1)}
    assert torch.equal(fp8.from_dict("m", flat, *entry.stored).scale, q.scale)


def test_steps_that_differ_within_a_tile_are_refused():
    q = Format(grid=E4M3, block=Block2d(32, 32), scale=FP32).quantize(weight((128, 128)))
    assert fp8.holds(q.format) is None
    with pytest.raises(InputError, match="one for 128 x 128"):
        fp8.to_dict("m", q)


def test_what_fp8_does_not_hold_or_read_is_refused():
    for fmt, words in (
        (int_format(8), "E4M3, not int8"),
        (Format(grid=E4M3, block=Channel(), scale=FP32), "per 128 x 128 tile or per tensor"),
        (Format(grid=E4M3, block=Block2d(48, 128), scale=FP32), "tiles of 128 x 128"),
    ):
        assert words in fp8.holds(fmt)
    token = Activation(format=Format(grid=E4M3, block=Token(), scale=FP32))
    whole = Format(grid=E4M3, block=PerTensor(), scale=FP32)
    assert "per group of 128" in fp8.holds(whole, activation=token)
    q = fp8.quantize(weight((128, 256)))
    stored, config = fp8.to_dict("m", q), config_of(fp8, q.format)
    for change, words in (
        ({"scale_fmt": "ue8m0"}, "'ue8m0'"),
        ({"weight_block_size": [128]}, "tiles"),
        ({"weight_block_size": [0, 128]}, "tiles"),
        ({"weight_block_size": [100, 128]}, "shape"),
    ):
        with pytest.raises(InputError, match=words):
            entries_of(fp8, config | change, stored)
    for name, tensor, words in (
        ("m.weight_scale_inv", torch.ones(2, 2), "instead of"),
        ("m.weight_scale_inv", torch.ones(1, 2, dtype=torch.uint8), "instead of"),
        ("m.weight", torch.ones(128, 256), "m.weight is float32"),
    ):
        with pytest.raises(InputError, match=words):
            entries_of(fp8, config, stored | {name: tensor})
    with pytest.raises(InputError, match="no tensor named weight_scale_inv"):
        entries_of(fp8, config, {"m.weight": stored["m.weight"]})
