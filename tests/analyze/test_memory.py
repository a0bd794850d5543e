"""Estimates against what they estimate: files on disk, a filled cache, a profiled prefill, saved tensors."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from held import peak_bytes, saved_bytes
from tiny import ARCHITECTURES, save_tiny, tiny, tiny_ids

import fewbit
from fewbit.analyze.anatomy import anatomy
from fewbit.analyze.memory import (
    CACHES,
    SCHEMES,
    cache_bytes,
    cache_per_token,
    check_load,
    inference,
    prefill_bytes,
    weights,
)
from fewbit.analyze.training import Inputs, activation_bytes, saved_behind, saved_per_block, training
from fewbit.errors import InputError
from fewbit.format import FP32
from fewbit.io.config import open_config
from fewbit.recipe import int8, nf4, rtn

BY_NAME = {scheme.name: scheme for scheme in SCHEMES}
W4, INT8, NF4 = (
    BY_NAME["W4A16 g{} symmetric"],
    BY_NAME["int8 W8A16 per channel"],
    BY_NAME["nf4 g{} double quantization"],
)
DECODERS = tuple(arch for arch in ARCHITECTURES if arch != "bert")


def config_folder(config, folder):
    """A folder with nothing but config.json."""
    config.save_pretrained(folder)
    assert [file.name for file in folder.iterdir()] == ["config.json"]
    return folder


def of(arch, tmp_path):
    """The tiny model of an architecture and its anatomy, read from its configuration alone."""
    model = tiny(arch)
    return model, anatomy(open_config(config_folder(model.config, tmp_path / arch)))


def llama(**changes):
    """A small Llama configuration whose layers 128 does not divide."""
    from transformers import LlamaConfig

    settings = {
        "vocab_size": 512, "hidden_size": 192, "intermediate_size": 576, "num_hidden_layers": 3,
        "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 512,
        "architectures": ["LlamaForCausalLM"], "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1,
        "dtype": "bfloat16",
    }  # fmt: skip
    return LlamaConfig(**{**settings, **changes})


def file_bytes(folder):
    """(bytes of the weight files, bytes of the tensors in them)."""
    files = list(folder.glob("*.safetensors"))
    headers = sum(8 + int.from_bytes(file.read_bytes()[:8], "little") for file in files)
    whole = sum(file.stat().st_size for file in files)
    return whole, whole - headers


def off(estimate, real):
    """Relative error."""
    return abs(estimate / real - 1)


# -- weights --


@pytest.mark.parametrize("tied", [True, False])
def test_weights_are_within_3_percent_of_the_files_that_quantize_writes(tmp_path, tied):
    from transformers import LlamaForCausalLM

    config = llama(tie_word_embeddings=tied)
    model = anatomy(open_config(config_folder(config, tmp_path / "config")))
    assert model.tied is tied
    folder = tmp_path / "bf16"
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    save_tokenizer(folder)
    whole, tensors = file_bytes(folder)
    assert weights(model, BY_NAME["bf16"]).nbytes == tensors
    assert off(tensors, whole) < 0.03
    for scheme, recipe in ((W4, rtn(group_size=64)), (INT8, int8()), (NF4, nf4())):
        out = tmp_path / recipe.name
        fewbit.quantize(folder, recipe, output=out)
        estimate = weights(model, scheme)
        whole, tensors = file_bytes(out)
        assert off(estimate.nbytes, whole) < 0.03, recipe.name
        assert off(estimate.nbytes, tensors) < 0.001, recipe.name
        written = json.loads((out / "fewbit_manifest.json").read_text())
        assert estimate.bits == pytest.approx(written["bits_per_weight"])


def save_tokenizer(folder):
    """The tokenizer that every checkpoint needs."""
    from tiny import tiny_tokenizer

    tiny_tokenizer().save_pretrained(folder)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_architecture_weighs_what_its_file_holds(arch, tmp_path):
    model = save_tiny(arch, tmp_path)
    found = anatomy(open_config(tmp_path))
    assert found.parameters == sum(p.numel() for p in model.parameters())
    stored = file_bytes(tmp_path)[1]
    assert off(weights(found, BY_NAME["fp32"]).nbytes, stored) < 0.001
    assert weights(found, BY_NAME["bf16"]).nbytes == weights(found, BY_NAME["fp32"]).nbytes / 2


@pytest.mark.slow
def test_the_real_model_weighs_what_was_estimated(tmp_path):
    model = anatomy(open_config("smollm2"))
    fewbit.quantize("smollm2", rtn(group_size=64), output=tmp_path / "w4")
    assert off(weights(model, W4).nbytes, file_bytes(tmp_path / "w4")[0]) < 0.03
    fewbit.load("smollm2", dtype=torch.bfloat16).save_pretrained(tmp_path / "bf16")
    assert off(weights(model, BY_NAME["bf16"]).nbytes, file_bytes(tmp_path / "bf16")[0]) < 0.001


def test_a_group_that_does_not_divide_becomes_the_next_power_of_two_and_says_so(tmp_path):
    model = anatomy(open_config(config_folder(llama(), tmp_path / "a")))
    held = weights(model, W4)
    assert held.scheme == "W4A16 g64 symmetric"
    assert held.format.block.size == 64
    assert held.note == "groups of 64, because 128 does not divide 192 input columns"
    assert held.bits == 4.25
    odd = anatomy(open_config(config_folder(llama(intermediate_size=300), tmp_path / "b")))
    assert weights(odd, W4).nbytes is None
    assert weights(odd, BY_NAME["mxfp4"]).note.startswith("not possible, because blocks of 32 do not divide")
    assert weights(odd, INT8).nbytes is not None
    row = inference(odd, 16, 1, schemes=[W4])[0]
    assert (row.total, row.gpus) == (None, ())


def test_llama_8b_from_its_configuration(tmp_path):
    """8.03 billion parameters: 16.1 GB in bf16, 32.1 GB in fp32, 5.7 GB in NF4 and not 4."""
    config = llama(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=131072,
        tie_word_embeddings=False,
    )  # fmt: skip
    model = anatomy(open_config(config_folder(config, tmp_path / "8b")))
    assert model.parameters == 8_030_261_248
    assert weights(model, BY_NAME["fp32"]).nbytes == 4 * 8_030_261_248
    assert 5.6e9 < weights(model, NF4).nbytes < 5.8e9
    assert cache_bytes(model, CACHES[0][1], 8192, 2) == 2 * 8192 * 131072
    narrowing = [row.total for row in inference(model, 4096, 1)]
    assert narrowing[0] == max(narrowing)
    assert narrowing[-1] == min(narrowing)


# -- cache --


@pytest.mark.parametrize("arch", DECODERS)
@pytest.mark.parametrize("length", [8, 24])
def test_the_cache_is_the_one_that_transformers_fills(arch, length, tmp_path):
    """Windows of 16 (mistral, gemma3) are not reached by 8 tokens and passed by 24."""
    model, found = of(arch, tmp_path)
    with torch.no_grad():
        layers = model(tiny_ids(3, length), use_cache=True).past_key_values.layers
    real = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
    assert cache_bytes(found, FP32, length, 3) == real


def test_cache_per_token_with_and_without_windows(tmp_path):
    _, full = of("llama", tmp_path)
    _, mixed = of("gemma3", tmp_path)
    bf16, fp8, int4 = (format for _, format in CACHES)
    assert cache_per_token(full, bf16) == (2 * 2 * 32 * 2, 2 * 2 * 32 * 2)
    assert cache_per_token(mixed, bf16) == (3 * 2 * 64 * 2, 1 * 2 * 64 * 2)
    assert cache_per_token(full, fp8)[0] == pytest.approx(2 * 2 * 32, rel=1e-4)
    assert cache_per_token(full, int4)[0] == 2 * 2 * 32 * (4 + 32 / 16) / 8  # 16: one head's dimensions


def test_latent_attention_keeps_its_latent_and_no_heads(tmp_path):
    from transformers import DeepseekV3Config

    config = DeepseekV3Config(
        hidden_size=64, intermediate_size=128, moe_intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, vocab_size=100, n_routed_experts=4, n_group=2,
        topk_group=1, num_experts_per_tok=2, first_k_dense_replace=1, kv_lora_rank=32, q_lora_rank=16,
        architectures=["DeepseekV3ForCausalLM"],
    )  # fmt: skip
    from transformers import DeepseekV3ForCausalLM

    found = anatomy(open_config(config_folder(config, tmp_path / "mla")))
    with torch.no_grad():
        layers = (
            DeepseekV3ForCausalLM(config)
            .float()(torch.ones(1, 8, dtype=torch.long), use_cache=True)
            .past_key_values.layers
        )
    assert cache_bytes(found, FP32, 8, 1) == sum(x.keys.nbytes + x.values.nbytes for x in layers)
    assert found.linears.count((32, 64)) == 2 * found.linears.count((64, 32)) > 2 * 4  # of the second layer
    assert found.experts == 0  # none is left that counts as it is
    assert found.widths is None
    assert "not modelled" in found.widths_reason
    assert inference(found, 8, 1)[0].activations is None
    assert all(row.total is None for row in training(found, 8, 1))


def test_models_without_a_cache_of_keys_and_values(tmp_path):
    from transformers import MambaConfig, T5Config

    assert of("bert", tmp_path)[1].cache == ()
    t5 = T5Config(d_model=64, num_layers=2, vocab_size=100, architectures=["T5ForConditionalGeneration"])
    mamba = MambaConfig(
        hidden_size=64, num_hidden_layers=2, vocab_size=100, architectures=["MambaForCausalLM"]
    )
    for name, config in (("t5", t5), ("mamba", mamba)):
        found = anatomy(open_config(config_folder(config, tmp_path / name)))
        assert found.cache is None
        assert found.cache_reason
        assert cache_bytes(found, FP32, 8, 1) is None
        assert inference(found, 8, 1)[0].total is None


# -- activations --


# Elementwise activations (GELU written out) and further norms and casts keep more: see docs/memory.md.
@pytest.mark.parametrize("arch", ["llama", "mistral", "qwen2", "qwen3", "phi3", "gpt_neox"])
def test_training_activations_are_within_15_percent_of_what_autograd_keeps(arch, tmp_path):
    model, found = of(arch, tmp_path)
    ids = tiny_ids(2, 64)
    real = saved_bytes(model.bfloat16(), ids) / ids.numel()
    estimate = found.blocks * saved_per_block(found.widths) + saved_behind(found)
    assert off(estimate, real) < 0.15


@pytest.mark.parametrize(
    ("hidden", "ffn", "heads", "kv"), [(128, 352, 4, 2), (96, 384, 6, 6), (256, 512, 4, 1)]
)
def test_a_llama_of_any_proportions_is_within_2_percent(hidden, ffn, heads, kv, tmp_path):
    from transformers import LlamaForCausalLM

    config = llama(
        hidden_size=hidden, intermediate_size=ffn, num_attention_heads=heads, num_key_value_heads=kv
    )
    found = anatomy(open_config(config_folder(config, tmp_path / "llama")))
    model, ids = LlamaForCausalLM(config).bfloat16(), torch.randint(2, 512, (2, 128))
    estimate = found.blocks * saved_per_block(found.widths) + saved_behind(found)
    assert off(estimate, saved_bytes(model, ids) / ids.numel()) < 0.02
    inner = prefill_bytes(found, 128, 2) - 6 * 2 * found.vocabulary
    assert off(inner, peak_bytes(lambda: model.model(input_ids=ids, use_cache=False))) < 0.05


def test_fp8_halves_what_linears_keep_and_checkpointing_keeps_block_inputs(tmp_path):
    _, found = of("llama", tmp_path)
    w = found.widths
    plain, fp8, fake = (saved_per_block(w, inputs) for inputs in (Inputs.PLAIN, Inputs.FP8, Inputs.FAKE))
    assert plain - fp8 == 2 * w.hidden + w.ffn - w.query
    assert fake - plain == 2 * (2 * w.hidden + w.query + w.ffn)
    full, checkpointed = activation_bytes(found, 16, 2, Inputs.PLAIN)
    loss = saved_behind(found) + 6 * found.vocabulary
    assert full == 32 * (found.blocks * plain + loss)
    assert checkpointed == 32 * (found.blocks * 2 * w.hidden + max(plain, loss))


# -- training --


def test_bytes_per_parameter_are_those_of_fp8_lm(tmp_path):
    """16 bytes for FP32 gradient, master and moments; 1 + 2 + 1 + 2 in FP8-LM, 2.67 times less."""
    _, found = of("llama", tmp_path)
    full, qat, fp8, qlora = training(found, 16, 1, rank=8)
    assert (full.per_parameter, qat.per_parameter, fp8.per_parameter) == (16, 16, 6)
    assert full.state == 16 * found.parameters
    assert fp8.state == 6 * found.parameters
    assert full.copy == 2 * found.parameters
    assert qat.copy - full.copy == 2 * found.linear_parameters
    groups = found.linear_parameters // 64
    assert qat.extra == 16 * groups
    assert qlora.trained == sum(8 * (out + columns) for out, columns in found.linears)
    assert qlora.total < fp8.total < full.total < qat.total


def test_the_counts_are_those_of_a_real_adam(tmp_path):
    """FP32 gradient, weight and two moments of torch's AdamW are the 16 bytes, plus one step count each."""
    model, found = of("llama", tmp_path)
    optimizer = torch.optim.AdamW(model.parameters())
    model(input_ids=tiny_ids(), labels=tiny_ids()).loss.backward()
    optimizer.step()
    real = sum(p.nbytes + p.grad.nbytes for p in model.parameters())
    real += sum(t.nbytes for state in optimizer.state.values() for t in state.values() if t.ndim)
    assert training(found, 16, 1)[0].state == real


