"""quantize and plan: the plan, the answer, JSON keys, recipes as files; which stream says what."""

import json

import pytest

CALIBRATION = ("--samples", 4, "--seqlen", 32)
GPTQ = ("-r", "gptq", "--group-size", 32, *CALIBRATION)


def test_quantize_prints_the_plan_and_the_progress_aside_and_the_summary_as_its_answer(
    fewbit, llama, tmp_path
):
    ran = fewbit("quantize", llama, *GPTQ, "-o", "my out")
    assert ran.code == 0
    for said in ("14 to int4 group 32 symmetric", "4.50 per quantized weight", "4 x 32 tokens", "block 2/2"):
        assert said in ran.err
    assert "left" in next(line for line in ran.err.splitlines() if line.startswith("block 1/2"))
    for said in ("compressed-tensors", "372.0 kB -> ", "read back from disk"):
        assert said in ran.out
    assert f"fewbit eval 'my out' --data embedded:eval --against {llama}\n" in ran.out
    assert "fewbit generate 'my out' " in ran.out
    assert (tmp_path / "my out" / "model.safetensors").is_file()
    again = fewbit("quantize", llama, *GPTQ, "-o", "my out")
    assert again.code == 0
    assert "nothing to do" in again.out


def test_the_next_commands_that_quantize_names_work(fewbit, llama):
    ran = fewbit("quantize", llama, "-r", "rtn", "--group-size", 32, "-o", "out")
    follow = [line.split() for line in ran.out.split("Next:\n")[1].splitlines()]
    assert [words[1] for words in follow] == ["eval", "generate"]
    assert fewbit(*follow[0][1:], "--window", 32, "--windows", 2).code == 0
    assert fewbit("generate", follow[1][2], "The capital of France is", "--max-new-tokens", 2).code == 0


def test_quantize_json(fewbit, llama):
    found = fewbit("quantize", llama, *GPTQ, "-o", "out", "--json").json
    assert {
        "output",
        "model",
        "recipe",
        "checkpoint",
        "bits_per_weight",
        "size_bytes",
        "source_bytes",
    } <= set(found)
    assert {"layers", "mean_error", "reload_difference", "resumed_blocks", "seconds"} <= set(found)
    assert found["output"] == "out"
    assert len(found["layers"]) == 14
    assert {"layer", "format", "solver", "bits_per_weight", "error", "tokens", "notes"} <= set(
        found["layers"][0]
    )
    assert found["layers"][0]["tokens"] == 4 * 32


def test_plan_says_what_quantize_then_does_and_writes_nothing(fewbit, llama, tmp_path):
    plan = fewbit("plan", llama, *GPTQ, "--json").json
    assert list(tmp_path.iterdir()) == []
    assert plan["calibration_tokens"] == 128
    done = fewbit("quantize", llama, *GPTQ, "-o", "out", "--json").json
    key = ("layer", "format", "solver", "bits_per_weight")
    rows = [sorted(tuple(layer[k] for k in key) for layer in found["layers"]) for found in (plan, done)]
    assert rows[0] == rows[1]
    assert plan["bits_per_weight"] == done["bits_per_weight"] == 4.5
    assert plan["checkpoint"] == done["checkpoint"]
    assert plan["size_bytes"] == pytest.approx(done["size_bytes"], rel=0.1)


def test_plan_for_people(fewbit, llama):
    ran = fewbit("plan", llama, "-r", "nf4", "--group-size", 32)
    assert ran.code == 0
    assert ran.err == ""
    assert "fewbit's own" in ran.out
    assert "not compressed-tensors:" in ran.out
    assert "none needed" in ran.out
    assert "model.layers.*.mlp.down_proj" in ran.out
    assert "[64, 128]" in ran.out


def test_a_saved_recipe_gives_the_same_codes_again(fewbit, llama, tmp_path):
    settings = ("--bits", 3, "--set", "symmetric=false", "--set", "damp=0.02", "--group-size", 32)
    assert fewbit("quantize", llama, "-r", "gptq", *settings, *CALIBRATION, "-o", "a").code == 0
    ran = fewbit("quantize", llama, "--recipe-file", "a/fewbit_recipe.yaml", *CALIBRATION, "-o", "b")
    assert ran.code == 0
    a, b = ((tmp_path / name / "model.safetensors").read_bytes() for name in "ab")
    assert a == b
    assert fewbit("quantize", llama, *GPTQ, "-o", "c").code == 0
    assert (tmp_path / "c" / "model.safetensors").read_bytes() != a


def test_shorthands_are_settings(fewbit, llama):
    short = fewbit("plan", llama, "-r", "rtn", "--bits", 3, "--group-size", 32, "--json").json
    settings = ("--set", "bits=3", "--set", "group-size=32")
    long = fewbit("plan", llama, "-r", "rtn", *settings, "--json").json
    assert short["layers"] == long["layers"]
    assert short["layers"][0]["format"].startswith("int3 group 32")


def test_seed_samples_and_text_reach_the_calibration(fewbit, llama, tmp_path):
    (tmp_path / "text.txt").write_text("One line of some text, and then another one.\n" * 400)
    hashes = set()
    for i, more in enumerate((("--seed", 1), ("--seed", 2), ("--calibration", "text.txt"), ("--samples", 5))):
        assert fewbit("quantize", llama, *GPTQ, *more, "-o", f"out{i}").code == 0
        manifest = json.loads((tmp_path / f"out{i}" / "fewbit_manifest.json").read_text())
        hashes.add(manifest["job"]["calibration"]["tokens_sha256"])
    assert len(hashes) == 4


def test_depth_block_runs(fewbit, llama):
    found = fewbit("quantize", llama, *GPTQ, "--depth", "block", "-o", "out", "--json").json
    assert found["layers"][0]["tokens"] == 128


def test_a_checkpoint_that_is_not_read_back_is_said_not_to_be(fewbit, llama, tmp_path):
    ran = fewbit("quantize", llama, "-r", "rtn", "--group-size", 32, "--no-read-back", "-o", "out")
    assert ran.code == 0
    assert "reading it back" not in ran.err
    assert "not read back, as asked" in ran.out
    manifest = json.loads((tmp_path / "out" / "fewbit_manifest.json").read_text())
    assert manifest["reload_difference"] is None
    other = fewbit("quantize", llama, "-r", "rtn", "--group-size", 32, "-o", "read", "--json").json
    assert other["reload_difference"] < 1e-5
    a, b = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("out", "read"))
    assert a == b


@pytest.mark.slow
def test_the_packaged_gguf_tells_what_it_stands_for(fewbit):
    ran = fewbit("plan", "smollm2", "-r", "rtn", "--group-size", 64)
    assert "269.0 MB in bfloat16 (as quantized GGUF 98.4 MB) -> about" in ran.out
