"""Pictures: what is drawn is what formats hold and what was measured; files appear whole or not at all."""

import sys
from xml.etree import ElementTree

import numpy as np
import pytest

from fewbit.analyze import error, plots
from fewbit.analyze.distribution import TABLED, Distribution, lower_bound
from fewbit.errors import InputError
from fewbit.grid import Int, Points, by_name


def drawn_at(axes, row: int) -> np.ndarray:
    """Where the lines of one row of a number line stand."""
    return np.array([segment[0][0] for segment in axes.collections[row].get_segments()])


@pytest.fixture(scope="module")
def picture():
    """The picture of errors, from few samples."""
    whole = error.random_samples
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(error, "random_samples", lambda law, seed: whole(law, seed)[:128])
        return plots.error_against_bits(samples=1 << 11)


def test_the_number_line_holds_every_value_of_every_format():
    grids = [by_name(name) for name in ("int4", "nf4", "e5m2", "q1.6")]
    linear, logarithmic = plots.number_line(grids).axes
    for row, grid in enumerate(grids):
        values = grid.value(grid.codes()).double()
        values = np.unique(values[values.isfinite()].numpy())
        assert drawn_at(linear, row) == pytest.approx(values / np.abs(values).max())
        assert len(drawn_at(logarithmic, row)) == len(np.unique(np.abs(values[values != 0])))
    assert [text.get_text().split()[0] for text in linear.get_yticklabels()] == [
        "int4",
        "nf4",
        "e5m2",
        "q1.6",
    ]


def test_integers_are_even_and_floats_bunch_near_zero():
    linear = plots.number_line([Int(8), by_name("e5m2")]).axes[0]
    even, floats = (np.diff(drawn_at(linear, row)) for row in (0, 1))
    assert even.max() == pytest.approx(even.min())
    assert floats.max() > 1000 * floats.min()


def test_without_names_a_choice_is_drawn():
    assert len(plots.number_line().axes[0].collections) == len(plots.POINTS)


@pytest.mark.parametrize(
    ("grids", "sentence"),
    [
        ([Points("corners", ((-1, -1), (1, 1)))], "coordinates"),
        ([by_name("fp32")], "too many"),
        ([Int(4)] * 41, "41 formats"),
    ],
)
def test_what_cannot_be_drawn_is_refused(grids, sentence):
    with pytest.raises(InputError, match=sentence):
        plots.number_line(grids)


def test_no_point_lies_below_the_bound_and_every_panel_has_every_family(picture):
    families = len(plots._SCALARS) + 2
    for axes, law in zip(picture.axes, TABLED, strict=True):
        clouds = [each.get_offsets() for each in axes.collections if len(each.get_offsets()) > 1]
        assert len(clouds) == families
        for bits, decibels in np.concatenate(clouds):
            assert decibels > 10 * np.log10(lower_bound(law, bits)) - 0.1


def test_the_bound_of_gauss_falls_6_02_decibels_a_bit(picture):
    bound = picture.axes[TABLED.index(Distribution.GAUSS)].lines[0]
    (x0, x1), (y0, y1) = bound.get_data()
    assert (y1 - y0) / (x1 - x0) == pytest.approx(-6.0206, abs=1e-3)


def test_labels_do_not_cover_each_other(picture):
    from matplotlib.text import Text

    picture.draw_without_rendering()
    for axes in picture.axes:
        boxes = [Text.get_window_extent(text) for text in axes.texts]  # of the words, without their lines
        assert len(boxes) == len(plots._BLOCKS) + len(plots._FLOATS)
        for i, box in enumerate(boxes):
            assert not any(box.overlaps(other) for other in boxes[:i])
            assert axes.get_window_extent().contains(box.x1, box.y1)


@pytest.mark.parametrize("suffix", plots.SUFFIXES)
def test_saving_twice_gives_the_same_bytes_and_nothing_else(tmp_path, suffix):
    files = [tmp_path / f"{name}{suffix}" for name in "ab"]
    for file in files:
        plots.save(plots.number_line([Int(4)]), file)
    assert files[0].read_bytes() == files[1].read_bytes()
    assert sorted(tmp_path.iterdir()) == files


def test_text_in_svg_stays_text(tmp_path):
    plots.save(plots.number_line([by_name("nf4")]), tmp_path / "a.svg")
    words = "".join(ElementTree.parse(tmp_path / "a.svg").getroot().itertext())
    assert "nf4  (4 bit, 16 values)" in words


def test_a_failed_write_leaves_the_old_picture_and_no_partial_one(tmp_path, monkeypatch):
    file = tmp_path / "a.svg"
    file.write_text("old")
    figure = plots.number_line([Int(4)])

    def full(*args, **kwargs):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(figure, "savefig", full)
    with pytest.raises(InputError, match="Input/output error"):
        plots.save(figure, file)
    assert [(each.name, each.read_text()) for each in tmp_path.iterdir()] == [("a.svg", "old")]


def test_without_matplotlib_the_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(InputError, match=r"pip install 'fewbit\[report\]'"):
        plots.number_line([Int(4)])
