"""Claims: a GGUF of ours is the model, to our reader and to the package gguf; nothing is rounded unasked."""

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize
from quantized import int_format, same_qtensor, save_quantized
from tiny import CHAT_TEMPLATE, tiny, tiny_ids, tiny_tokenizer

from fewbit.errors import InputError, WriteError
from fewbit.format import BF16, FORMATS, FP16, Channel
from fewbit.format.activation import Activation
from fewbit.io import gguf_names, native
from fewbit.io.gguf_meta import model_metadata, rope_factors
from fewbit.io.gguf_tokenizer import build_tokenizer
from fewbit.io.gguf_vocab import TRAPS, tokenizer_metadata
from fewbit.io.gguf_write import write
from fewbit.io.load import load
from fewbit.io.source import open_source

ONE_LEVEL = ("q8_0", "q5_0", "q5_1", "q4_0", "q4_1", "mxfp4")


def logits(model, length=16):
    with torch.no_grad():
        return model(tiny_ids(length=length)).logits


@pytest.mark.parametrize("arch", ["llama", "mistral", "qwen2", "qwen3"])
def test_a_float_model_comes_back_with_equal_logits(arch, folders, tmp_path):
    """The window of this mistral is 16 tokens: the file's context ends there."""
    written = write(open_source(folders / arch), tmp_path / "m.gguf")
    assert set(written.kinds.values()) == {"F32"}
    assert (written.left_out, written.rounded, written.nbytes) == (
        (),
        (),
        (tmp_path / "m.gguf").stat().st_size,
    )
    assert torch.equal(logits(load(tmp_path / "m.gguf")), logits(tiny(arch)))
    config, original = open_source(tmp_path / "m.gguf").config(), tiny(arch).config
    for key in ("hidden_size", "num_key_value_heads", "tie_word_embeddings", "vocab_size", "rms_norm_eps"):
        assert getattr(config, key) == getattr(original, key)
    assert config.max_position_embeddings == (16 if arch == "mistral" else original.max_position_embeddings)


@pytest.mark.parametrize("arch", ["llama", "qwen2"])
@pytest.mark.parametrize("name", ONE_LEVEL)
def test_a_quantized_model_goes_out_and_in_code_for_code(arch, name, tmp_path):
    model = save_quantized(arch, tmp_path / "q", FORMATS[name], dtype=torch.bfloat16)
    source = open_source(tmp_path / "q")
    written = write(source, tmp_path / "m.gguf")
    back = open_source(tmp_path / "m.gguf")
    assert back.formats == source.formats
    for module in source.formats:
        assert written.kinds[f"{module}.weight"] == name.upper()
        assert same_qtensor(back.read_qtensor(module), source.read_qtensor(module))
    assert written.kinds["model.embed_tokens.weight"] == "BF16"
    assert torch.equal(logits(load(tmp_path / "m.gguf")), logits(load(tmp_path / "q")))
    assert len(list(model.parameters())) == len(written.kinds)
    again = write(back, tmp_path / "again.gguf")
    quantized = {k: v for k, v in written.kinds.items() if k.removesuffix(".weight") in source.formats}
    assert quantized.items() <= again.kinds.items()


