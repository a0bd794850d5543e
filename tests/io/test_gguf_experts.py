"""Claims: mixtures of experts go out and in code for code; what llama.cpp does not compute is refused."""

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize
from llamacpp import greedy, llama_cpp, needs_llama_cpp
from quantized import int_format
from tiny import EXPERTS, tiny, tiny_ids, tiny_tokenizer

import fewbit
from fewbit.errors import InputError
from fewbit.format import FORMATS, FP16
from fewbit.io.gguf_write import write
from fewbit.io.load import load
from fewbit.io.source import open_source
from fewbit.nn.experts import in_experts
from fewbit.recipe import Recipe, Rule

BOTH = pytest.mark.parametrize("arch", ["mixtral", "qwen3_moe"])
MODULE = {"mixtral": "block_sparse_moe", "qwen3_moe": "mlp"}
UP = {"mixtral": "w3", "qwen3_moe": "up_proj"}


def save(arch, folder, **changes):
    """The tiny mixture with weights of the experts that sum to 1, as llama.cpp has it."""
    model = tiny(arch)
    for key, value in {"norm_topk_prob": True, **changes}.items():
        setattr(model.config, key, value)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return type(model).from_pretrained(folder, dtype=torch.float32).eval()


def quantized(arch, folder, *rules):
    """The same rounded to nearest by ``rules``, or all by one Format."""
    save(arch, folder / "float")
    rules = tuple(rule if isinstance(rule, Rule) else Rule(weight=rule) for rule in rules)
    recipe = Recipe(name="experts", rules=rules)
    fewbit.quantize(folder / "float", recipe, output=folder / "q", read_back=False)
    return open_source(folder / "q")


def logits(model):
    with torch.no_grad():
        return model(tiny_ids(length=16)).logits


@BOTH
def test_a_float_mixture_comes_back_with_equal_logits(arch, tmp_path):
    model = save(arch, tmp_path / "m")
    written = write(open_source(tmp_path / "m"), tmp_path / "m.gguf")
    assert set(written.kinds.values()) == {"F32"}
    back = load(tmp_path / "m.gguf")
    assert type(back) is type(model)
    torch.testing.assert_close(logits(back), logits(model), rtol=0, atol=1e-5)
    for key in ("num_experts_per_tok", "hidden_size", "num_key_value_heads"):
        assert getattr(back.config, key) == getattr(model.config, key)


@BOTH
@pytest.mark.parametrize("name", ["q8_0", "q4_0", "q5_1", "mxfp4"])
def test_experts_go_out_and_in_code_for_code(arch, name, tmp_path):
    source = quantized(arch, tmp_path, FORMATS[name])
    write(source, tmp_path / "m.gguf")
    back = open_source(tmp_path / "m.gguf")
    assert set(source.formats) <= set(back.formats)
    assert f"model.layers.1.{MODULE[arch]}.experts.{EXPERTS - 1}.{UP[arch]}" in back.formats
    for module in source.formats:
        got, meant = back.read_qtensor(module), source.read_qtensor(module)
        assert torch.equal(got.codes, meant.codes)
        assert torch.equal(got.dequantize(), meant.dequantize())
    model = load(tmp_path / "m.gguf")
    assert len(in_experts(model)) == 2
    assert torch.equal(logits(model), logits(load(tmp_path / "q")))


@BOTH
def test_ggufs_own_reader_sees_fused_experts_and_a_float_router(arch, tmp_path):
    source = quantized(arch, tmp_path, FORMATS["q4_1"])
    write(source, tmp_path / "m.gguf")
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    fields = {key: field.contents() for key, field in reader.fields.items()}
    name = fields["general.architecture"]
    assert name == {"mixtral": "llama", "qwen3_moe": "qwen3moe"}[arch]
    assert (fields[f"{name}.expert_count"], fields[f"{name}.expert_used_count"]) == (EXPERTS, 2)
    tensors = {t.name: t for t in reader.tensors}
    up = tensors["blk.1.ffn_up_exps.weight"]
    shape = source.entries[f"model.layers.1.{MODULE[arch]}.experts.0.{UP[arch]}"].shape
    assert (up.tensor_type, list(up.shape)) == (gguf.GGMLQuantizationType.Q4_1, [*shape[::-1], EXPERTS])
    third = source.read_qtensor(f"model.layers.1.{MODULE[arch]}.experts.2.{UP[arch]}").dequantize()
    assert np.array_equal(dequantize(up.data, up.tensor_type)[2], third.numpy())
    assert tensors["blk.0.ffn_gate_inp.weight"].tensor_type == gguf.GGMLQuantizationType.F32
    dense = {"blk.0.ffn_gate.weight", "blk.0.ffn_up.weight"}
    assert not dense & set(tensors)


