"""search: a recipe file that quantize takes, under the budget that was given; bad input in one sentence."""

from pathlib import Path

import pytest
import yaml

SMALL = ("--samples", 4, "--seqlen", 32)
HIGGS = ("-r", "higgs", "--choices", "2,3,4")
MIXED = ("-c", "rtn:bits=2,group_size=32", "-c", "gptq:grid=nf4,group_size=32", "-c", "rtn:format=mxfp4",
         "-c", "qtip:bits=3,state_bits=8", "-c", "fp8", "-c", "keep")  # fmt: skip


@pytest.fixture
def found(fewbit, llama, tmp_path):
    """A search at 3 bits, and its file."""
    file = tmp_path / "mixed.yaml"
    return fewbit("search", llama, "--bits", 3.3, *HIGGS, *SMALL, "-o", file, "--json").json, file


def weight_bytes(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.glob("*.safetensors"))


def test_quantize_takes_what_search_wrote_at_the_bits_it_said(fewbit, llama, found, tmp_path):
    report, file = found
    assert report["bits_per_weight"] <= 3.3
    assert report["bits_per_weight"] > 3.0
    assert {row["choice"] for row in report["layers"]} > {"higgs bits=2"}
    made = fewbit("quantize", llama, "--recipe-file", file, "-o", tmp_path / "out", "--json").json
    assert made["bits_per_weight"] == pytest.approx(report["bits_per_weight"], rel=1e-9)
    assert [r["layer"] for r in made["layers"]] == sorted(r["layer"] for r in report["layers"])
    said = {r["layer"]: r["error"] for r in report["layers"]}
    for row in made["layers"]:
        assert row["error"] == pytest.approx(said[row["layer"]], rel=1e-3)  # no inputs: the weight's own


def test_the_expected_kl_is_the_sum_over_layers_and_falls_with_the_budget(fewbit, llama, found, tmp_path):
    report, _ = found
    assert report["expected_kl"] == pytest.approx(sum(r["loss"] for r in report["layers"]))
    words = ("--bits", 3.9, *HIGGS, *SMALL, "-o", tmp_path / "more.yaml", "--json")
    assert fewbit("search", llama, *words).json["expected_kl"] < report["expected_kl"]


def test_integers_floats_mx_nf_and_codebooks_mix_with_float_layers(fewbit, llama, tmp_path):
    file = tmp_path / "mixed.yaml"
    ran = fewbit("search", llama, "--bits", 5.5, *MIXED, *SMALL, "-o", file, "--json").json
    used = {r["choice"] for r in ran["layers"]}
    assert len(used) >= 3
    assert ran["bits_per_weight"] <= 5.5
    made = fewbit(
        "quantize", llama, "--recipe-file", file, *SMALL, "-o", tmp_path / "out", "--json"
    ).json  # layers that stay are no rows of quantize
    float_layers = {r["layer"] for r in ran["layers"] if r["choice"] == "keep"}
    assert {r["layer"] for r in made["layers"]} == {r["layer"] for r in ran["layers"]} - float_layers


def test_a_size_is_that_of_the_file_on_disk(fewbit, llama, tmp_path):
    file, size = tmp_path / "r.yaml", 130_000
    words = ("--size", "130kB", *HIGGS, "-c", "int8", *SMALL)
    ran = fewbit("search", llama, *words, "-o", file, "--json").json
    fewbit("quantize", llama, "--recipe-file", file, "-o", tmp_path / "out")
    real = weight_bytes(tmp_path / "out")
    assert real <= size
    assert real == pytest.approx(ran["size_bytes"], rel=0.05)
    assert ran["bits_per_weight"] > 3  # it was used


def test_the_smallest_model_of_an_expected_kl(fewbit, llama, tmp_path):
    def ran(*words):
        file = tmp_path / f"{len(list(tmp_path.iterdir()))}.yaml"
        return fewbit("search", llama, *HIGGS, *SMALL, *words, "-o", file, "--json").json

    kl = ran("--bits", 3.0)["expected_kl"]
    back = ran("--max-kl", kl * 1.0001)
    assert back["expected_kl"] <= kl * 1.0001
    assert back["bits_per_weight"] <= 3.0
    assert ran("--max-kl", kl / 2)["bits_per_weight"] > back["bits_per_weight"]


