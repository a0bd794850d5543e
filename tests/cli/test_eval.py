"""eval: the keys of its JSON, the protocol beside the figures, bits and bytes of what is stored."""

import pytest
from safetensors.torch import load_file
from tiny import save_tiny


def test_eval_json(fewbit, llama, checkpoint):
    window = ("--window", 64, "--windows", 3)
    found = fewbit("eval", checkpoint, *window, "--against", llama, "--json").json
    contract = {"perplexity", "kl", "top1", "bits_per_weight", "size_bytes", "tokens", "seconds"}
    assert contract | {"join", "window", "windows", "stride", "data", "nll_error", "kl_error"} <= set(found)
    assert found["bits_per_weight"] == 4.5
    assert found["size_bytes"] == (checkpoint / "model.safetensors").stat().st_size
    assert found["tokens"] == 3 * 63
    assert found["join"] == "solid"
    assert found["data"].startswith("embedded:eval")
    assert 0 < found["kl"] < 0.1
    assert 0.5 < found["top1"] < 1
    plain = fewbit("eval", llama, *window, "--json").json
    assert plain["bits_per_weight"] == 32
    assert plain["parameters"] == found["parameters"] > 80_000
    assert plain["kl"] is None
    assert plain["perplexity"] == pytest.approx(found["perplexity"], rel=0.1)
    same = fewbit("eval", llama, *window, "--against", llama, "--json").json
    assert same["kl"] == 0
    assert same["top1"] == 1


def test_eval_for_people_tells_the_protocol(fewbit, llama, checkpoint, tmp_path):
    (tmp_path / "text.txt").write_text("Some line of a text.\n\nAnd another one, after a blank.\n" * 5)
    words = ("--data", "text.txt", "--join", "rows", "--window", 32, "--windows", 0, "--stride", 16)
    ran = fewbit("eval", checkpoint, *words, "--against", llama)
    assert ran.code == 0
    for said in ("windows of 32 tokens, stride 16, join rows", "text.txt", "standard error", "nats", "+-"):
        assert said in ran.out
    assert "window " in ran.err
    assert "window 1" not in ran.out


def test_a_masked_model_is_compared_without_a_perplexity(fewbit, tmp_path):
    save_tiny("bert", tmp_path / "bert")
    assert fewbit("quantize", "bert", "-r", "rtn", "--group-size", 32, "-o", "out").code == 0
    words = ("eval", "out", "--against", "bert", "--window", 32, "--windows", 2)
    found = fewbit(*words, "--json").json
    assert found["perplexity"] is None
    assert found["kl"] > 0
    assert "perplexity" not in fewbit(*words).out


def test_bits_of_what_is_stored(fewbit, llama, tmp_path):
    import torch
    from safetensors.torch import save_file

    save_tiny("llama", tmp_path / "half")
    path = tmp_path / "half" / "model.safetensors"
    save_file({k: v.to(torch.bfloat16) for k, v in load_file(path).items()}, path, {"format": "pt"})
    found = fewbit("eval", "half", "--window", 32, "--windows", 1, "--json").json
    assert found["bits_per_weight"] == 16
    assert found["nll_error"] is None  # one window has no spread
