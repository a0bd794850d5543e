"""What an engine runs on packed tensors is what fewbit.load runs on codes."""

import pytest
import torch

from fewbit.errors import InputError
from fewbit.format import FORMATS
from fewbit.io import inputs, native
from fewbit.io.native import Entry
from fewbit.io.shell import linear_of
from fewbit.recipe import named
from fewbit.serve.packed import Joined, PackedLinear, PlainLinear, layer_of, stored_layout

ROWS, COLUMNS = 32, 64


def made(format, **settings):
    """An entry, its tensors as a file holds them, and the layer that fewbit.load makes."""
    torch.manual_seed(0)
    weight = format.quantize(torch.randn(ROWS, COLUMNS))
    entry = Entry(format=format, shape=(ROWS, COLUMNS), **settings)
    stored = {name.removeprefix("."): t for name, t in native.to_dict("", weight).items()}
    return entry, stored, linear_of(weight, None, entry, None)


def of_recipe(name, **settings):
    return named(name, {k: str(v) for k, v in settings.items()}).rules[0].weight


FORMATS_SEEN = {
    "int4": of_recipe("rtn", group_size=16, symmetric=False),
    "nf4-dq": FORMATS["nf4-dq"],
    "nvfp4": FORMATS["nvfp4"],
    "int8": of_recipe("int8"),
    "higgs": of_recipe("higgs", bits=3),
    "qtip": of_recipe("qtip", state_bits=8),
}


@pytest.mark.parametrize("name", FORMATS_SEEN)
def test_packed_equals_loaded(name):
    entry, stored, loaded = made(FORMATS_SEEN[name])
    x = torch.randn(5, COLUMNS)
    assert torch.equal(PackedLinear(entry, stored)(x), loaded(x))


def test_memory_is_that_of_the_file():
    for format in FORMATS_SEEN.values():
        entry, stored, _ = made(format)
        layer = PackedLinear(entry, stored)
        held = sum(b.nbytes for b in layer.buffers())
        assert held <= sum(t.nbytes for t in stored.values())


def test_bits_of_a_whole_byte_are_opened_once():
    assert not PackedLinear(*made(FORMATS_SEEN["int8"])[:2]).fields
    assert set(PackedLinear(*made(FORMATS_SEEN["int4"])[:2]).fields) == {"codes", "zero"}


def test_pieces_of_different_formats_are_joined_in_order():
    q, k = made(FORMATS_SEEN["int4"]), made(FORMATS_SEEN["higgs"])
    v = torch.randn(8, COLUMNS)
    joined = Joined([PackedLinear(*q[:2]), PackedLinear(*k[:2]), PlainLinear(v)])
    x = torch.randn(3, COLUMNS)
    assert joined.out_features == 2 * ROWS + 8
    assert torch.equal(joined(x), torch.cat([q[2](x), k[2](x), x @ v.T], -1))


def test_static_inputs_keep_their_steps():
    rule = named("w8a8", {"input": "tensor", "static": "true"}).rules[0]
    params = rule.input.format.fit(torch.randn(9, COLUMNS))
    entry, stored, _ = made(rule.weight, activation=rule.input)
    stored |= {n.removeprefix("."): t for n, t in inputs.to_dict("", params).items()}
    weight = native.from_dict("", {f".{n}": t for n, t in stored.items()}, *entry.stored)
    x = torch.randn(5, COLUMNS)
    assert torch.equal(PackedLinear(entry, stored)(x), linear_of(weight, None, entry, params)(x))


def test_a_missing_tensor_is_named():
    entry, stored, _ = made(FORMATS_SEEN["int4"])
    del stored["scale"]
    layout = stored_layout(entry, entry.shape, torch.float32)
    with pytest.raises(InputError, match="no tensor scale of layer_q; it is incomplete"):
        layer_of("layer_q", entry, layout, stored, torch.device("cpu"))
