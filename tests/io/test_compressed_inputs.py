"""compressed-tensors' inputs: the library rounds them as we do, and what does not fit is refused in words."""

import json
from dataclasses import replace

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus
from compressed_tensors.quantization.lifecycle.forward import forward_quantize
from quantized import int_format

from fewbit.format import (
    FP32,
    Channel,
    Format,
    Percentile,
    PerTensor,
    Zero,
    format_by_name,
)
from fewbit.format.activation import Activation
from fewbit.format.format import Params
from fewbit.grid import Int
from fewbit.io import compressed_tensors as ct

from .compressed import E4M3, INT8, ROWS, TENSOR, TOKEN, WITH_INPUTS, weight
from .layouts import entries_of


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


@pytest.mark.parametrize("signed", [True, False])
def test_asymmetric_static_inputs_are_rounded_as_the_library_rounds_them(signed):
    fmt = replace(int_format(8, block=PerTensor(), asymmetric=True), grid=Int(8, signed=signed))
    activation, x = Activation(format=fmt, static=True), weight((96, 64), seed=1) + 1
    params = activation.fit(x, x.amin(0), x.amax(0))
    config = json.loads(json.dumps(ct.quantization_config({"m": ROWS}, [], {"m": activation})))
    stored = ct.to_dict("m", ROWS.quantize(weight()), activation)
    stored |= ct.input_to_dict("m", activation, params)
    assert (stored["m.input_zero_point"].dtype, stored["m.input_zero_point"].shape) == (torch.int8, (1,))
    module = torch.nn.Linear(64, 8)
    module.quantization_status = QuantizationStatus.COMPRESSED
    for name in ("input_scale", "input_zero_point"):
        module.register_parameter(name, torch.nn.Parameter(stored[f"m.{name}"], requires_grad=False))
    args = QuantizationConfig.model_validate(config).config_groups["group_0"].input_activations
    want = forward_quantize(module, x, "input", args)
    torch.testing.assert_close(activation(x, params), want, rtol=1e-6, atol=1e-6)
    read = entries_of(ct, config, stored)["m"].activation
    assert (read.static, read.format.zero, read.format.grid) == (True, Zero.INTEGER, Int(8))
    names = {f"m.{ct.input_names.get(n, n)}": n for n in ("input_scale", "input_zero")}
    back = {own: stored[name].reshape(()) for name, own in names.items()}
    assert torch.equal(
        read(x, Params(scale=back["input_scale"], zero=back["input_zero"])), activation(x, params)
    )