@needs_llama_cpp
@BOTH
@pytest.mark.parametrize("name", ["q8_0", "q4_1"])
def test_llama_cpp_computes_the_same_experts(arch, name, tmp_path):
    quantized(arch, tmp_path, FORMATS[name])
    write(open_source(tmp_path / "q"), tmp_path / "m.gguf")
    prompts = tiny_ids(batch=4, length=5).tolist()
    theirs = llama_cpp(tmp_path / "m.gguf", ids=prompts, tokens=20)
    model = load(tmp_path / "q")
    assert theirs["tokens"] == [greedy(model, prompt, 20) for prompt in prompts]


def test_what_llama_cpp_would_compute_otherwise_is_refused(folders, tmp_path):
    def refused(source, pattern):
        with pytest.raises(InputError, match=pattern) as caught:
            write(source, tmp_path / "m.gguf")
        assert "\n" not in str(caught.value)
        assert not list(tmp_path.glob("*m.gguf*"))

    refused(open_source(folders / "qwen3_moe"), r"weights do not sum to 1 \(norm_topk_prob is false\)")
    save("qwen3_moe", tmp_path / "dense", mlp_only_layers=[0])
    refused(open_source(tmp_path / "dense"), "blocks without experts among those with them")
    for arch in ("qwen2_moe", "deepseek_v3", "gpt_oss"):
        refused(
            open_source(folders / arch), f"is of architecture {arch}, and GGUF files are written for llama"
        )


def test_experts_of_several_types_are_refused(tmp_path):
    one = Rule(match="*.experts.1.*", weight=FORMATS["q8_0"])
    source = quantized("mixtral", tmp_path, one, FORMATS["q4_0"])
    with pytest.raises(InputError, match=r"into type Q4_0 and .*experts\.1\..* into Q8_0, and a GGUF"):
        write(source, tmp_path / "m.gguf")
    zeros = int_format(4, asymmetric=True, scale=FP16)
    source = quantized("mixtral", tmp_path / "z", zeros)
    write(source, tmp_path / "z.gguf")  # every expert of them needs Q5_0
    assert torch.equal(logits(load(tmp_path / "z.gguf")), logits(load(tmp_path / "z" / "q")))


def test_damaged_numbers_of_experts(tmp_path):
    source = quantized("qwen3_moe", tmp_path, FORMATS["q8_0"])
    write(source, tmp_path / "m.gguf")
    raw = (tmp_path / "m.gguf").read_bytes()

    def with_count(key, old, new):
        at = raw.index(f"qwen3moe.{key}".encode()) + len(f"qwen3moe.{key}") + 4
        assert raw[at : at + 4] == old.to_bytes(4, "little")
        (tmp_path / "bad.gguf").write_bytes(raw[:at] + new.to_bytes(4, "little") + raw[at + 4 :])
        return tmp_path / "bad.gguf"

    with pytest.raises(InputError, match=r"says that it has 9 experts, and its tensor blk\.0\.ffn_\w+_exps"):
        open_source(with_count("expert_count", EXPERTS, 9))
    with pytest.raises(InputError, match="has no place in a dense qwen3moe model"):
        open_source(with_count("expert_count", EXPERTS, 0))
    with pytest.raises(InputError, match="sends a token to 7 of 4 experts"):
        open_source(with_count("expert_used_count", 2, 7)).config()
