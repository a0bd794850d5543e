"""compressed-tensors' activation order, and zeros that a symmetric file should not hold."""

import json

import pytest
import torch
from quantized import int_format

from fewbit.errors import InputError
from fewbit.format import FP16, Channel
from fewbit.format.activation import Activation
from fewbit.io import compressed_tensors as ct
from fewbit.io.ordered import OrderedTensor

from .compressed import INT8, SHAPE, weight
from .layouts import decode_ordered, entries_of

ORDER = torch.randperm(SHAPE[1], generator=torch.Generator().manual_seed(0))


def written(asymmetric: bool):
    """A weight with sorted columns, its tensors and its configuration."""
    q = int_format(4, asymmetric=asymmetric, scale=FP16).quantize(weight())
    ordered = OrderedTensor(rest=q, order=ORDER)
    config = ct.quantization_config({"m": q.format}, [], ordered=["m"])
    return ordered, ct.to_dict("m", ordered), json.loads(json.dumps(config))


@pytest.mark.parametrize("asymmetric", [False, True])
def test_sorted_columns_decode_by_the_group_of_each_and_come_back(asymmetric):
    ordered, stored, config = written(asymmetric)
    assert config["config_groups"]["group_0"]["weights"]["actorder"] == "group"
    decoded = torch.from_numpy(decode_ordered(stored, "m", 4))
    torch.testing.assert_close(decoded, ordered.dequantize(), rtol=0, atol=0)
    entry = entries_of(ct, config, stored)["m"]
    assert entry.ordered
    assert sorted(ct.names("m", *entry.stored)) == sorted(stored)
    back = ct.from_dict("m", stored, *entry.stored)
    assert torch.equal(back.dequantize(), ordered.dequantize())
    groups = [set(order.view(-1, 32)[1].tolist()) for order in (back.order, ORDER)]
    assert groups[0] == groups[1]


def test_groups_that_are_neighbours_or_unset_are_no_order():
    q = int_format(4, scale=FP16).quantize(weight())
    stored = ct.to_dict("m", q)
    _, _, config = written(False)
    for g_idx in (torch.arange(96) // 32, torch.full((96,), -1)):
        entry = entries_of(ct, config, stored | {"m.weight_g_idx": g_idx.int()})["m"]
        assert not entry.ordered
        assert torch.equal(ct.from_dict("m", stored, *entry.stored).codes, q.codes)
    with pytest.raises(InputError, match=r"m.weight_g_idx does not put 32 columns into each of 3 groups"):
        entries_of(ct, config, stored | {"m.weight_g_idx": torch.zeros(96, dtype=torch.int32)})


@pytest.mark.parametrize(
    ("fmt", "activation"),
    [(int_format(4), Activation(format=INT8)), (int_format(4, block=Channel()), None)],
)
def test_sorted_columns_go_with_packed_groups_alone(fmt, activation):
    assert "go with packed integers in groups and float inputs" in ct.refusal(
        fmt, "Linear", activation, ordered=True
    )


def test_a_symmetric_weight_may_have_zeros_of_0_and_no_others():
    fmt = int_format(4, scale=FP16)
    stored = ct.to_dict("m", fmt.quantize(weight()))
    asymmetric = int_format(4, asymmetric=True, scale=FP16)
    packed = ct.to_dict("m", asymmetric.quantize(weight() + 1))["m.weight_zero_point"]
    eight = torch.full_like(packed, 0x08888888) | (8 << 28) - 2**32  # u = q + 8 of q = 0
    for zeros in (torch.zeros(64, 3, dtype=torch.int8), torch.zeros_like(packed), eight.int()):
        tensors = stored | {"m.weight_zero_point": zeros}
        assert torch.equal(
            ct.from_dict("m", tensors, fmt, SHAPE).dequantize(), fmt.quantize(weight()).dequantize()
        )
    for zeros in (torch.ones(64, 3, dtype=torch.int8), packed):
        with pytest.raises(
            InputError, match=r"m.weight_zero_point holds other zeros than 0.*\"symmetric\" to false"
        ):
            ct.from_dict("m", stored | {"m.weight_zero_point": zeros}, fmt, SHAPE)
