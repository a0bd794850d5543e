"""search: a recipe file that quantize takes, at the bits that were asked for; bad input in one sentence."""

import pytest
import yaml

SMALL = ("--samples", 4, "--seqlen", 32)


@pytest.fixture
def found(fewbit, llama, tmp_path):
    """A search at 3 bits, and its file."""
    file = tmp_path / "mixed.yaml"
    return fewbit("search", llama, "--bits", 3.3, *SMALL, "-o", file, "--json").json, file


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
    assert report["expected_kl"] == pytest.approx(
        sum(r["coefficient"] * r["error"] for r in report["layers"])
    )
    more = fewbit("search", llama, "--bits", 3.9, *SMALL, "-o", tmp_path / "more.yaml", "--json").json
    assert more["expected_kl"] < report["expected_kl"]


def test_layers_with_one_input_choose_alike_when_told(fewbit, llama, tmp_path):
    words = ("--bits", 3.3, "--together", *SMALL, "-o", tmp_path / "a.yaml", "--json")
    rows = {r["layer"]: r["choice"] for r in fewbit("search", llama, *words).json["layers"]}
    for i in range(2):
        own = {k.rpartition(".")[2]: v for k, v in rows.items() if f"layers.{i}." in k}
        assert own["q_proj"] == own["k_proj"] == own["v_proj"]
        assert own["gate_proj"] == own["up_proj"]


def test_feedback_noise_and_no_data(fewbit, llama, tmp_path):
    file = tmp_path / "fed.yaml"
    words = ("-r", "gptq", "--choices", "2, 3,4", "--set", "group_size=32", "--bits", 3.5, *SMALL)
    ran = fewbit("search", llama, *words, "--coefficients", "noise", "--data", "random", "-o", file)
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
        (("--bits", 1.5, "-o", file), "1.5 bits per weight are fewer than the 2."),
        (("--bits", -1, "-o", file), "is not a positive number"),
        (("--bits", 3, "-o", there), "is there already"),
        (("--bits", 3, "-o", tmp_path / "no" / "r.yaml"), "has no folder"),
        (("--bits", 3, "--choices", "3", "-o", file), "leaves nothing to choose"),
        (("--bits", 3, "--choices", "2,x", "-o", file), "bits='x'"),
        (("--bits", 3, "-r", "awq", "-o", file), "changes more than single layers"),
        (("--bits", 3, "-r", "quanto", "-o", file), "has no setting 'bits'"),
        (("--bits", 5, "-r", "mofq", "--choices", "4,8", "-o", file), "chooses formats itself"),
        (("--bits", 3, "-r", "autoround", "-o", file), "learns from more than one layer"),
        (("--bits", 3, "--set", "group_size=48", "-o", file), "48"),
        (("--bits", 3, "--data", tmp_path / "no.txt", "-o", file), "no text file"),
        (("-o", file), "--bits"),
        (("--bits", 3), "--output"),
    ):
        ran = fewbit("search", llama, *words, *SMALL)
        assert ran.code == 2, (words, ran.err)
        assert said in ran.err
        lines = [line for line in ran.err.splitlines() if line.startswith("fewbit:")]
        assert len(lines) == 1
        assert ran.out == ""
        assert not file.exists()
    assert there.read_text() == "kept"


def test_help_has_an_example(fewbit):
    assert "fewbit search smollm2 --bits 3.25 -r higgs" in fewbit("search", "--help").out
