"""GPTQ files: our words decoded by the specification, both versions of zeros, act-order, damaged files."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from quantized import int_format

from fewbit.errors import InputError
from fewbit.format import BF16, FP16, FP32, Channel, Flat, Format, Group, QTensor, Zero
from fewbit.grid import by_name
from fewbit.io import gptq
from fewbit.io.native import Entry
from fewbit.io.ordered import OrderedTensor

from .layouts import decode_gptq, entries_of

SHAPE = (64, 96)
CASES = [
    (bits, asymmetric, block)
    for bits in gptq.BITS
    for asymmetric in (False, True)
    for block in (Group(32), Channel())
]


def weight(shape=SHAPE, seed: int = 0) -> torch.Tensor:
    """Both signs in every group, so that no zero is at the end of the codes."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def same(a: QTensor, b: QTensor) -> bool:
    """Code for code, step for step, zero for zero."""
    zeros = (a.zero is None) == (b.zero is None) and (a.zero is None or torch.equal(a.zero, b.zero))
    return torch.equal(a.codes, b.codes) and torch.equal(a.scale, b.scale) and zeros


def config_of(codec, q, **changes) -> dict:
    ordered = isinstance(q, OrderedTensor)
    rest = q.rest if ordered else q
    entry = Entry(format=codec.stored_format(rest.format), shape=tuple(q.shape), ordered=ordered)
    return codec.quantization_config({"m": entry}, []) | changes


@pytest.mark.parametrize("codec", [gptq.V1, gptq.V2], ids=["v1", "v2"])
@pytest.mark.parametrize(("bits", "asymmetric", "block"), CASES)
def test_words_decode_by_the_specification_and_come_back_code_for_code(codec, bits, asymmetric, block):
    q = int_format(bits, block=block, asymmetric=asymmetric, scale=FP16).quantize(weight())
    if q.zero is not None:
        q = replace(q, zero=q.zero.clamp(min=1 - 2 ** (bits - 1)))  # version 1 holds no zero below the codes
    stored = codec.to_dict("m", q)
    assert torch.equal(torch.from_numpy(decode_gptq(stored, "m", bits, codec.v2)), q.dequantize())
    entry = entries_of(codec, config_of(codec, q), stored)["m"]
    assert entry.shape == SHAPE
    assert not entry.ordered
    back = codec.from_dict("m", stored, *entry.stored)
    assert same(back, q)
    assert back.format.grid == q.format.grid
    assert back.format.block == q.format.block
    assert set(codec.names("m", *entry.stored)) | {"m.g_idx"} == set(stored)


def test_the_words_of_a_symmetric_file_are_the_well_known_ones():
    q = int_format(4, scale=FP16).quantize(weight())
    for codec, word in ((gptq.V1, 0x77777777), (gptq.V2, 0x88888888)):
        zeros = codec.to_dict("m", q)["m.qzeros"]
        assert {int(z) & 0xFFFFFFFF for z in zeros.flatten()} == {word}


def test_a_symmetric_file_is_read_by_its_words_whatever_version_it_claims():
    q = int_format(4, scale=FP16).quantize(weight())
    for wrong, right in ((gptq.V1, gptq.V2), (gptq.V2, gptq.V1)):
        stored = right.to_dict("m", q)
        entry = entries_of(wrong, config_of(wrong, q), stored)["m"]
        assert same(wrong.from_dict("m", stored, *entry.stored), q)


def test_version_1_refuses_zeros_that_it_cannot_tell_and_version_2_holds_them():
    q = int_format(4, asymmetric=True, scale=FP16).quantize(weight().abs() + 1)  # min is 0: zero -8
    assert (q.zero == -8).all()
    with pytest.raises(InputError, match="use gptq_v2"):
        gptq.V1.to_dict("m", q)
    stored = gptq.V2.to_dict("m", q)
    entry = entries_of(gptq.V2, config_of(gptq.V2, q), stored)["m"]
    assert same(gptq.V2.from_dict("m", stored, *entry.stored), q)


def test_a_wrapped_zero_of_version_1_is_0():
    q = int_format(4, asymmetric=True, scale=FP16).quantize(weight())
    stored = gptq.V1.to_dict("m", q) | {"m.qzeros": torch.full((3, 8), -1, dtype=torch.int32)}
    entry = entries_of(gptq.V1, config_of(gptq.V1, q), stored)["m"]
    back = gptq.V1.from_dict("m", stored, *entry.stored)
    assert (back.format.grid.to_unsigned(back.zero) == 0).all()
    assert np.array_equal(decode_gptq(stored, "m", 4, False), back.dequantize().numpy())