def test_ggufs_own_reader_sees_the_same(tmp_path):
    save_quantized("llama", tmp_path / "q", FORMATS["q4_1"])
    source = open_source(tmp_path / "q")
    write(source, tmp_path / "m.gguf")
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    fields = {key: field.contents() for key, field in reader.fields.items()}
    assert fields["general.architecture"] == "llama"
    assert fields["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q4_1
    assert fields["general.quantization_version"] == 2
    assert (fields["llama.attention.head_count"], fields["llama.attention.head_count_kv"]) == (4, 2)
    assert (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.eos_token_id"]) == ("gpt2", 0)
    assert fields["tokenizer.chat_template"] == CHAT_TEMPLATE
    tokenizer = tiny_tokenizer()
    assert fields["tokenizer.ggml.tokens"] == tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    tensors = {t.name: t for t in reader.tensors}
    assert all(t.data_offset % 32 == 0 for t in reader.tensors)
    up = tensors["blk.1.ffn_up.weight"]
    assert up.tensor_type == gguf.GGMLQuantizationType.Q4_1
    assert list(up.shape) == [64, 128]  # innermost first
    want = source.read_qtensor("model.layers.1.mlp.up_proj").dequantize().numpy()
    assert np.array_equal(dequantize(up.data, up.tensor_type), want)
    q = tensors["blk.0.attn_q.weight"]
    want = source.read_qtensor("model.layers.0.self_attn.q_proj").dequantize()
    rows = [head * 16 + row for head in range(4) for i in range(8) for row in (i, i + 8)]
    assert np.array_equal(dequantize(q.data, q.tensor_type), want[rows].numpy())


def test_wider_groups_and_zeros_fit_where_they_can(tmp_path):
    """Each tensor goes into the smallest type that holds it; the sizes of types are not those of formats."""

    def formats(name):
        if "mlp" in name:
            return int_format(4, block=Channel(), scale=BF16)
        return int_format(4, asymmetric=True, scale=FP16)

    save_quantized("llama", tmp_path / "q", formats)
    written = write(open_source(tmp_path / "q"), tmp_path / "m.gguf")
    assert written.kinds["model.layers.0.mlp.down_proj.weight"] == "Q4_0"
    assert written.kinds["model.layers.0.self_attn.v_proj.weight"] == "Q5_0"
    assert "tensors Q5_0" in str(written)
    assert torch.equal(logits(load(tmp_path / "m.gguf")), logits(load(tmp_path / "q")))


def test_embeddings_are_rounded_when_asked_and_said(folders, tmp_path):
    source = open_source(folders / "qwen3")
    written = write(source, tmp_path / "m.gguf", embeddings="q8_0")
    assert written.rounded == ("model.embed_tokens.weight", "lm_head.weight")
    back = open_source(tmp_path / "m.gguf")
    assert set(back.formats) == {"model.embed_tokens", "lm_head"}
    (head,) = source.read(["lm_head.weight"]).values()
    assert torch.equal(back.read_qtensor("lm_head").codes, FORMATS["q8_0"].quantize(head).codes)
    with pytest.raises(InputError, match="no ggml type 'q9'"):
        write(source, tmp_path / "n.gguf", embeddings="q9")


def test_llama3_positions_survive(tmp_path):
    config = tiny("llama").config
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0}
    config.rope_parameters = rope | {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    config.architectures = ["LlamaForCausalLM"]
    model = type(tiny("llama"))(config).eval()
    model.save_pretrained(tmp_path / "m")
    tiny_tokenizer().save_pretrained(tmp_path / "m")
    write(open_source(tmp_path / "m"), tmp_path / "m.gguf")
    assert rope_factors(config)["rope_freqs.weight"].shape == (8,)
    got = load(tmp_path / "m.gguf")
    assert got.config.rope_parameters == config.rope_parameters
    torch.testing.assert_close(logits(got), logits(model))


@pytest.mark.parametrize("rule", ["gpt-2", "smollm", "qwen2", "llama-bpe"])
def test_the_rule_that_cuts_a_text_is_found_by_trial(rule):
    tiny_data = tokenizer_metadata(tiny_tokenizer(), 288, "m")
    assert tiny_data["tokenizer.ggml.pre"] == "gpt-2"
    original = build_tokenizer(tiny_data | {"tokenizer.ggml.pre": rule}, "m")
    data = tokenizer_metadata(original, 290, "m")
    assert data["tokenizer.ggml.pre"] == rule
    assert data["tokenizer.ggml.tokens"][-2:] == ["[PAD288]", "[PAD289]"]
    rebuilt = build_tokenizer(data, "m")
    assert all(rebuilt(text).input_ids == original(text).input_ids for text in TRAPS)


def test_sentencepiece_goes_out_with_scores_of_its_merges():
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "a", "b", "▁a", "ab", "▁ab"]
    start = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.scores": [0.0] * 262 + [-1.0, -2.0, -3.0],
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * 6,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    original = build_tokenizer(start, "m")
    data = tokenizer_metadata(original, len(pieces), "m")
    for key in ("model", "tokens", "token_type", "bos_token_id", "unknown_token_id"):
        assert data[f"tokenizer.ggml.{key}"] == start[f"tokenizer.ggml.{key}"], key
    assert data["tokenizer.ggml.add_bos_token"] is True
    rebuilt = build_tokenizer(data, "m")
    assert all(rebuilt(t).input_ids == original(t).input_ids for t in (*TRAPS, "ab aab  baab"))


def test_a_tokenizer_that_no_rule_reproduces_is_refused(folders):
    from tokenizers import pre_tokenizers

    odd = tiny_tokenizer()
    steps = [pre_tokenizers.Punctuation(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    odd.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    with pytest.raises(InputError, match="by none of the rules that a GGUF can name"):
        tokenizer_metadata(odd, 288, "m")
    with pytest.raises(InputError, match="tokens up to number 287 and the embedding 200 rows"):
        tokenizer_metadata(tiny_tokenizer(), 200, "m")


def test_what_a_gguf_cannot_say_is_refused_and_nothing_is_left(folders, tmp_path):
    def refused(source, pattern):
        with pytest.raises(InputError, match=pattern) as caught:
            write(source, tmp_path / "m.gguf")
        assert "\n" not in str(caught.value)
        assert not [path for path in tmp_path.iterdir() if "m.gguf" in path.name]

    refused(open_source(folders / "gpt2"), "architecture gpt2, and GGUF files are written for llama, mistral")
    save_quantized("llama", tmp_path / "nf4", FORMATS["nf4"])
    refused(open_source(tmp_path / "nf4"), r"self_attn\.\w+_proj cannot go into a GGUF as it is: .* nf4 with")
    save_quantized("llama", tmp_path / "fp32", int_format(4))
    refused(open_source(tmp_path / "fp32"), "steps are no float16 numbers; quantize it with scale=fp16")
    save_quantized("llama", tmp_path / "q", FORMATS["q4_0"])
    source = open_source(tmp_path / "q")
    entry = next(iter(source.entries))
    fields = {"format": FORMATS["q4_0"], "shape": source.entries[entry].shape}
    source.entries[entry] = native.Entry(**fields, activation=Activation(format=FORMATS["q8_0"]))
    refused(source, f"{entry} cannot go .*: its input is quantized too")
    config = tiny("llama").config
    config.hidden_act = "gelu"
    with pytest.raises(InputError, match=r"the activation gelu, which llama.cpp's llama does not"):
        model_metadata(config, "m")
    with pytest.raises(
        InputError, match=r"a GGUF has no place for the tensor model.layers.0.mlp.router.weight"
    ):
        gguf_names.gguf_name("model.layers.0.mlp.router.weight")


def test_a_full_disk_leaves_the_old_file(folders, tmp_path, monkeypatch):
    path = tmp_path / "m.gguf"
    path.write_bytes(b"old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", full)
    with pytest.raises(WriteError, match=r"cannot be written .No space left on device.; free disk space"):
        write(open_source(folders / "llama"), path)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]
