"""QLinear computes x W^T + b with the decoded weight, holds every Format, and keeps its steps' dtype."""

import copy
import pickle

import pytest
import torch
from quantized import FORMATS, int_format
from torch.nn import functional as F

from fewbit.format import FP32, Block2d, Channel, Flat, Group, PerTensor, QTensor
from fewbit.kernel import linear as kernel
from fewbit.kernel.pick import Implementation, pick
from fewbit.nn import QLinear

SHAPE = (64, 96)  # [out, in]


def weight(shape=SHAPE, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def layer(fmt, bias: bool = True, shape=SHAPE) -> QLinear:
    return QLinear(fmt.quantize(weight(shape)), weight((shape[0],), 1) if bias else None)


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_the_layer_is_the_plain_one_on_the_decoded_weight(fmt):
    x = weight((2, 5, 96), 2)
    for bias in (True, False):
        module = layer(fmt, bias)
        want = F.linear(x, fmt.quantize(weight()).dequantize(), module.bias)
        assert torch.equal(module(x), want)


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_quick_decoding_is_the_format_s_own_bit_for_bit(fmt, dtype):
    q = fmt.quantize(weight())
    before = q.codes.clone()
    got, want = kernel.dequantize(q, dtype), q.dequantize(dtype)
    assert got.dtype == dtype
    assert torch.equal(got, want)
    assert torch.equal(q.codes, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_it_computes_in_the_dtype_of_its_input(dtype):
    x = weight((3, 96), 2).to(dtype)
    module = layer(int_format(4))
    want = F.linear(x, module.qweight.dequantize(dtype), module.bias.to(dtype))
    assert module(x).dtype == dtype
    assert torch.equal(module(x), want)


def test_a_weight_beyond_the_cache_is_decoded_in_parts_with_the_same_result(monkeypatch):
    x = weight((4, 96), 2)
    for fmt in (int_format(4, asymmetric=True), int_format(3, block=Channel()), *FORMATS[-6:]):
        module = layer(fmt)
        want = module(x)
        with monkeypatch.context() as patch:
            patch.setattr(kernel, "_CACHED", 7 * 96)  # 64 rows do not divide by 7
            torch.testing.assert_close(module(x), want, rtol=1e-5, atol=1e-5)


def test_the_weight_comes_back_and_shares_the_buffers():
    for fmt in FORMATS:
        q = fmt.quantize(weight())
        back = QLinear(q).qweight
        assert back.codes.data_ptr() == q.codes.data_ptr()
        assert back.format == fmt
        assert torch.equal(back.dequantize(), q.dequantize())
        assert isinstance(back.scale, QTensor) == isinstance(q.scale, QTensor)


def test_state_survives_a_state_dict_a_copy_and_a_pickle():
    for fmt in FORMATS:
        module = layer(fmt)
        other = QLinear(fmt.quantize(weight(seed=9)), torch.zeros(64))
        other.load_state_dict(module.state_dict())
        for twin in (other, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert torch.equal(twin.qweight.dequantize(), module.qweight.dequantize())
            assert torch.equal(twin.bias, module.bias)


@pytest.mark.parametrize("cast", [torch.nn.Module.half, torch.nn.Module.bfloat16, torch.nn.Module.double])
def test_casting_a_model_leaves_codes_and_steps_alone(cast):
    for fmt in FORMATS:
        module = layer(fmt)
        before = {name: b.clone() for name, b in module.named_buffers()}
        cast(torch.nn.Sequential(module))
        for name, buffer in module.named_buffers():
            assert buffer.dtype == before[name].dtype
            assert torch.equal(buffer, before[name])
    assert module.bias.dtype == cast(torch.nn.Linear(1, 1)).weight.dtype


def test_moving_a_model_moves_codes_and_steps():
    module = torch.nn.Sequential(layer(int_format(4, scale=FP32))).to("meta")
    assert {b.device.type for b in module.buffers()} == {"meta"}


def test_gradients_reach_the_input():
    x = weight((2, 96), 3).requires_grad_()
    module = layer(int_format(4))
    module(x).sum().backward()
    torch.testing.assert_close(x.grad, module.qweight.dequantize().sum(0).expand(2, -1))


def test_the_module_says_what_it_is():
    module = layer(int_format(4, asymmetric=True))
    assert (module.in_features, module.out_features) == (96, 64)
    assert repr(module) == (
        "QLinear(in_features=96, out_features=64, bias=True, int4 group 32 asymmetric (fp32 scales))"
    )
    assert "bias=False" in repr(layer(int_format(4), bias=False))


def test_a_bias_that_is_a_parameter_stays_that_parameter():
    bias = torch.nn.Parameter(torch.zeros(64))
    assert QLinear(int_format(4).quantize(weight()), bias).bias is bias


def test_blocks_of_every_shape_run():
    x = weight((2, 96), 2)
    for block in (PerTensor(), Channel(), Group(16), Block2d(32, 48), Flat(100)):
        fmt = int_format(8, block=block)
        torch.testing.assert_close(layer(fmt, bias=False)(x), F.linear(x, weight()), rtol=0.1, atol=0.5)


def test_pick_takes_the_first_that_supports_the_case():
    calls = []

    def supports(device, fmt, dtype, activation):
        calls.append((device, fmt, dtype))
        return dtype == torch.bfloat16

    fast = Implementation(name="fast", supports=supports, run=lambda x, w, b: "fast")
    both = (fast, kernel.EAGER)
    fmt = int_format(4)
    assert pick(both, "cpu", fmt, torch.bfloat16) is fast
    assert pick(both, "cpu", fmt, torch.float32) is kernel.EAGER
    assert calls == [("cpu", fmt, torch.bfloat16), ("cpu", fmt, torch.float32)]
    assert kernel.IMPLEMENTATIONS[-1] is kernel.EAGER