@pytest.mark.parametrize("codec", [gptq.V1, gptq.V2], ids=["v1", "v2"])
def test_act_order_is_an_order_of_columns(codec):
    order = torch.randperm(96, generator=torch.Generator().manual_seed(3))
    rest = int_format(4, scale=FP16).quantize(weight()[:, order])
    q = OrderedTensor(rest=rest, order=order)
    stored = codec.to_dict("m", q)
    want = torch.empty(SHAPE)
    want[:, order] = rest.dequantize()
    assert torch.equal(q.dequantize(), want)
    assert torch.equal(torch.from_numpy(decode_gptq(stored, "m", 4, codec.v2)), want)
    assert sorted(stored["m.g_idx"].tolist()) == [i // 32 for i in range(96)]
    config = config_of(codec, q)
    assert config["desc_act"] is True
    entry = entries_of(codec, config, stored)["m"]
    assert entry.ordered
    back = codec.from_dict("m", stored, *entry.stored)
    assert torch.equal(back.dequantize(), want)  # groups as before; within one, columns ascend
    again = codec.from_dict("m", codec.to_dict("m", back), *entry.stored)
    assert same(again.rest, back.rest)
    assert torch.equal(again.order, back.order)
    assert entry.bits_per_weight == back.bits_per_weight


def test_act_order_with_groups_of_several_sizes_is_refused():
    stored = gptq.V1.to_dict("m", int_format(4, scale=FP16).quantize(weight()))
    stored["m.g_idx"][0] = 2
    q = int_format(4, scale=FP16).quantize(weight())
    with pytest.raises(InputError, match="does not put 32 columns into each of 3 groups"):
        entries_of(gptq.V1, config_of(gptq.V1, q, desc_act=True), stored)
    entry = entries_of(gptq.V1, config_of(gptq.V1, q), stored)["m"]
    with pytest.raises(InputError, match="does not put 32 columns"):
        gptq.V1.from_dict("m", stored, *entry.stored)


@pytest.mark.parametrize(
    ("fmt", "words"),
    [
        (int_format(5, scale=FP16), "integers of 2, 3, 4 or 8 bits, not int5"),
        (Format(grid=by_name("nf4"), block=Group(32), scale=FP16), "not nf4"),
        (int_format(4, block=Flat(64), scale=FP16), "per group or channel"),
        (int_format(4, zero=Zero.FLOAT, scale=FP16), "not a float zero"),
        (Format(grid=by_name("uint4"), block=Group(32), scale=FP16), "without a zero"),
    ],
)
def test_what_does_not_fit_is_refused_in_words(fmt, words):
    assert words in gptq.V1.holds(fmt)
    with pytest.raises(InputError, match=words.replace("(", r"\(")):
        gptq.V2.to_dict("m", fmt.quantize(weight()))


def test_shapes_that_words_do_not_divide_and_steps_beyond_float16_are_refused():
    assert "32 rows and columns" in gptq.V1.holds(int_format(4, scale=FP16), (40, 96))
    q = int_format(4, scale=FP32).quantize(weight() * 1e6)
    with pytest.raises(InputError, match="do not fit into float16"):
        gptq.V1.to_dict("m", q)
    tiny = int_format(4, scale=BF16).quantize(weight() * 1e-12)
    with pytest.raises(InputError, match="do not fit into float16"):
        gptq.V1.to_dict("m", tiny)


def test_the_configuration_says_what_is_skipped_and_refuses_several_schemes():
    entry = Entry(format=int_format(4, scale=FP16), shape=SHAPE)
    names = [f"model.layers.{i}.mlp.{n}" for i in (0, 1) for n in ("up_proj", "down_proj")]
    config = gptq.V1.quantization_config(dict.fromkeys(names[1:], entry), [names[0], "lm_head"])
    assert config["modules_in_block_to_quantize"] == [["mlp.down_proj"], ["mlp.up_proj"]]
    assert list(config["dynamic"]) == [r"-:^model\.layers\.0\.mlp\.up_proj$"]
    assert (config["bits"], config["group_size"], config["sym"]) == (4, 32, True)
    with pytest.raises(InputError, match="one width, group size and symmetry"):
        gptq.V1.quantization_config({"a": entry, "b": replace(entry, format=int_format(8, scale=FP16))}, [])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"m.qweight": None}, "holds no tensor named qweight"),
        ({"m.qzeros": None}, "no tensor m.qzeros"),
        ({"m.scales": None}, "no tensor m.scales"),
        ({"m.scales": torch.ones(3, 64, dtype=torch.int32)}, "m.scales is int32"),
        ({"m.scales": torch.ones(3, 32, dtype=torch.float16)}, "fit no GPTQ layout"),
        ({"m.scales": torch.ones(0, 64, dtype=torch.float16)}, "m.scales is float16 of shape"),
        ({"m.qzeros": torch.zeros(2, 8, dtype=torch.int32)}, "fit no GPTQ layout"),
        ({"m.qzeros": torch.zeros(3, 8)}, "m.qzeros is float32"),
        ({"m.qweight": torch.zeros(11, 64, dtype=torch.int32)}, "fit no GPTQ layout"),
        ({"m.qweight": torch.zeros(12, 64, 1, dtype=torch.int32)}, "m.qweight is int32 of shape"),
    ],
)
def test_damaged_files_are_refused_in_words(change, words):
    q = int_format(4, asymmetric=True, scale=FP16).quantize(weight())
    stored = gptq.V1.to_dict("m", q) | change
    with pytest.raises(InputError, match=words):
        entries_of(gptq.V1, config_of(gptq.V1, q), {n: t for n, t in stored.items() if t is not None})


def test_configurations_that_contradict_the_file_are_refused():
    q = int_format(4, asymmetric=True, scale=FP16).quantize(weight())
    stored = gptq.V1.to_dict("m", q)
    for changes, words in (
        ({"bits": 8}, "says 8 bits"),
        ({"group_size": 64}, "group_size 64"),
        ({"checkpoint_format": "marlin"}, "'marlin'"),
    ):
        with pytest.raises(InputError, match=words):
            _read(config_of(gptq.V1, q, **changes), stored)
    entry = entries_of(gptq.V1, config_of(gptq.V1, q, sym=True), stored)["m"]
    with pytest.raises(InputError, match='set "sym" to false'):
        gptq.V1.from_dict("m", stored, *entry.stored)


def _read(config, stored):
    return entries_of(gptq.of_config(config), config, stored)
