"""What a person meets who opens a report: nothing fails, tables sort, phones and the dark are served."""

import numpy as np
import pytest

from fewbit.report import (
    Axis,
    Cell,
    Column,
    Drawn,
    Section,
    Series,
    chart,
    facts,
    heat_map,
    histogram,
    page,
    table,
    write,
)

SIZES = (("b", "1.2 MB", 1.2e6), ("a10", "900 kB", 9e5), ("a9", "40 MB", 4e7), ("c", None, None))


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A page with one of everything."""
    points = [(2, 0.5), (3, 0.1), (4, 0.02)]
    columns = [
        Column(name="layer"),
        Column(name="size", number=True),
        *(Column(name=f"more {i}") for i in range(9)),
    ]
    rows = [(n, Cell(text=t, value=v) if t else None, *["some words"] * 9) for n, t, v in SIZES]
    both = [
        Series(name="recipes", points=points, labels=["x", "y", "z"], drawn=Drawn.POINTS, written=True),
        Series(name="front", points=points),
    ]
    counts, edges = np.histogram(np.linspace(-1, 1, 500) ** 3, 40)
    axes = {"x": Axis(label="bits per weight"), "y": Axis(label="KL", log=True)}
    parts = [
        chart(both, **axes, title="KL against bits"),
        heat_map(np.eye(40, 90) + 0.01, x="channel", y="token", unit="|x|", title="Heat", marks=[7]),
        histogram(counts.tolist(), edges.tolist(), x="weight", title="Weights", grid=[-0.5, 0.0, 0.5]),
    ]
    sections = [
        Section(title="In short", parts=[facts([("model", "a" * 90)]), "Words. " * 30]),
        Section(title="Pictures", parts=parts),
        Section(title="Layers", parts=[table(columns, rows, caption="All layers", marked=[0])]),
    ]
    path = tmp_path_factory.mktemp("report") / "report.html"
    write(path, page("A report", sections))
    return path


def names(page):
    """The first column of the table of layers, from top to bottom."""
    return page.locator("#s2 tbody th").all_inner_texts()


def sorts(page):
    return [th.get_attribute("aria-sort") for th in page.locator("#s2 thead th").all()[:2]]


def test_it_opens_quietly_and_alone(visit, report):
    page = visit(report)
    assert page.said == []
    assert page.asked == [report.as_uri()] + [u for u in page.asked[1:] if u.startswith("data:")]
    assert page.title() == "A report"


def test_pictures_are_drawn(visit, report):
    page = visit(report)
    boxes = [svg.bounding_box() for svg in page.locator("figure > svg").all()]
    assert len(boxes) == 3
    assert all(b["width"] > 300 and b["height"] > 150 for b in boxes)
    image = page.locator("svg image").first.get_attribute("href")
    loaded = (
        "u => new Promise(r => { const i = new Image(); i.onload = () => r([i.width, i.height]); i.src = u })"
    )
    assert page.evaluate(loaded, image) == [90, 40]
    bar = page.locator("svg .bar").first.evaluate("e => getComputedStyle(e).fill")
    assert bar == "rgb(0, 104, 168)"  # the style sheet reaches into pictures


def test_a_click_sorts_by_value(visit, report):
    page = visit(report)
    size = page.locator("#s2 thead button", has_text="size")
    size.click()
    assert names(page) == ["a9", "b", "a10", "c"]  # the largest first, the unknown last
    assert sorts(page) == ["none", "descending"]
    size.click()
    assert names(page) == ["a10", "b", "a9", "c"]
    page.locator("#s2 thead button", has_text="layer").click()
    assert names(page) == ["a9", "a10", "b", "c"]  # as people count
    assert sorts(page) == ["ascending", "none"]


def test_keys_sort_as_the_mouse_does(visit, report):
    page = visit(report)
    for _ in range(40):  # links, the details of the chart, the frame of the table, then its buttons
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.textContent") == "size":
            break
    ring = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert ring == "solid"  # where one is can be seen
    page.keyboard.press("Enter")
    assert sorts(page) == ["none", "descending"]
    page.keyboard.press("Space")
    assert sorts(page) == ["none", "ascending"]


@pytest.mark.parametrize("width", [400, 320])
def test_a_phone_scrolls_one_way(visit, report, width):
    page = visit(report, width=width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    frame = page.locator(".frame").last
    assert frame.evaluate("e => e.scrollWidth > e.clientWidth")  # the table does in its frame
    heights = "[...document.querySelectorAll('figure > svg text')].map(e => e.getBoundingClientRect().height)"
    smallest = min(page.evaluate(heights))
    assert smallest >= 8


CONTRAST = """() => {
  const lum = c => { const v = c.match(/[\\d.]+/g).slice(0, 3).map(x => x / 255)
    .map(x => x <= 0.03928 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
    return 0.2126 * v[0] + 0.7152 * v[1] + 0.0722 * v[2]; };
  const ground = e => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor;
    if (!/, 0\\)$/.test(c)) return c; } return 'rgb(255, 255, 255)'; };
  const out = [], all = 'h1, h2, p, a, dt, dd, th, td, caption, summary, svg text, .line';
  for (const e of document.querySelectorAll(all)) {
    const s = getComputedStyle(e), svg = e.closest('svg');
    const c = e.matches('.line') ? s.stroke : svg ? s.fill : s.color;
    const [a, b] = [lum(c), lum(ground(e))];
    out.push([e.tagName, (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05)]);
  }
  return out; }"""


@pytest.mark.parametrize("dark", [False, True])
def test_text_stands_out_from_its_ground(visit, report, dark):
    """WCAG 2.2: 4.5 to 1 for text, 3 to 1 for lines of pictures."""
    page = visit(report, dark=dark)
    found = page.evaluate(CONTRAST)
    assert len(found) > 40
    assert [x for x in found if x[1] < (3 if x[0] == "path" else 4.5)] == []
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (paper == "rgb(20, 23, 27)") is dark


def test_paper_shows_the_whole_table(visit, report):
    page = visit(report, dark=True)
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.locator(".frame").last.evaluate("e => getComputedStyle(e).overflowX") == "visible"
