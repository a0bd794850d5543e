"""Native checkpoints load in transformers' ``from_pretrained`` after ``import fewbit``, in either order."""

import subprocess
import sys
from itertools import cycle, islice

import pytest
import torch
from quantized import FORMATS, copy_with_config, int_format, linears_of, save_quantized
from tiny import ARCHITECTURES, tiny_ids
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from fewbit.errors import InputError
from fewbit.format import BF16, FP16, FP32
from fewbit.io import hf, native
from fewbit.io.load import load
from fewbit.nn import QLinear

hf.register()


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(tiny_ids()).logits


def auto(arch: str):
    return AutoModelForMaskedLM if arch == "bert" else AutoModelForCausalLM


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_architecture_loads_and_saves(arch, tmp_path):
    model = save_quantized(arch, tmp_path / "a", int_format(4, asymmetric=True, scale=FP16))
    loaded = auto(arch).from_pretrained(tmp_path / "a")
    assert {n for n, m in loaded.named_modules() if isinstance(m, QLinear)} == set(linears_of(model))
    assert torch.equal(logits(loaded), logits(model))
    loaded.save_pretrained(tmp_path / "b")
    assert torch.equal(logits(auto(arch).from_pretrained(tmp_path / "b")), logits(model))
    assert torch.equal(logits(load(tmp_path / "b")), logits(model))


def test_every_format_loads_bit_for_bit(tmp_path):
    """Each linear of a few models in a Format of its own, until all Formats had their turn."""
    per_model = 14
    for start in range(0, len(FORMATS), per_model):
        turn = cycle(islice(FORMATS, start, start + per_model))
        model = save_quantized("llama", tmp_path / str(start), lambda name, turn=turn: next(turn))
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / str(start))
        for name, module in linears_of(model).items():
            assert torch.equal(loaded.get_submodule(name).qweight.dequantize(), module.weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_steps_keep_their_dtype_in_a_model_of_another(dtype, tmp_path):
    kinds = cycle((FP32, FP16, BF16))
    model = save_quantized("llama", tmp_path, lambda name: int_format(4, scale=next(kinds)))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    for name, module in linears_of(model).items():
        q = loaded.get_submodule(name).qweight
        assert q.scale.dtype == native._NATIVE[q.format.scale.grid.name]
        assert torch.equal(q.dequantize(), module.weight)


def test_ties_generation_and_the_configuration_are_kept(tmp_path):
    model = save_quantized("llama", tmp_path, int_format(4))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert loaded.config.quantization_config.quant_method == "fewbit"
    assert loaded.is_quantized
    settings = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(loaded.generate(tiny_ids(1), **settings), model.generate(tiny_ids(1), **settings))


def test_shards_load(tmp_path):
    model = save_quantized("llama", tmp_path / "a", int_format(4))
    AutoModelForCausalLM.from_pretrained(tmp_path / "a").save_pretrained(
        tmp_path / "b", max_shard_size="40KB"
    )
    assert len(list((tmp_path / "b").glob("*.safetensors"))) > 1
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "b")), logits(model))
    assert torch.equal(logits(load(tmp_path / "b")), logits(model))


def test_a_base_model_file_without_prefix_loads_and_saves(tmp_path):
    model = save_quantized("gpt2", tmp_path / "a", int_format(4), prefix="transformer.")
    assert torch.equal(logits(load(tmp_path / "a")), logits(model))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert torch.equal(logits(loaded), logits(model))
    loaded.save_pretrained(tmp_path / "b")
    assert torch.equal(logits(load(tmp_path / "b")), logits(model))


def test_a_newer_layout_and_foreign_modules_are_refused_in_words(tmp_path):
    save_quantized("llama", tmp_path / "a", int_format(4))
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "a").config.quantization_config.to_dict()
    newer = copy_with_config(tmp_path / "a", tmp_path / "b", quantization_config=config | {"version": 9})
    with pytest.raises(InputError, match=r"version 9 .* update fewbit"):
        AutoModelForCausalLM.from_pretrained(newer)
    modules = {"nobody": {"format": 0, "shape": [32, 32]}}
    foreign = copy_with_config(
        tmp_path / "a", tmp_path / "c", quantization_config=config | {"modules": modules}
    )
    with pytest.raises(InputError, match="quantizes nobody, which LlamaForCausalLM does not have"):
        AutoModelForCausalLM.from_pretrained(foreign)


@pytest.mark.parametrize("first", ["fewbit", "transformers"])
def test_importing_fewbit_is_enough_in_either_order(first, tmp_path):
    model = save_quantized("llama", tmp_path, int_format(2))
    torch.save((tiny_ids(), logits(model)), tmp_path / "want.pt")
    imports = {
        "fewbit": "import fewbit\nassert 'transformers' not in sys.modules\nimport transformers",
        "transformers": "import transformers.modeling_utils\nimport fewbit",
    }
    code = f"""
import sys, torch
{imports[first]}
ids, want = torch.load({str(tmp_path / "want.pt")!r})
model = transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})
assert any(type(m).__name__ == "QLinear" for m in model.modules())
with torch.no_grad():
    assert torch.equal(model(ids).logits, want)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_registering_twice_does_no_harm():
    hooks = len(sys.meta_path)
    hf.register()
    hf.register()
    assert len(sys.meta_path) == hooks
