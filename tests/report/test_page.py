"""A report is one file that needs nothing else, and what came from outside stays text in it."""

import re

import pytest
from markupsafe import Markup
from pages import Tree

from fewbit.errors import InputError
from fewbit.report import Axis, Cell, Column, Drawn, Section, Series, chart, facts, page, table, write

EVIL = '<script>alert("x")</script>&'


def everything():
    series = [
        Series(name=EVIL, points=[(1, 0.5), (2, 0.25)], labels=[EVIL, "b"], drawn=Drawn.POINTS, written=True),
        Series(name="line", points=[(1, 1), (2, 2)]),
    ]
    return page(
        EVIL,
        [
            Section(title=EVIL, parts=[EVIL, facts([(EVIL, EVIL)])]),
            Section(title="b", parts=[table([Column(name=EVIL, help=EVIL)], [[EVIL]], caption=EVIL)]),
            Section(title="c", parts=[chart(series, x=Axis(label=EVIL), y=Axis(label="y"), title=EVIL)]),
        ],
    )


def test_what_came_from_outside_is_never_markup():
    text = everything()
    tree = Tree(text)
    assert not tree.open
    assert EVIL not in text
    assert len(tree.all("script")) == 1  # the page's own
    assert "".join(tree.words).count(EVIL) > 10


def test_a_page_asks_nothing_of_the_network():
    tree = Tree(everything())
    policy = next(a["content"] for a in tree.all("meta") if "http-equiv" in a)
    assert policy.startswith("default-src 'none'")
    links = [v for _, attrs in tree.tags for k, v in attrs.items() if k in ("src", "href")]
    assert links
    assert all(v.startswith(("#", "data:")) for v in links)
    assert "url(" not in everything()
    assert "@import" not in everything()


def test_headings_are_linked_and_described():
    tree = Tree(everything())
    ids = {a["id"] for _, a in tree.tags if "id" in a}
    assert [a["href"] for a in tree.all("a")] == ["#s0", "#s1", "#s2"]
    assert {a["href"][1:] for a in tree.all("a")} <= ids
    assert all(a["aria-labelledby"] in ids for a in tree.all("section"))


def test_paragraphs_are_escaped_and_markup_is_kept():
    text = page("t", [Section(title="s", parts=["a < b", Markup("<em>c</em>")])])
    assert "<p>a &lt; b</p>" in text
    assert "<em>c</em>" in text


def test_colours_of_the_dark_are_those_of_the_light():
    """Every colour that one scheme names, the others name, too; and a page always has the same text."""
    css = re.findall(r":root \{(.*?)\}", everything(), re.S)
    light, dark, paper = (set(re.findall(r"--\w+", part)) for part in css)
    assert light == dark == paper
    assert everything() == everything()


def test_a_page_without_sections_is_refused():
    with pytest.raises(InputError, match="no section"):
        page("empty", [])


def test_a_file_appears_complete_or_not_at_all(tmp_path):
    write(tmp_path / "r.html", "text")
    assert (tmp_path / "r.html").read_text() == "text"
    assert [p.name for p in tmp_path.iterdir()] == ["r.html"]
    with pytest.raises(InputError, match="does not exist"):
        write(tmp_path / "no" / "r.html", "text")
    with pytest.raises(InputError, match="is a folder"):
        write(tmp_path, "text")


def test_tables_sort_by_values_and_show_texts():
    columns = [
        Column(name="layer"),
        Column(name="size", number=True),
        Column(name="KL", number=True, digits=2),
    ]
    rows = [("a", Cell(text="900 kB", value=9e5), 0.12345), ("b", Cell(text="1.2 MB", value=1.2e6), None)]
    text = table(columns, rows, caption="Layers", sorted_by=(1, "ascending"), marked=[1])
    tree = Tree(text)
    heads = [a for a in tree.all("th") if a.get("scope") == "col"]
    assert [a["aria-sort"] for a in heads] == ["none", "ascending", "none"]
    assert [a["data-v"] for a in tree.all("td")] == ["900000.0", "0.12345", "1200000.0", ""]
    assert [a.get("class") for a in tree.all("tr")][1:] == [None, "marked"]
    assert len(tree.all("button")) == 3
    assert "0.12" in tree.words
    assert "\N{EN DASH}" in tree.words
    assert "0.12345" not in tree.words
    with pytest.raises(InputError, match="row of 2 cells does not fit 3"):
        table(columns, [("a", 1)], caption="c")
