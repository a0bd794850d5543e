"""memory: from a folder, a configuration alone, a GGUF package; bad input in one sentence."""

import json

import pytest
from tiny import tiny

from fewbit.analyze.gpus import GPUS
from fewbit.analyze.memory import CACHES, SCHEMES


@pytest.fixture
def config_only(tmp_path):
    """A folder with nothing but config.json."""
    folder = tmp_path / "bare"
    tiny("gemma3").config.save_pretrained(folder)
    return folder


def test_a_configuration_alone_is_enough(fewbit, llama, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_bytes((llama / "config.json").read_bytes())
    alone, whole = fewbit("memory", bare, "--json").json, fewbit("memory", llama, "--json").json
    assert alone["inference"] == whole["inference"]
    assert alone["training"] == whole["training"]


def test_of_a_hub_model_the_configuration_alone_is_downloaded(fewbit, llama, tmp_path, monkeypatch):
    import huggingface_hub

    asked = []

    def download(name, *, allow_patterns, ignore_patterns):
        asked.append((name, allow_patterns))
        (tmp_path / "config.json").write_bytes((llama / "config.json").read_bytes())
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    found = fewbit("memory", "someone/some-model", "--json").json
    assert asked == [("someone/some-model", ["config.json"])]
    assert found["model"]["name"] == "someone/some-model"


def test_json_holds_every_scheme_with_every_cache(fewbit, llama):
    found = fewbit("memory", llama, "--context", 64, "--batch", 3, "--json").json
    assert (found["context"], found["batch"]) == (64, 3)
    assert len(found["inference"]) == len(SCHEMES) * len(CACHES)
    row = next(r for r in found["inference"] if r["scheme"] == "bf16")
    assert row["total_bytes"] == row["weights_bytes"] + row["cache_bytes"] + row["activations_bytes"]
    assert row["weights_bytes"] == 2 * found["model"]["parameters"]
    assert row["cache_bytes"] == 3 * 64 * found["caches"][0]["bytes_per_token"]
    assert row["gpus"] == [str(gpu) for gpu in GPUS]
    assert [method["per_parameter"] for method in found["training"]] == [16, 16, 6, 10]
    assert found["reserve"] == 0.1


def test_the_text_names_schemes_caches_methods_and_gpus(fewbit, llama):
    ran = fewbit("memory", llama)
    assert ran.code == 0
    for word in ("W4A16 g64 symmetric", "nf4 g64", "mxfp4", "int4 per token and head", "FP8-LM", "QLoRA"):
        assert word in ran.out
    assert "128 tokens of context x 1" in ran.out  # what the model was made for, below the default
    assert "the head tied to them" in ran.out
    assert "because 128 does not divide 64 input columns" in ran.out
    assert "P100 or T4 16 GB" in ran.out
    assert all(len(line) <= 130 and line == line.rstrip() for line in ran.out.splitlines())


def test_sliding_windows_and_a_context_beyond_the_model_are_said(fewbit, config_only):
    ran = fewbit("memory", config_only, "--context", 4096)
    assert "beyond the sliding window of 16 tokens" in ran.out
    assert "at most 128 tokens of context, not 4,096" in ran.out


def test_what_is_not_modelled_is_said_and_not_guessed(fewbit, tmp_path):
    from transformers import MambaConfig

    config = MambaConfig(
        hidden_size=64, num_hidden_layers=2, vocab_size=100, architectures=["MambaForCausalLM"]
    )
    config.save_pretrained(tmp_path / "mamba")
    ran = fewbit("memory", tmp_path / "mamba")
    assert ran.code == 0, ran.err
    assert "not one of keys and values" in ran.out
    assert "With keys and values" not in ran.out
    tiny("bert").config.save_pretrained(tmp_path / "bert")
    assert "none: it keeps no keys and values" in fewbit("memory", tmp_path / "bert").out


def test_bad_input_is_one_sentence(fewbit, llama, tmp_path):
    for words, said in (
        ((llama, "--context", 0), "--context 0 is not a positive number"),
        ((llama, "--batch", -1), "--batch -1 is not a positive number"),
        ((tmp_path / "nowhere.gguf",), "There is no model at"),
        ((tmp_path,), "holds no safetensors"),
    ):
        ran = fewbit("memory", *words)
        assert ran.code == 2
        assert ran.out == ""
        assert said in ran.err
        assert ran.err.count("\n") == 1
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no-such-model"}))
    ran = fewbit("memory", tmp_path)
    assert ran.code == 2
    assert "no-such-model" in ran.err


def test_help_has_an_example(fewbit):
    assert "fewbit memory smollm2 --context 8192 --batch 4" in fewbit("memory", "--help").out
