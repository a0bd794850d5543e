"""What vLLM's plugin makes of a checkpoint; the least that will do stands in for vLLM's own modules."""

import importlib
import logging
import sys
from enum import Enum
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fewbit.errors import InputError
from fewbit.io import kv, native
from fewbit.io.native import Entry
from fewbit.nn.kvcache import kv_format
from fewbit.recipe import named

LAYERS = "vllm.model_executor.layers"
NAMES = {
    "vllm.config": (),
    "vllm.forward_context": (),
    f"{LAYERS}.attention": ("Attention",),
    f"{LAYERS}.fused_moe": ("FusedMoEMethodBase", "RoutedExperts"),
    f"{LAYERS}.linear": ("LinearBase", "LinearMethodBase", "UnquantizedLinearMethod"),
    f"{LAYERS}.quantization": ("register_quantization_config",),
    f"{LAYERS}.quantization.kv_cache": ("BaseKVCacheMethod",),
    f"{LAYERS}.quantization.base_config": ("QuantizationConfig", "QuantizeMethodBase"),
}
MODULES = ("Attention", "LinearBase", "RoutedExperts")
HIDDEN, INSIDE, EXPERTS = 32, 64, 3


class Method:
    def __init__(self, *args):
        self.args = args


class Module(nn.Module):
    pass


@pytest.fixture(scope="module")
def plugin():
    """The module, imported once: it registers operators."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("vllm", "vllm.model_executor", LAYERS, *NAMES):
            module = ModuleType(name)
            for part in NAMES.get(name, ()):
                setattr(module, part, type(part, (Module if part in MODULES else Method,), {}))
            patch.setitem(sys.modules, name, module)
        config = SimpleNamespace(compilation_config=SimpleNamespace(static_forward_context={}))
        sys.modules["vllm.config"].get_current_vllm_config = lambda: config
        context = SimpleNamespace(no_compile_layers=config.compilation_config.static_forward_context)
        sys.modules["vllm.forward_context"].get_forward_context = lambda: context
        yield importlib.import_module("fewbit.serve.vllm")
    for name in ("vllm", "vllm_experts", "vllm_names"):
        sys.modules.pop(f"fewbit.serve.{name}")


def quantized(rows, columns, recipe="nf4", **settings):
    """An entry, its tensors as a file holds them, and the weight that they mean."""
    fmt = named(recipe, {"group_size": "32", **settings}).rules[0].weight
    weight = fmt.quantize(torch.randn(rows, columns))
    stored = {name.removeprefix("."): t for name, t in native.to_dict("", weight).items()}
    return Entry(format=fmt, shape=(rows, columns)), stored, weight.dequantize()


def configured(plugin, entries, **mapping):
    config = plugin.FewbitConfig.from_config(native.quantization_config(entries))
    config.packed_modules_mapping = mapping
    return config


# -- linear layers


def test_pieces_of_a_fused_layer_arrive_by_their_place_and_are_joined(plugin):
    torch.manual_seed(0)
    made = {p: quantized(rows, HIDDEN) for p, rows in (("q", 64), ("k", 32))}
    plain = torch.randn(32, HIDDEN)
    config = configured(
        plugin,
        {f"model.attn.{p}_proj": entry for p, (entry, *_) in made.items()},
        qkv_proj=["q_proj", "k_proj", "v_proj"],
    )
    layer = plugin.LinearBase()
    method = config.get_quant_method(layer, "model.attn.qkv_proj")
    method.create_weights(layer, HIDDEN, [64, 32, 32], HIDDEN, 128, torch.float32)
    for name, tensor in made["q"][1].items():  # the place as an argument
        getattr(layer, name).weight_loader(getattr(layer, name), tensor, "q")
    for name, tensor in made["k"][1].items():  # the place on the tensor
        tensor.shard_id = "k"
        getattr(layer, name).weight_loader(getattr(layer, name), tensor)
    layer.weight.weight_loader(layer.weight, plain, "v")
    method.process_weights_after_loading(layer)
    assert not list(layer.parameters())
    x, bias = torch.randn(5, HIDDEN), torch.randn(128)
    want = F.linear(x, torch.cat([made["q"][2], made["k"][2], plain]), bias)
    torch.testing.assert_close(method.apply(layer, x, bias), want, rtol=1e-5, atol=1e-5)


def test_a_compiled_graph_runs_the_layer_of_its_name_in_the_engine_that_runs(plugin):
    torch.manual_seed(0)
    layers, weights = [], []
    for _ in range(2):  # two engines, whose layers have the same name
        entry, stored, weight = quantized(64, HIDDEN)
        layer = plugin.LinearBase()
        method = configured(plugin, {"model.up_proj": entry}).get_quant_method(layer, "model.up_proj")
        method.create_weights(layer, HIDDEN, [64], HIDDEN, 64, torch.float32)
        for name, tensor in stored.items():
            getattr(layer, name).weight_loader(getattr(layer, name), tensor)
        method.process_weights_after_loading(layer)
        layers.append(layer)
        weights.append(weight)
    graph = torch.compile(lambda x: method.apply(layers[0], x), fullgraph=True, backend="eager")
    x = torch.randn(5, HIDDEN)
    plugin.remember("model.up_proj", layers[0])
    torch.testing.assert_close(graph(x), x @ weights[0].T, rtol=1e-5, atol=1e-5)
    plugin.remember("model.up_proj", layers[1])
    torch.testing.assert_close(graph(x), x @ weights[1].T, rtol=1e-5, atol=1e-5)


def test_a_layer_split_over_processes_is_refused(plugin):
    config = configured(plugin, {"model.down_proj": quantized(HIDDEN, INSIDE)[0]})
    layer = plugin.LinearBase()
    method = config.get_quant_method(layer, "model.down_proj")
    with pytest.raises(InputError, match="--tensor-parallel-size 1"):
        method.create_weights(layer, INSIDE // 2, [HIDDEN], INSIDE, HIDDEN, torch.float32)


# -- experts


def routed(plugin, activation="silu", **other):
    """The attributes of vLLM's layer of experts that a method reads."""
    layer = plugin.RoutedExperts()
    layer.ckpt_gate_proj_name, layer.ckpt_up_proj_name, layer.ckpt_down_proj_name = "w1", "w3", "w2"
    layer.activation = Enum("MoEActivation", {"ANY": activation}).ANY
    layer.apply_router_weight_on_input = other.pop("on_input", False)
    layer.swiglu_limit = other.pop("limit", None)
    layer.moe_config = SimpleNamespace(num_logical_experts=EXPERTS, has_bias=other.pop("bias", False))
    return layer