def test_above_its_range_the_expected_kl_comes_with_a_warning(fewbit, llama, tmp_path):
    words = ("-c", "rtn:bits=2,group_size=-1", "-c", "rtn:bits=2,group_size=0", "--bits", 3, *SMALL)
    ran = fewbit("search", llama, *words, "-o", tmp_path / "a.yaml")
    kl = float(ran.out.split("KL ")[1].split()[0])
    assert ("expect a larger KL" in ran.out) == (kl > 0.3)


def test_for_vllm_fused_layers_choose_alike_and_only_what_it_reads_is_taken(fewbit, llama, tmp_path):
    file = tmp_path / "v.yaml"
    ran = fewbit("search", llama, "--bits", 5.5, "--for", "vllm", *SMALL, "-o", file, "--json").json
    rows = {r["layer"]: r["choice"] for r in ran["layers"]}
    assert len(set(rows.values())) > 1
    for i in range(2):
        own = {k.rpartition(".")[2]: v for k, v in rows.items() if f"layers.{i}." in k}
        assert own["q_proj"] == own["k_proj"] == own["v_proj"]
        assert own["gate_proj"] == own["up_proj"]
    made = fewbit("quantize", llama, "--recipe-file", file, *SMALL, "-o", tmp_path / "out", "--json").json
    assert made["checkpoint"] == "compressed-tensors"
    for word, why in (("qtip", "basis of their own"), ("nf4", "scales")):
        words = ("-c", "int8", "-c", word, "--for", "vllm", "--bits", 5, *SMALL, "-o", tmp_path / "no.yaml")
        ran = fewbit("search", llama, *words)
        assert ran.code == 2
        assert f"candidate {word!r} does not fit one compressed-tensors checkpoint" in ran.err
        assert why in ran.err


def test_layers_with_one_input_choose_alike_when_told(fewbit, llama, tmp_path):
    words = ("--bits", 3.3, *HIGGS, "--together", *SMALL, "-o", tmp_path / "a.yaml", "--json")
    rows = {r["layer"]: r["choice"] for r in fewbit("search", llama, *words).json["layers"]}
    for i in range(2):
        own = {k.rpartition(".")[2]: v for k, v in rows.items() if f"layers.{i}." in k}
        assert own["q_proj"] == own["k_proj"] == own["v_proj"]
        assert own["gate_proj"] == own["up_proj"]


def test_mofq_is_two_candidates_of_equal_bits(fewbit, llama, tmp_path):
    own = {
        "INT": "rtn:grid=int4-narrow,group_size=32,range=absmax",
        "FP": "rtn:grid=e2m1,group_size=32,range=absmax",
    }
    words = ("-c", own["INT"], "-c", own["FP"], "--score", "weight", "--bits", 5, *SMALL)
    ran = fewbit("search", llama, *words, "-o", tmp_path / "m.yaml", "--json").json
    chosen = {r["layer"]: r["choice"] for r in ran["layers"]}
    fewbit("quantize", llama, "-r", "mofq", "--group-size", 32, "-o", tmp_path / "mofq")
    made = yaml.safe_load((tmp_path / "mofq" / "fewbit_manifest.json").read_text())
    grids = {r["layer"]: "FP" if "e2m1" in str(r["format"]) else "INT" for r in made["layers"]}
    assert {layer: own[kind] for layer, kind in grids.items()} == chosen
    assert ran["expected_kl"] is None  # relative errors are no nats


def test_mixed_precision_is_8_bits_and_float_under_a_budget(fewbit, llama, tmp_path):
    words = ("-c", "int8", "-c", "keep", "--bits", 9.9, *SMALL, "-o", tmp_path / "b.yaml", "--json")
    ran = fewbit("search", llama, *words).json
    rows = {r["layer"]: r for r in ran["layers"]}
    kept = {n for n, r in rows.items() if r["choice"] == "keep"}
    assert 0 < len(kept) < len(rows) / 2
    assert all(rows[n]["bits_per_weight"] == 32 for n in kept)  # the tiny model is stored in float32


