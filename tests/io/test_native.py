"""The native layout: every Format round-trips by value, in exactly the bits that it counts."""

import dataclasses
import json
import math

import pytest
import torch
from quantized import FORMATS as COMMON
from quantized import int_format

from fewbit.errors import InputError
from fewbit.format import DOUBLE_QUANT, FP16, Channel, Format, Group, QTensor
from fewbit.grid import GRIDS, Int, by_name
from fewbit.io import native
from fewbit.io.native import Entry

SHAPES = ((64, 96), (32, 1152))
THREES = tuple(Format(grid=g, block=Group(48), scale=FP16) for g in GRIDS if g.width == 3)
FORMATS = (*COMMON[:-1], *THREES, COMMON[-1])


def weight(shape, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def same(a: QTensor | torch.Tensor | None, b: QTensor | torch.Tensor | None) -> bool:
    """Equal to the last bit, in dtype too, to any depth."""
    if isinstance(a, QTensor) and isinstance(b, QTensor):
        parts = ((a.codes, b.codes), (a.scale, b.scale), (a.zero, b.zero))
        return a.format == b.format and a.shape == b.shape and all(same(*pair) for pair in parts)
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return a is None and b is None


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_every_format_round_trips_by_value(fmt):
    for shape in SHAPES:
        q = fmt.quantize(weight(shape))
        stored = native.to_dict("a.b", q)
        assert all(name.startswith("a.b.") and t.is_contiguous() for name, t in stored.items())
        back = native.from_dict("a.b", stored, fmt, shape)
        assert same(back, q)
        assert torch.equal(back.dequantize(), q.dequantize())


def test_every_code_of_every_grid_survives():
    for grid in GRIDS:
        if grid.bits <= 16:
            codes = grid.codes()
            fmt = Format(grid=grid)
            shape = torch.Size([len(codes) * grid.width])
            q = QTensor(codes=codes, scale=None, zero=None, format=fmt, shape=shape)
            assert torch.equal(native.from_dict("x", native.to_dict("x", q), fmt, shape).codes, codes)


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_the_file_holds_the_bits_that_the_tensor_counts(fmt):
    """Exactly, but for packed rows that do not end on a byte, which lose less than a byte each."""
    for shape in SHAPES:
        q = fmt.quantize(weight(shape))
        stored = native.to_dict("x", q)
        packed_rows = sum(math.prod(t.shape[:-1]) for t in stored.values() if t.dtype == torch.uint8)
        assert 0 <= sum(t.nbytes for t in stored.values()) - q.nbytes < max(packed_rows, 1e-9) + 1e-6


def test_whole_bytes_leave_no_padding_at_all():
    for fmt in (int_format(3), int_format(5, asymmetric=True, scale=FP16, block=Group(16)), FORMATS[-1]):
        q = fmt.quantize(weight((32, 128)))
        assert sum(t.nbytes for t in native.to_dict("x", q).values()) == q.nbytes


def test_columns_that_do_not_fill_a_byte_round_trip():
    for bits in range(1, 9):
        for columns in (1, 5, 33):
            fmt = int_format(bits, block=Channel(), asymmetric=True)
            q = fmt.quantize(weight((7, columns)))
            assert same(native.from_dict("x", native.to_dict("x", q), fmt, (7, columns)), q)


def test_nested_steps_get_nested_names():
    fmt = Format(grid=by_name("nf4"), block=Group(32), scale=DOUBLE_QUANT)
    assert sorted(native.to_dict("x", fmt.quantize(weight((64, 96))))) == [
        "x.codes",
        "x.scale_codes",
        "x.scale_scale",
        "x.scale_zero",
    ]


def test_the_layout_is_known_without_data():
    for fmt in FORMATS:
        for shape in SHAPES:
            stored = native.to_dict("m", fmt.quantize(weight(shape)))
            got = {name.removeprefix("m."): (tuple(t.shape), t.dtype) for name, t in stored.items()}
            assert native.layout(fmt, shape) == got
            assert sorted(native.names("m", fmt, shape)) == sorted(stored)


def test_the_configuration_round_trips_through_json_and_states_each_format_once():
    entries = {
        f"layer.{i}": Entry(format=fmt, shape=(64, 96), transposed=i % 2 == 0)
        for i, fmt in enumerate(FORMATS)
    }
    entries["again"] = Entry(format=FORMATS[0], shape=(32, 32))
    config = native.quantization_config(entries)
    assert config["quant_method"] == "fewbit"
    assert len(config["formats"]) == len(set(FORMATS))
    assert native.entries_from_config(json.loads(json.dumps(config))) == entries


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"version": 2}, "version 2 .* update fewbit"),
        ({"formats": []}, "broken .*KeyError"),
        ({"modules": {"x": {"format": 0}}}, "broken .*KeyError: 'shape'"),
        ({"modules": None}, "broken"),
        ({"formats": [{"type": "Nonsense"}]}, "Nonsense"),
    ],
)
def test_a_configuration_that_cannot_be_read_is_refused_in_a_sentence(change, words):
    config = native.quantization_config({"x": Entry(format=int_format(4), shape=(32, 32))})
    with pytest.raises(InputError, match=words):
        native.entries_from_config(config | change)


def test_missing_and_foreign_tensors_are_refused_by_name():
    fmt = int_format(4)
    stored = native.to_dict("x", fmt.quantize(weight((64, 96))))
    with pytest.raises(InputError, match=r"no tensor x\.scale"):
        native.from_dict("x", {"x.codes": stored["x.codes"]}, fmt, (64, 96))
    with pytest.raises(
        InputError, match=r"x\.codes is uint8 of shape \[64, 48\], but .* uint8 of shape \[64, 64\]"
    ):
        native.from_dict("x", stored, fmt, (64, 128))
    with pytest.raises(InputError, match=r"x\.scale is float32 .* float16"):
        native.from_dict("x", stored, dataclasses.replace(fmt, scale=FP16), (64, 96))


def test_other_modules_tensors_are_left_alone():
    fmt = int_format(2)
    a, b = fmt.quantize(weight((32, 32), 1)), fmt.quantize(weight((32, 32), 2))
    both = native.to_dict("x", a) | native.to_dict("x.y", b)
    assert same(native.from_dict("x", both, fmt, (32, 32)), a)
    assert same(native.from_dict("x.y", both, fmt, (32, 32)), b)


def test_signed_codes_are_stored_as_offset_binary():
    q = QTensor(
        codes=torch.tensor([[-8, -1, 0, 7]], dtype=torch.int8),
        scale=torch.ones(1, 1),
        zero=None,
        format=Format(grid=Int(4), block=Channel(), scale=Format(grid=by_name("fp32"))),
        shape=torch.Size((1, 4)),
    )
    assert native.to_dict("x", q)["x.codes"].tolist() == [[0x70, 0xF8]]