def made_experts():
    """By (expert, name of the matrix): one in another format, one not quantized."""
    torch.manual_seed(1)
    shapes = {"w1": (INSIDE, HIDDEN), "w3": (INSIDE, HIDDEN), "w2": (HIDDEN, INSIDE)}
    made = {(e, n): quantized(*shape) for e in range(EXPERTS) for n, shape in shapes.items()}
    made[1, "w3"] = quantized(INSIDE, HIDDEN, "rtn", symmetric="false")
    plain = torch.randn(HIDDEN, INSIDE)
    made[2, "w2"] = (None, {"weight": plain}, plain)
    return made


def entries_of(made, prefix="model.moe.experts"):
    return {f"{prefix}.{e}.{n}": entry for (e, n), (entry, *_) in made.items() if entry is not None}


def load(method, layer, made, skip=()):
    method.create_weights(layer, EXPERTS, HIDDEN, INSIDE, torch.float32, weight_loader=None)
    for (e, part), (_, stored, _) in made.items():
        for name, tensor in stored.items():
            full = f"{'w2' if part == 'w2' else 'w13'}_{name}"
            if (e, part) not in skip:
                parameter = getattr(layer, full)
                done = parameter.weight_loader(
                    param=parameter,
                    loaded_weight=tensor,
                    weight_name=f"experts.{full}",
                    shard_id=part,
                    expert_id=e,
                    return_success=True,
                )
                assert done
    method.process_weights_after_loading(layer)