def test_feedback_noise_and_no_data(fewbit, llama, tmp_path):
    file = tmp_path / "fed.yaml"
    words = ("-r", "gptq", "--choices", "2, 3,4", "--set", "group_size=32", "--bits", 3.5, *SMALL)
    ran = fewbit("search", llama, *words, "--score", "noise", "--data", "random", "-o", file)
    assert ran.code == 0, ran.err
    assert "gptq bits=3" in ran.out
    assert "expected by the linear model" in ran.out
    rules = yaml.safe_load(file.read_text())["rules"]
    assert len(rules) == 14
    assert {rule["solver"]["type"] for rule in rules} == {"Ldlq"}


def test_bad_input_is_one_sentence_and_leaves_no_file(fewbit, llama, tmp_path):
    file = tmp_path / "r.yaml"
    there = tmp_path / "there.yaml"
    there.write_text("kept")
    for words, said in (
        (("--bits", 1.5, *HIGGS, "-o", file), "1.5 bits per weight are fewer than the 2."),
        (("--bits", -1, "-o", file), "is not a positive number"),
        (("-o", file), "no budget is given"),
        (("--bits", 3, "--max-kl", 0.1, "-o", file), "2 budgets are given"),
        (("--size", "many", "-o", file), "'many' is not a size"),
        (("--size", "1kB", *HIGGS, "-o", file), "embeddings, norms and head take"),
        (("--max-kl", 1e-12, *HIGGS, "-o", file), "below the"),
        (("--max-kl", 0.1, "--score", "output", "-o", file), "counts nats"),
        (("--bits", 40, "-c", "int8", "-c", "keep", "-o", file), "lets every layer stay as it is"),
        (("--bits", 3, "-o", there), "is there already"),
        (("--bits", 3, "-o", tmp_path / "no" / "r.yaml"), "has no folder"),
        (("--bits", 3, "-r", "higgs", "--choices", "3", "-o", file), "leaves nothing to choose"),
        (("--bits", 3, "-r", "higgs", "--choices", "2,x", "-o", file), "bits='x'"),
        (("--bits", 3, "--choices", "2,3", "-o", file), "belong to a recipe"),
        (("--bits", 3, "-c", "int8", "-o", file), "leaves nothing to choose"),
        (("--bits", 3, "-c", "int8", "-c", "int8", "-o", file), "given twice"),
        (("--bits", 3, "-c", "int8:x", "-c", "fp8", "-o", file), "which is no setting"),
        (("--bits", 3, "-r", "awq", "-o", file), "changes more than single layers"),
        (("--bits", 3, "-c", "mixed-precision", "-c", "int8", "-o", file), "changes more than single layers"),
        (("--bits", 3, "-r", "quanto", "-o", file), "has no setting 'bits'"),
        (("--bits", 5, "-r", "mofq", "--choices", "4,8", "-o", file), "chooses formats itself"),
        (("--bits", 3, "-r", "autoround", "-o", file), "learns from more than one layer"),
        (("--bits", 3, *HIGGS, "--set", "group_size=48", "-o", file), "48"),
        (("--bits", 3, "--data", tmp_path / "no.txt", "-o", file), "no text file"),
        (("--bits", 3, "--from", there, *HIGGS, "-o", file), "cannot keep scores"),
        (("--bits", 3), "--output"),
    ):
        ran = fewbit("search", llama, *words, *SMALL)
        assert ran.code == 2, (words, ran.err)
        assert said in ran.err, (words, ran.err)
        lines = [line for line in ran.err.splitlines() if line.startswith("fewbit:")]
        assert len(lines) == 1
        assert ran.out == ""
        assert not file.exists()
    assert there.read_text() == "kept"


def test_help_has_an_example(fewbit):
    assert "fewbit search smollm2 --bits 3.25" in fewbit("search", "--help").out
