"""Tables in a page: what they hold, and that the page around them is left alone."""

import pytest

import fewbit
from fewbit.compare import Comparison, Row
from fewbit.compare.markdown import check_page, markdown, publish
from fewbit.errors import InputError

NOW, SECONDS = fewbit.__version__, {"cpu_seconds": 9.0, "wall_seconds": 3.0}
FIGURES = {"kl_error": 0.01, "top1": 0.9, "perplexity": 9.0} | SECONDS
ROWS = (
    Row(
        name="a|b", heading="2 bit", key="a", bits=2.0, kl=0.1, on="H100", peak_bytes=5_000_000,
        versions={"fewbit": NOW}, **FIGURES,
    ),
    Row(
        name="old", heading="4 bit", key="b", bits=4.0, kl=0.1, on="CPU", versions={"fewbit": "before"},
        **FIGURES,
    ),
    Row(name="bad", heading="4 bit", key="bad", error="it broke"),
)  # fmt: skip
TASK = {"task": "copa", "value": 0.5}
ORIGINAL = Row(name="original", key="o", perplexity=8.0, tasks=(TASK,))
FOUND = Comparison(setup={}, original=ORIGINAL, rows=ROWS, missing=("4 bit/x",))


def test_a_table_for_each_heading_with_seconds_of_the_clock_on_a_gpu():
    text = markdown(FOUND)
    assert "### 2 bit" in text
    assert "| a\\|b | 2.000 | 0.1000 | 0.0100 | 90.0 | 9.00 |  | 3 | 5 | H100 |" in text
    assert "| old | 4.000 | 0.1000 | 0.0100 | 90.0 | 9.00 |  | 9 |  | CPU † |" in text
    for table in text.split("### ")[1:]:
        lines = [line for line in table.splitlines() if line.startswith("|")]
        assert len({line.replace("\\|", "").count("|") for line in lines}) == 1
    for said in (
        "copa %",
        "Original: perplexity 8.00",
        "earlier version",
        "Not measured yet: 4 bit/x.",
        "Failed: 4 bit/bad: it broke",
    ):
        assert said in text


def test_only_what_stands_between_the_marks_is_written(tmp_path):
    page = tmp_path / "page.md"
    parts = [f"<!-- fewbit compare: {name} -->\nold {name}\n<!-- end -->" for name in ("one", "two")]
    page.write_text(f"Before.\n{parts[0]}\nBetween.\n{parts[1]}\nAfter.\n")
    publish(page, "two", FOUND)
    text = page.read_text()
    assert text.startswith(f"Before.\n{parts[0]}\nBetween.\n<!-- fewbit compare: two -->\n")
    assert text.endswith("\n<!-- end -->\nAfter.\n")
    assert markdown(FOUND) in text
    assert "old two" not in text
    publish(page, "two", FOUND)
    assert page.read_text() == text


def test_a_page_is_made_or_needs_a_place(tmp_path):
    check_page(tmp_path / "new.md", "mine")
    publish(tmp_path / "new.md", "mine", FOUND)
    publish(tmp_path / "new.md", "mine", FOUND)
    assert (tmp_path / "new.md").read_text().count("### 2 bit") == 1
    with pytest.raises(
        InputError, match="no place for the tables; put the lines <!-- fewbit compare: other -->"
    ):
        check_page(tmp_path / "new.md", "other")
    with pytest.raises(InputError, match="cannot be read"):
        check_page(tmp_path, "mine")