def test_experts_of_different_formats_compute_what_their_weights_mean(plugin):
    made, layer = made_experts(), routed(plugin)
    config = configured(plugin, entries_of(made))
    method = config.get_quant_method(layer, "model.moe.experts")
    load(method, layer, made)
    assert not list(layer.parameters())
    x, weights = torch.randn(7, HIDDEN), torch.rand(7, 2)
    ids = torch.rand(7, EXPERTS).argsort(1)[:, :2].int()
    got = method.apply(
        layer=layer, x=x, topk_weights=weights, topk_ids=ids, shared_experts=None, shared_experts_input=None
    )
    want = torch.zeros_like(x)
    for t in range(7):
        for e, p in zip(ids[t].tolist(), weights[t], strict=True):
            gate, up, down = (made[e, n][2] for n in ("w1", "w3", "w2"))
            want[t] += p * (F.silu(x[t] @ gate.T) * (x[t] @ up.T)) @ down.T
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_experts_stay_packed(plugin):
    made, layer = made_experts(), routed(plugin)
    load(configured(plugin, entries_of(made)).get_quant_method(layer, "model.moe.experts"), layer, made)
    stored = sum(t.nbytes for _, stored, _ in made.values() for t in stored.values())
    assert sum(b.nbytes for b in layer.buffers()) == stored


def test_experts_that_are_not_quantized_are_vllms_own(plugin):
    config = configured(plugin, {"model.attn.o_proj": quantized(HIDDEN, HIDDEN)[0]})
    assert config.get_quant_method(routed(plugin), "model.moe.experts") is None


def test_a_matrix_that_is_missing_is_named(plugin):
    made, layer = made_experts(), routed(plugin)
    method = configured(plugin, entries_of(made)).get_quant_method(layer, "model.moe.experts")
    with pytest.raises(
        InputError, match=r"no tensor codes, .* of model\.moe\.experts\.0\.w3; it is incomplete"
    ):
        load(method, layer, made, skip=[(0, "w3")])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"activation": "swigluoai"}, "the activation swigluoai"),
        ({"bias": True}, "have biases"),
        ({"limit": 7.0}, "limits"),
        ({"on_input": True}, "multiply their inputs by the router's weights"),
    ],
)
def test_experts_that_compute_otherwise_are_refused(plugin, settings, said):
    config = configured(plugin, entries_of(made_experts()))
    with pytest.raises(InputError, match=said):
        config.get_quant_method(routed(plugin, **settings), "model.moe.experts")


def test_experts_split_over_processes_are_refused(plugin):
    config = configured(plugin, entries_of(made_experts()))
    for experts, inside in ((EXPERTS, INSIDE // 2), (EXPERTS - 1, INSIDE)):
        layer = routed(plugin)
        method = config.get_quant_method(layer, "model.moe.experts")
        with pytest.raises(InputError, match="would be split over processes"):
            method.create_weights(layer, experts, HIDDEN, inside, torch.float32)


def test_a_matrix_that_vllm_has_no_place_for_is_refused(plugin):
    entries = entries_of(made_experts()) | {"model.moe.experts.0.w4": quantized(HIDDEN, HIDDEN)[0]}
    with pytest.raises(InputError, match=r"experts\.0\.w4 is quantized, and vLLM knows no such matrix"):
        configured(plugin, entries).get_quant_method(routed(plugin), "model.moe.experts")


# -- keys and values


def test_steps_of_keys_and_values_that_vllm_knows_are_its_own_affair(plugin, caplog):
    plain = native.quantization_config({}, (), None)
    attention = plugin.Attention()
    with caplog.at_level(logging.WARNING):
        assert plugin.FewbitConfig(plain).get_quant_method(attention, "model.attn") is None
        config = plugin.FewbitConfig(plain | kv.to_config(kv_format("fp8-tensor")))
    assert not caplog.records
    method = config.get_quant_method(attention, "model.attn")
    assert isinstance(method, plugin.BaseKVCacheMethod)
    assert method.args == (config,)
    assert (config.kv_cache_scheme["type"], config.kv_cache_scheme["num_bits"]) == ("float", 8)


def test_steps_of_keys_and_values_that_are_not_used_are_named_once(plugin, caplog):
    plain = native.quantization_config({}, (), None) | kv.to_config(kv_format("int8-tensor"))
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            config = plugin.FewbitConfig(plain)
    (record,) = caplog.records
    assert "steps of keys and values in this native checkpoint are not used" in record.message
    assert config.get_quant_method(plugin.Attention(), "model.attn") is None
