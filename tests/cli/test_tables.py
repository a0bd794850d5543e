"""recipes and formats: everything there is, with settings that --set takes as they are shown."""

import pytest
import yaml

from fewbit.analyze.hardware import FOOTNOTES, GENERATIONS, NUMBER_TYPES
from fewbit.format.codec import from_plain
from fewbit.format.named import FORMATS
from fewbit.grid import GRIDS
from fewbit.recipe import RECIPES

CALIBRATION = ("--samples", 4, "--seqlen", 32)


def test_recipes(fewbit):
    found = fewbit("recipes", "--json").json["recipes"]
    assert [each["name"] for each in found] == [f.__name__.replace("_", "-") for f in RECIPES]
    gptq = next(each for each in found if each["name"] == "gptq")
    assert gptq["settings"]["bits"] == 4
    assert gptq["settings"]["act_order"] is True
    listed = fewbit("recipes").out
    for each in found:
        assert each["description"]
        assert f"{each['name']}: {each['description']}\n" in listed
    assert "group_size=128, symmetric=true, grid=none" in listed


@pytest.mark.parametrize("name", [f.__name__.replace("_", "-") for f in RECIPES])
def test_every_recipe_plans_with_its_defaults_shown_and_prints_as_a_file(fewbit, llama, bert, tmp_path, name):
    listed = next(e for e in fewbit("recipes", "--json").json["recipes"] if e["name"] == name)["settings"]
    of_encoder = "embedding_bits" in listed
    shown = {**listed, **({"group_size": 32} if "group_size" in listed else {})}
    shown |= {"groups": 4} if of_encoder and "groups" in listed else {}
    words = [word for key, value in shown.items() for word in ("--set", f"{key}={value}")]
    ran = fewbit("recipes", name, *words)
    (tmp_path / "mine.yaml").write_text(ran.out)
    assert yaml.safe_load(ran.out) == fewbit("recipes", name, *words, "--json").json
    text = ("--data", bert.parent / "sentences.txt") if of_encoder else ()
    calibrated = (bert if of_encoder else llama, *CALIBRATION, *text, "--json")
    by_name = fewbit("plan", *calibrated, "-r", name, *words).json
    by_file = fewbit("plan", *calibrated, "--recipe-file", "mine.yaml").json
    assert by_name["layers"] == by_file["layers"]


# -- formats


def test_formats(fewbit):
    found = fewbit("formats", "--json").json
    assert [each["name"] for each in found["formats"]] == [grid.name for grid in GRIDS]
    e4m3 = next(each for each in found["formats"] if each["name"] == "e4m3fn")
    assert (e4m3["bits"], e4m3["max"], e4m3["distinct"]) == (8, 448, 253)
    assert [each["name"] for each in found["block_formats"]] == list(FORMATS)
    lines = fewbit("formats").out.splitlines()
    assert len(lines) == len(GRIDS) + len(FORMATS) + 4  # two headings, a blank line, a sentence
    assert all(len(line) <= 120 and line == line.rstrip() for line in lines)


def test_block_formats_are_read_as_their_definitions(fewbit):
    found = {each["name"]: each for each in fewbit("formats", "--json").json["block_formats"]}
    assert {name: each["bits_per_value"] for name, each in found.items()} == {
        name: fmt.bits_per_weight((4096, 4096)) for name, fmt in FORMATS.items()
    }
    for name, fmt in FORMATS.items():
        assert from_plain(found[name]["definition"]) == fmt
    row = found["nvfp4"]
    assert (row["element"], row["block"], row["range"]) == ("e2m1", "16 in a row", "absmax")
    assert row["step"] == "ue4m3 x fp32 for the tensor"
    assert found["mxfp4"]["range"] == "2^n, floor"
    assert found["nf4-dq"]["step"] == "dynamic8 x fp32 for 256 of them + mean"
    assert found["mx9"]["step"] == "micro1 x e8m0 for 8 of them"
    assert found["qoq"]["zero"] == "integer"


def test_formats_by_name(fewbit):
    both = fewbit("formats", "NF4", "e4m3", "--json").json
    assert [each["name"] for each in both["formats"]] == ["nf4", "e4m3fn"]
    assert [each["name"] for each in both["block_formats"]] == ["nf4"]
    assert fewbit("formats", "e2m1").out.splitlines()[-1].startswith("e2m1")
    assert len(fewbit("formats", "mxfp4").out.splitlines()) == 3
    assert fewbit("formats", "q2.5", "--json").json["formats"][0]["bits"] == 8
    sized = fewbit("formats", "qoq-g64", "mxfp4-even-g16", "--json").json["block_formats"]
    assert [(row["name"], row["block"]) for row in sized] == [
        ("qoq-g64", "64 in a row"),
        ("mxfp4-even-g16", "16 in a row"),
    ]


@pytest.mark.parametrize(("name", "near"), [("mxfp5", "mxfp4"), ("e4m2", "e4m3"), ("zzz", "fewbit formats")])
def test_an_unknown_name_is_one_sentence_with_near_ones(fewbit, name, near):
    ran = fewbit("formats", "nf4", name)
    assert (ran.code, ran.out) == (2, "")
    assert name in ran.err
    assert near in ran.err
    assert ran.err.count("\n") == 1


def test_hardware(fewbit):
    lines = fewbit("formats", "--hardware").out.splitlines()
    heads, rows = lines[:3], [line.split() for line in lines[3 : 3 + len(NUMBER_TYPES)]]
    assert heads[0].split()[:2] == ["P100", "V100"]
    assert heads[1].split()[:2] == ["Pascal", "Volta"]
    by_type = {row[0].split("(")[0]: row[1:] for row in rows}
    assert by_type["INT8"][:3] == ["stored(4)", "cores(5)", "tensor"]
    assert by_type["TF32"][:4] == ["-", "-", "-", "tensor"]
    assert len([line for line in lines if line.startswith("(")]) == len(FOOTNOTES)
    assert all(len(line) <= 120 for line in lines[: 3 + len(NUMBER_TYPES)])


def test_hardware_by_name_numbers_only_the_notes_it_shows(fewbit):
    out = fewbit("formats", "--hardware", "mxint8", "mx9").out
    assert [line.split()[0] for line in out.splitlines()[3:5]] == ["INT8", "mx9"]
    assert out.splitlines()[3].split()[1:4] == ["stored(1)", "cores(2)", "tensor"]
    assert set(out.splitlines()[4].split()[1:]) == {"stored"}


def test_hardware_as_data(fewbit):
    found = fewbit("formats", "--hardware", "--json").json
    assert [gpu["gpu"] for gpu in found["gpus"]] == [each.gpu for each in GENERATIONS]
    fp4 = next(each for each in found["types"] if each["type"] == "FP4")
    assert fp4["support"]["B200"] == "tensor"
    assert fp4["support"]["H100/H200"] == "stored"
