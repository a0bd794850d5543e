"""--kv: eval and generate with a quantized cache, its bytes beside the figures, wrong names told at once."""

import pytest
from tiny import save_tiny


def test_eval_reads_the_quantized_cache(fewbit, llama):
    words = ("eval", llama, "--window", 64, "--windows", 2, "--chunk", 8)
    exact = fewbit(*words, "--json").json
    found = fewbit(*words, "--kv", "int2-token", "--against", llama, "--json").json
    assert (exact["kv"], found["kv"], found["chunk"]) == (None, "int2-token", 8)
    # 2 layers, keys and values, 2 heads of 16: float32, or 2 bits and two float16
    assert exact["cache_bytes"] == 64 * 2 * 2 * 2 * 16 * 4
    assert found["cache_bytes"] == 64 * 2 * 2 * 2 * (16 * 2 // 8 + 4)
    assert found["kl"] > 1e-6
    said = fewbit(*words, "--kv", "int2-token").out
    assert "int2-token, 64 bytes per token, read every 8 tokens" in said
    # with --kv, chunks of 64 unless told otherwise
    assert fewbit("eval", llama, "--window", 96, "--windows", 1, "--kv", "fp8", "--json").json["chunk"] == 64


@pytest.mark.parametrize("kv", ["kivi8-g16-r16", "fp8-head"])
def test_generate_tells_what_the_cache_held(fewbit, llama, kv):
    words = ("generate", llama, "It was", "--max-new-tokens", 40, "--kv", kv)
    found = fewbit(*words, "--json").json
    assert found["kv"] == kv
    assert found["cache_bytes"] > 0
    assert found["new_tokens"] > 0
    assert f"KV cache {kv}: {found['cache_bytes']:,} bytes after" in fewbit(*words).err


def test_layers_that_stay_in_float_are_named(fewbit, tmp_path):
    save_tiny("gemma3", tmp_path / "gemma")
    ran = fewbit("generate", "gemma", "It was", "--max-new-tokens", 3, "--kv", "int4-token")
    assert "0 (sliding window), 2 (sliding window)" in ran.err


@pytest.mark.parametrize(
    ("kv", "sentence"),
    [
        ("kivi5", "no KV format named 'kivi5'"),
        ("kivi4-r48", "does not hold whole groups of 32 tokens"),
        ("kivi4", "groups of 32 channels do not tile a head of 16; use groups of 16 (-g16"),
    ],
)
def test_wrong_formats_are_one_sentence(fewbit, llama, kv, sentence):
    for words in (("eval", llama, "--window", 64), ("generate", llama, "It was")):
        ran = fewbit(*words, "--kv", kv)
        assert ran.code == 2
        assert sentence in ran.err
        assert "Traceback" not in ran.err


def test_steps_that_quantize_stored_are_what_eval_and_generate_use(fewbit, llama):
    words = ("-r", "rtn", "--group-size", 32, "--samples", 2, "--seqlen", 32, "--kv", "fp8-tensor")
    fewbit("quantize", llama, *words, "-o", "out")
    found = fewbit("eval", "out", "--window", 96, "--windows", 1, "--json").json
    assert (found["kv"], found["chunk"]) == ("fp8-tensor", 64)
    assert found["cache_bytes"] == 96 * 2 * 2 * 2 * 16
    plain = fewbit("eval", "out", "--window", 96, "--windows", 1, "--kv", "float", "--json").json
    assert (plain["kv"], plain["chunk"]) == (None, None)
    assert found["perplexity"] != plain["perplexity"]
    assert "KV cache fp8-tensor:" in fewbit("generate", "out", "It was", "--max-new-tokens", 3).err
    ran = fewbit("quantize", llama, *words[:-1], "kivi4", "-o", "other")
    assert ran.code == 2
    assert "a checkpoint has nothing to store" in ran.err


def test_an_unknown_layout_is_named_without_the_parser_s_own_words(fewbit, llama):
    ran = fewbit("export", llama, "--to", "foo", "-o", "out")
    assert ran.code == 2
    assert "Invalid value for '--to': 'foo' is not one of" in ran.err
    assert "Value error" not in ran.err