@pytest.mark.parametrize(
    ("context", "batch", "name"), [(0, 1, "context"), (-5, 1, "context"), (8, 0, "batch")]
)
def test_impossible_loads_are_refused(context, batch, name, tmp_path):
    _, found = of("llama", tmp_path)
    for estimate in (inference, training, check_load):
        with pytest.raises(InputError, match=f"--{name} -?[0-9]+ is not a positive number"):
            estimate(found, context, batch)


def test_a_context_beyond_the_model_is_said(tmp_path):
    _, found = of("llama", tmp_path)
    assert check_load(found, 128, 1) == ""
    assert "at most 128 tokens" in check_load(found, 129, 1)


def test_schemes_count_scales_and_zeros():
    """No data is needed: W4 with BF16 steps and 4-bit zeros per 128, NF4 with double quantization per 64."""
    shapes = SimpleNamespace(linears=((256, 1024),), linear_parameters=2**18, rest=0)
    assert weights(shapes, BY_NAME["W4A16 g{} asymmetric"]).bits == 4 + 20 / 128
    assert weights(shapes, W4).bits == 4 + 16 / 128
    assert weights(shapes, BY_NAME["mxfp4"]).bits == 4.25
    assert weights(shapes, BY_NAME["nvfp4"]).bits == pytest.approx(4.5, abs=2e-4)
    assert weights(shapes, NF4).bits == pytest.approx(4 + 8 / 64 + 32 / 64 / 256, abs=2e-4)
    assert math.isclose(weights(shapes, NF4).nbytes, 2**18 * weights(shapes, NF4).bits / 8, abs_tol=1)
