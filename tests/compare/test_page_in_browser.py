"""What a person meets who opens a report of a hundred rows."""

import pytest

from fewbit.compare import Comparison, Row
from fewbit.compare.page import report
from fewbit.report import write

SETUP = {
    "model": "m", "device": "cpu", "data": "text", "tasks": [], "limit": None,
    "calibration": {"samples": 1, "seqlen": 2, "source": "t", "seed": 0},
    "protocol": {"windows": 1, "window": 2, "join": "solid"},
}  # fmt: skip


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A report of 33 recipes under each of three headings; number 0 of each is the best."""
    rows = tuple(
        Row(
            name=f"recipe {i}", heading=f"{bits} bit", key=f"{bits} {i}", bits=bits + (33 - i) % 33 / 100,
            kl=10.0 ** (2 - bits) * (1 + i % 33), kl_error=0.01, top1=0.5, perplexity=9.0, cpu_seconds=1.0,
        )
        for bits in (2, 3, 4)
        for i in range(33)
    )  # fmt: skip
    original = Row(name="original", key="o", bits=32.0, perplexity=8.0)
    file = tmp_path_factory.mktemp("report") / "report.html"
    write(file, report(Comparison(setup=SETUP, original=original, rows=rows, missing=("4 bit/late",))))
    return file


def test_a_heading_is_a_table_that_sorts_and_the_front_is_set_off(path, visit):
    page = visit(path)
    tables = page.locator("#s1 table")
    assert tables.locator("caption").all_inner_texts() == ["2 bit", "3 bit", "4 bit"]
    assert page.locator("#s1 tr.marked th").all_inner_texts() == ["recipe 0"] * 3
    rows = tables.nth(1).locator("tbody th")
    assert rows.first.inner_text() == "recipe 0"
    firsts = set()
    for _ in range(2):  # one way and the other
        tables.nth(1).locator("thead button", has_text="KL").click()
        firsts.add(rows.first.inner_text())
    assert firsts == {"recipe 0", "recipe 32"}
    assert "Not measured yet: 4 bit/late." in page.locator("#s1").inner_text()
    assert (page.said, page.asked) == ([], [path.as_uri()])


def test_the_picture_names_the_front_alone(path, visit):
    page = visit(path)
    words = page.locator("figure svg[role=img] text.halo").all_text_contents()
    assert words == ["recipe 0"] * 3
    assert page.locator("figure svg[role=img] title").count() == 99  # the others tell the mouse


@pytest.mark.parametrize("dark", [False, True])
def test_a_phone_has_bits_and_kl_on_its_screen(path, visit, dark):
    page = visit(path, width=400, dark=dark)
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    head = page.locator("#s1 table").first.locator("thead th")
    for i in range(3):  # recipe, bits, KL
        box = head.nth(i).bounding_box()
        assert box["x"] + box["width"] <= 400
