"""sensitivity: scores that outlive the process, the worst layers, and which score tells the truth."""

import json

import pytest

ROUNDED = ("-c", "rtn:bits=3,group_size=32", "-c", "rtn:bits=4,group_size=32")
SMALL = ("--samples", 8, "--seqlen", 48)


def lines(folder):
    return (folder / "scores.jsonl").read_text().splitlines()


def test_expected_and_measured_kl_order_the_layers_alike(fewbit, llama, tmp_path):
    ran = fewbit(
        "sensitivity", llama, *ROUNDED, "--scores", "output,fisher,noise,kl", *SMALL,
        "-o", tmp_path / "s", "--json",
    ).json  # fmt: skip
    assert len(ran["layers"]) == 28
    for name, rho in ran["rank_correlation_with_kl"].items():
        assert rho["fisher"] > 0.9, name
        assert rho["noise"] > 0.9, name
        assert rho["output"] < rho["fisher"], name  # it knows nothing of what follows the layer
    for sums in ran["sums"].values():
        assert sums["fisher"] == pytest.approx(sums["kl"], rel=0.35)
        assert sums["noise"] == pytest.approx(sums["kl"], rel=0.35)
    assert json.loads((tmp_path / "s" / "sensitivity.json").read_text())["layers"] == ran["layers"]


def test_what_is_known_is_not_measured_again_and_a_search_takes_it(fewbit, llama, tmp_path):
    folder = tmp_path / "s"
    words = ("sensitivity", llama, "--scores", "fisher", *SMALL, "-o", folder)
    first = fewbit(*words, *ROUNDED, "--json").json
    assert len(lines(folder)) == 28
    whole = (folder / "scores.jsonl").read_bytes()
    (folder / "scores.jsonl").write_bytes(whole[: len(whole) // 2])  # a kill in mid-line
    ran = fewbit(*words, *ROUNDED, "--json")
    assert "13 of 28" in ran.err or "14 of 28" in ran.err
    assert ran.json["layers"] == first["layers"]
    assert len(lines(folder)) == 28
    fewbit(*words, *ROUNDED, "-c", "int8")
    assert len(lines(folder)) == 42  # the other formats were there
    search = ("search", llama, *ROUNDED, "-c", "int8", "--bits", 4.5, *SMALL)
    ran = fewbit(*search, "--from", folder, "-o", tmp_path / "a.yaml", "--json")
    assert "42 of 42" in ran.err
    assert "by gradients" not in ran.err
    alone = fewbit(*search, "-o", tmp_path / "b.yaml", "--json").json
    assert [r["choice"] for r in ran.json["layers"]] == [r["choice"] for r in alone["layers"]]
    other = fewbit(*search, "--seed", 1, "--from", folder, "-o", tmp_path / "c.yaml")
    assert "0 of 42" in other.err  # other tokens, other scores


def test_people_see_the_worst_layers_first(fewbit, llama, tmp_path):
    words = ("--scores", "output,kl", "--worst", 3, *SMALL, "-o", tmp_path / "s")
    out = fewbit("sensitivity", llama, *ROUNDED, *words).out.splitlines()
    at = out.index("worst layers, by kl")
    rows = out[at + 2 : at + 5]
    assert [float(r.split()[-1]) for r in rows] == sorted((float(r.split()[-1]) for r in rows), reverse=True)
    assert out[at + 5] == ""
    assert any(line.startswith("rank correlation") for line in out)


def test_bad_input_is_one_sentence(fewbit, llama, tmp_path):
    folder, file = tmp_path / "s", tmp_path / "file"
    file.write_text("")
    strange = tmp_path / "strange"
    strange.mkdir()
    (strange / "scores.jsonl").write_text("[]\n")
    for words, said in (
        (("--scores", "luck", "-c", "int8", "-c", "fp8", "-o", folder), "'luck'"),
        (("--scores", "fisher", "-c", "awq", "-o", folder), "changes more than single layers"),
        (("-c", "int8", "-c", "fp8", "--samples", 1, "-o", folder), "cannot be split"),
        (("-c", "int8", "-c", "fp8", "--kl-windows", 0, "-o", folder), "--kl-windows 0"),
        (("-c", "int8", "-c", "fp8", "--worst", 0, "-o", folder), "leaves no rows"),
        (("-c", "int8", "-c", "fp8", "-o", file), "cannot keep scores"),
        (("-c", "int8", "-c", "fp8", "-o", strange), "is not what fewbit sensitivity writes"),
    ):
        ran = fewbit("sensitivity", llama, *SMALL, *words)
        assert ran.code == 2, (words, ran.err)
        assert said in ran.err, (words, ran.err)
        assert ran.out == ""
    assert not folder.exists()


def test_help_has_an_example(fewbit):
    assert "fewbit sensitivity smollm2 -c" in fewbit("sensitivity", "--help").out
