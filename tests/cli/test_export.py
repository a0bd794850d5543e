"""export: what a user sees of a change of layout, and bad input in one sentence."""

import pytest
import torch

from fewbit.io.source import open_source
from fewbit.stream.layouts import TARGETS


@pytest.fixture(scope="module")
def rounded(llama, tmp_path_factory):
    """A checkpoint in 4 bits, asymmetric: compressed-tensors."""
    from fewbit.recipe import named
    from fewbit.stream.quantize import quantize

    out = tmp_path_factory.mktemp("rounded") / "q"
    quantize(llama, named("rtn", {"group_size": "32", "symmetric": "false"}), output=out, read_back=False)
    return out


def test_a_lossless_export_says_what_went_where(fewbit, rounded, tmp_path):
    ran = fewbit("export", rounded, "--to", "awq", "-o", tmp_path / "out", "--no-verify")
    assert ran.code == 0, ran.err
    assert "awq: 14 layers int4 group 32 asymmetric (fp16 scales)" in ran.out
    assert "14 of 14 layers code for code" in ran.out
    assert "lm_head.weight: is model.embed_tokens.weight" in ran.out
    assert "verified    no, as asked" in ran.out
    assert "tensor 20/20" in ran.err
    assert open_source(tmp_path / "out").quantization_config["quant_method"] == "awq"


def test_json_has_every_layer_that_was_rounded_again(fewbit, rounded, tmp_path):
    words = ("--to", "bitsandbytes", "--requantize", "--no-verify", "--json")
    report = fewbit("export", rounded, *words, "-o", tmp_path / "out").json
    assert report["layers"] == len(report["requantized"]) == 14
    assert report["verified"] is False
    errors = [row["error"] for row in report["requantized"]]
    assert errors == sorted(errors, reverse=True)
    assert 0 < errors[-1] < errors[0] < 0.05
    text = fewbit("export", rounded, *words[:-1], "-o", tmp_path / "again").out
    assert "fewbit eval" in text
    assert "The 5 layers" in text


def test_bad_input_is_one_sentence_and_leaves_nothing(fewbit, llama, rounded, tmp_path):
    there = tmp_path / "there"
    there.mkdir()
    (there / "kept").write_text("kept")
    for words, said in (
        ((rounded, "--to", "fp8"), "layers.0.mlp.down_proj cannot be exported as it is: FP8 files hold E4M3"),
        ((rounded, "--to", "exl2"), "exl2"),
        ((llama, "--to", "gptq"), "holds no quantized weights"),
        ((tmp_path / "nothing", "--to", "gptq"), "nothing"),
        ((rounded, "--to", "gptq", "--shard-size", "five"), "'five' is no size"),
        ((rounded, "--to", "gguf"), "ends in .gguf"),
        ((rounded,), "--to"),
    ):
        ran = fewbit("export", *words, "-o", tmp_path / "out")
        assert ran.code == 2, (words, ran.err)
        assert said in ran.err
        assert sum(line.startswith("fewbit:") for line in ran.err.splitlines()) == 1
        assert ran.out == ""
    ran = fewbit("export", rounded, "--to", "gptq", "-o", there)
    assert ran.code == 2
    assert "holds something already" in ran.err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["there"]
    assert (there / "kept").read_text() == "kept"


def test_gguf_is_one_file_that_holds_the_same_codes(fewbit, llama, tmp_path):
    made = ("--bits", 8, "--group-size", 32, "--set", "scale=fp16", "--no-read-back")
    assert fewbit("quantize", llama, "-r", "rtn", *made, "-o", tmp_path / "q").code == 0
    ran = fewbit("export", tmp_path / "q", "--to", "gguf", "-o", tmp_path / "a.gguf")
    assert ran.code == 0, ran.err
    assert "14 tensors Q8_0" in ran.out
    a, b = open_source(tmp_path / "q"), open_source(tmp_path / "a.gguf")
    name = "model.layers.1.mlp.down_proj"
    assert torch.equal(a.read_qtensor(name).codes, b.read_qtensor(name).codes)
    again = fewbit(
        "export", tmp_path / "a.gguf", "--to", "compressed-tensors", "-o", tmp_path / "c", "--no-verify"
    )
    assert "14 of 14 layers code for code" in again.out, again.err


def test_gguf_says_that_steps_of_keys_and_values_stay_behind(fewbit, llama, tmp_path):
    made = ("--kv", "fp8-tensor", "--set", "format=q8_0", "--samples", 4, "--seqlen", 32, "--no-read-back")
    assert fewbit("quantize", llama, "-r", "rtn", *made, "-o", tmp_path / "q").code == 0
    export = ("export", tmp_path / "q", "--to", "gguf", "-o")
    assert "keys and values stay behind" in " ".join(fewbit(*export, tmp_path / "a.gguf").out.split())
    (said,) = fewbit(*export, tmp_path / "b.gguf", "--json").json["caveats"]
    assert "keys and values stay behind" in said


def test_help_has_an_example_and_names_every_target(fewbit):
    text = fewbit("export", "--help").out
    assert "fewbit export out/smollm2-w4a16 --to gptq" in text
    assert all(target in text.replace("\n", " ") for target in TARGETS)
