"""The report of a look, as text and in a browser."""

import json

import pytest
from pages import Tree

from fewbit.inspect import advise, look
from fewbit.inspect.plain import as_dict
from fewbit.inspect.report import report
from fewbit.stream.data import Calibration


@pytest.fixture(scope="module")
def text(seen):
    return report(seen)


@pytest.fixture(scope="module")
def page(text, tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(text)
    return path


def test_it_begins_with_what_to_do(text, seen):
    words = Tree(text).words
    command = advise(seen).command(seen.model)
    assert words.index(command) < words.index("Remedies", words.index("Every layer") + 1)


def test_it_says_where_outliers_are(text, planted, seen):
    said = " ".join(Tree(text).words)
    assert "Input of model.layers." in said
    for group in seen.groups:
        for channel in group.input.channels:
            assert str(channel.index) in said
    rows = [attrs for attrs in Tree(text).all("th") if attrs.get("scope") == "row"]
    assert len(rows) >= len(seen.layers)


def test_every_picture_is_there_and_named(text, seen):
    tree = Tree(text)
    names = [a["aria-label"] for a in tree.all("svg") if "aria-label" in a]
    assert len(names) == 4 + len(seen.pictures) * 4  # heat map, inputs before and after, weights
    assert not tree.open
    assert len(tree.all("image")) == 2 * len(seen.pictures)  # cells, and the bar of their colours


def test_a_model_without_attention_weights_and_rotation_has_a_report(folders):
    for arch, said in (("falcon", "returns no weights"), ("gemma3", "cannot be rotated")):
        text = report(look(folders / arch, Calibration(samples=2, seqlen=16)))
        assert said in text
        assert not Tree(text).open


def test_plain_data_is_json(seen, planted):
    data = json.loads(json.dumps(as_dict(seen), allow_nan=False))
    by_norm = {g["norm"]: {c["index"] for c in g["input"]["channels"]} for g in data["groups"] if g["norm"]}
    assert by_norm == planted[1]
    assert data["advice"]["w8a8"]["recipe"] == advise(seen).recipe
    assert len(data["residual"]) == len(data["attention"]) + 1 == 3
    assert set(data["remedies"]["w4a4"]) == set(data["groups"][0]["layers"][0]["errors"]["w4a4"])


def test_thirty_layers_stay_small(text, seen):
    """Rows and pictures are all that grows; the pictures are three."""
    rows = text.count("<tr")
    assert len(text) < 700_000
    assert rows < 150
    heaviest = max(len(line) for line in text.splitlines())
    assert heaviest < 100_000


@pytest.mark.parametrize("dark", [False, True])
def test_it_opens_quietly(visit, page, dark, seen):
    opened = visit(page, dark=dark)
    assert opened.said == []
    assert [u for u in opened.asked if not u.startswith(("data:", "file:"))] == []
    table = opened.locator("section").last.locator("table").last
    before = table.locator("tbody th").all_inner_texts()
    assert len(before) == len(seen.layers)
    table.locator("button", has_text="kurtosis").click()
    assert table.locator("tbody th").all_inner_texts() != before
    values = [float(v) for v in table.locator("tbody tr td:nth-child(5)").all_inner_texts()]
    assert values == sorted(values, reverse=True)


def test_it_fits_a_phone(visit, page):
    opened = visit(page, width=400)
    assert opened.evaluate("document.documentElement.scrollWidth") <= 400
