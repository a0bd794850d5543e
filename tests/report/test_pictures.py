"""Charts, heat maps and histograms: positions are those of the values."""

import base64
import io
import math
import re

import numpy as np
import pytest
from pages import Tree

from fewbit.errors import InputError
from fewbit.report import Axis, Drawn, Series, chart, heat_map, histogram
from fewbit.report.heat import MOST, palette, png
from fewbit.report.scale import Scale, number, scale


def drawn(values, **options):
    made = heat_map(np.array(values), x="channel", y="token", unit="|x|", title="t", **options)
    return Tree(made)


def pixels(data):
    """[rows, columns, 3] of a PNG, read by matplotlib, which did not write it."""
    from matplotlib.image import imread

    return (imread(io.BytesIO(data), format="png")[..., :3] * 255).round().astype(np.uint8)


def image_of(tree, i=0):
    return pixels(base64.b64decode(tree.all("image")[i]["href"].partition(",")[2]))


def test_scales_put_ends_at_ends_and_a_decade_is_a_step():
    even = Scale(axis=Axis(label="x"), low=2, high=6, start=100, stop=200)
    assert [even(v) for v in (2, 4, 6)] == [100, 150, 200]
    log = Scale(axis=Axis(label="y", log=True), low=1, high=1000, start=300, stop=0)
    assert [log(v) for v in (1, 10, 100, 1000)] == pytest.approx([300, 200, 100, 0])


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (2, 8), (-0.3, 0.7), (1e-7, 3e-7), (1e5, 9e6), (3.0, 3.001), (5, 5)]
)
@pytest.mark.parametrize("log", [False, True])
def test_ticks_are_a_few_round_numbers_inside(low, high, log):
    if log and low <= 0:
        low = 1e-3
    own = scale(Axis(label="v", log=log), [low, high], 0, 600)
    ticks = own.ticks()
    assert 2 <= len(ticks) <= 13
    assert all(own.low <= t <= own.high for t in ticks)
    assert ticks == sorted(set(ticks))
    assert own.low < low
    assert own.high > high


def test_points_stand_where_their_values_are():
    made = chart(
        [Series(name="s", points=[(0, 1), (5, 10), (10, 100)], labels=["a", "b", "c"], drawn=Drawn.BOTH)],
        x=Axis(label="bits", low=0, high=10),
        y=Axis(label="KL", log=True, low=1, high=100),
        title="t",
    )
    line = next(a["d"] for a in Tree(made).all("path") if "line" in a.get("class", ""))
    (x0, y0), (x1, y1), (x2, y2) = [map(float, p.split()) for p in line[1:].split("L")]
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.2)
    assert y2 < y0  # up is more
    assert "s\nb\nbits: 5\nKL: 10" in Tree(made).words


def test_what_a_logarithm_cannot_show_is_counted():
    series = [Series(name="s", points=[(1, 0.0), (2, 1.0), (3, math.inf)], drawn=Drawn.POINTS)]
    made = chart(series, x=Axis(label="x"), y=Axis(label="y", log=True), title="t")
    assert "2 points left out" in made
    with pytest.raises(InputError, match="no point to show"):
        chart([Series(name="s", points=[(1, -1)])], x=Axis(label="x"), y=Axis(label="y", log=True), title="t")


def test_written_labels_do_not_lie_on_each_other():
    points = [(1 + 0.001 * i, 1 + 0.001 * i) for i in range(12)] + [(5, 5)]
    series = Series(name="s", points=points, labels=["label"] * 13, drawn=Drawn.POINTS, written=True)
    made = chart([series], x=Axis(label="x"), y=Axis(label="y"), title="t")
    halo = [a for a in Tree(made).all("text") if a.get("class") == "halo"]
    places = [(float(a["x"]), float(a["y"])) for a in halo if a["text-anchor"] == "start"]
    assert 2 <= len(halo) <= 13
    assert all(
        abs(a[0] - b[0]) >= 33 or abs(a[1] - b[1]) >= 12
        for i, a in enumerate(places)
        for b in places[i + 1 :]
    )


def test_all_figures_can_be_read_without_a_mouse():
    made = chart(
        [Series(name="s", points=[(1, 2.5)], labels=["w"], drawn=Drawn.POINTS)],
        x=Axis(label="x"),
        y=Axis(label="y"),
        title="t",
    )
    tree = Tree(made)
    assert tree.all("details")
    assert {"s", "w", "1", "2.5"} <= set(tree.words)
    assert tree.all("svg")[0]["role"] == "img"
    assert tree.all("svg")[0]["aria-label"] == "t"


def test_labels_belong_to_points():
    with pytest.raises(InputError, match="2 points and 1 label"):
        Series(name="s", points=[(1, 1), (2, 2)], labels=["a"])


def test_a_png_is_what_another_reader_sees():
    cells = np.arange(256, dtype=np.uint8).reshape(8, 32)
    assert (pixels(png(cells, palette())) == palette()[cells]).all()


def test_brighter_is_larger():
    light = palette().astype(float) @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(light) > 0).all()
    seen = image_of(drawn([[1, 10, 100], [1000, 1e-9, 100]])).astype(float).sum(-1)
    assert seen[1, 0] > seen[0, 2] == seen[1, 2] > seen[0, 1]
    assert seen[1, 1] == seen[0, 0]  # below the low end: as dark as it gets


def test_a_wide_matrix_keeps_its_outliers():
    values = np.full((3, 5000), 1.0)
    values[1, 3777] = 1e3
    tree = drawn(values, marks=[3777])
    seen = image_of(tree).astype(float).sum(-1)
    assert seen.shape == (3, MOST)
    assert np.argwhere(seen == seen.max()).tolist() == [[1, 3777 * MOST // 5000]]
    assert "token: 1\nchannel: 3777\n|x|: 1000" in tree.words
    assert "3777" in tree.words  # the mark


@pytest.mark.parametrize("values", [[[1, math.nan]], [], [1, 2]])
def test_a_heat_map_needs_a_finite_matrix(values):
    with pytest.raises(InputError, match="finite matrix"):
        drawn(values)


def test_a_heat_map_on_a_logarithm_needs_something_positive():
    with pytest.raises(InputError, match="no positive value"):
        drawn([[0.0, 0.0]])


def test_bars_and_grid_share_an_axis():
    made = histogram(
        [5, 0, 20], [-1.0, 0.0, 1.0, 2.0], x="w", title="t", grid=[-1.0, 0.0, 7.0], grid_name="g"
    )
    tree = Tree(made)
    bars = [a for a in tree.all("rect") if a["class"] == "bar"]
    lines = [float(re.match(r"M([\d.]+)", a["d"])[1]) for a in tree.all("path") if a["class"] == "grid"]
    assert len(bars) == 2  # nothing was counted in the middle
    assert float(bars[0]["x"]) == pytest.approx(lines[0], abs=0.1)
    assert float(bars[1]["height"]) > float(bars[0]["height"])
    assert "1 more lie outside" in made
    assert "-1 to 0: 5" in tree.words


def test_a_histogram_of_nothing_is_refused():
    for counts, edges in (([0, 0], [0, 1, 2]), ([1], [0, 1, 2])):
        with pytest.raises(InputError, match="cannot be drawn"):
            histogram(counts, edges, x="w", title="t")


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (0, "0"),
        (4.25, "4.25"),
        (1000, "1000"),
        (12345.6, "12346"),
        (1e-5, "1e-5"),
        (2.5e8, "2.5e8"),
        (-3, "-3"),
    ],
)
def test_figures_are_short(value, said):
    assert number(value) == said
