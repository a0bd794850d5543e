"""recipes and formats: everything there is, with settings that --set takes as they are shown."""

import pytest
import yaml

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
def test_every_recipe_plans_with_its_defaults_shown_and_prints_as_a_file(fewbit, llama, tmp_path, name):
    listed = next(e for e in fewbit("recipes", "--json").json["recipes"] if e["name"] == name)["settings"]
    shown = {**listed, "group_size": 32}
    words = [word for key, value in shown.items() for word in ("--set", f"{key}={value}")]
    ran = fewbit("recipes", name, *words)
    (tmp_path / "mine.yaml").write_text(ran.out)
    assert yaml.safe_load(ran.out) == fewbit("recipes", name, *words, "--json").json
    calibrated = (llama, *CALIBRATION, "--json")
    by_name = fewbit("plan", *calibrated, "-r", name, "--group-size", 32).json
    by_file = fewbit("plan", *calibrated, "--recipe-file", "mine.yaml").json
    assert by_name["layers"] == by_file["layers"]


def test_formats(fewbit):
    found = fewbit("formats", "--json").json["formats"]
    assert [each["name"] for each in found] == [grid.name for grid in GRIDS]
    e4m3 = next(each for each in found if each["name"] == "e4m3fn")
    assert (e4m3["bits"], e4m3["max"], e4m3["distinct"]) == (8, 448, 253)
    table = fewbit("formats").out.splitlines()
    assert len(table) == len(GRIDS) + 1
    assert all(len(line) <= 120 and line == line.rstrip() for line in table)
