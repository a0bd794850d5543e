"""What vLLM's plugin says of a checkpoint; vLLM's own modules are stood in for by empty ones."""

import importlib
import logging
import sys
from types import ModuleType

import pytest

from fewbit.io import kv, native
from fewbit.nn.kvcache import kv_format

LAYERS = "vllm.model_executor.layers"
NAMES = {
    f"{LAYERS}.fused_moe": ("FusedMoEMethodBase", "RoutedExperts"),
    f"{LAYERS}.linear": ("LinearBase", "LinearMethodBase", "UnquantizedLinearMethod"),
    f"{LAYERS}.quantization": ("register_quantization_config",),
    f"{LAYERS}.quantization.base_config": ("QuantizationConfig", "QuantizeMethodBase"),
}


@pytest.fixture(scope="module")
def plugin():
    """The module, imported once: it registers an operator."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("vllm", "vllm.model_executor", LAYERS, *NAMES):
            module = ModuleType(name)
            for part in NAMES.get(name, ()):
                setattr(module, part, type(part, (), {}))
            patch.setitem(sys.modules, name, module)
        yield importlib.import_module("fewbit.serve.vllm")
    for name in ("fewbit.serve.vllm", "fewbit.serve.vllm_experts"):
        sys.modules.pop(name)


def test_steps_of_keys_and_values_that_are_not_used_are_named_once(plugin, caplog):
    plain = native.quantization_config({}, (), None)
    with caplog.at_level(logging.WARNING):
        plugin.FewbitConfig(plain)
        assert not caplog.records
        for _ in range(2):
            plugin.FewbitConfig(plain | kv.to_config(kv_format("fp8-tensor")))
    (record,) = caplog.records
    assert "steps of keys and values in this native checkpoint are not used" in record.message
