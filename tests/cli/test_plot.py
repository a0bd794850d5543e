"""fewbit plot: files by suffix, and one sentence for what cannot be drawn or written."""

import pytest

HEADS = {".svg": b"<?xml", ".png": b"\x89PNG", ".pdf": b"%PDF"}


@pytest.mark.parametrize("suffix", HEADS)
def test_points(fewbit, tmp_path, suffix):
    ran = fewbit("plot", "points", "int4", "nf4", "-o", f"points{suffix}")
    assert (ran.code, ran.out, ran.err) == (0, "", f"wrote points{suffix}\n")
    assert (tmp_path / f"points{suffix}").read_bytes().startswith(HEADS[suffix])


def test_points_without_names(fewbit, tmp_path):
    assert fewbit("plot", "points", "-o", "a.svg").code == 0
    assert b"e4m3fn" in (tmp_path / "a.svg").read_bytes()


def test_error(fewbit, tmp_path, monkeypatch):
    from fewbit.analyze import plots

    small = plots.number_line
    monkeypatch.setattr(plots, "error_against_bits", lambda: small())
    assert fewbit("plot", "error", "--output", "error.svg").code == 0
    assert (tmp_path / "error.svg").exists()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("points", "-o", "a.jpg"), ".svg, .png, .pdf"),
        (("error", "-o", "a"), ".svg, .png, .pdf"),
        (("points", "-o", "no/such/a.svg"), "does not exist"),
        (("points", "int44", "-o", "a.svg"), "int4"),
        (("points", "mxfp4", "-o", "a.svg"), "whose elements are e2m1"),
        (("points", "fp32", "-o", "a.svg"), "too many"),
        (("points", "higgs-p2-n4", "-o", "a.svg"), "2 coordinates"),
        (("points", "zzz", "-o", "a.svg"), "`fewbit formats` lists them all"),
        (("points", "int4"), "Missing option '--output' / '-o'; `fewbit plot points --help` says"),
        ((), "Missing command"),
    ],
)
def test_what_cannot_be_drawn_is_one_sentence(fewbit, tmp_path, words, sentence):
    ran = fewbit("plot", *words)
    assert (ran.code, ran.out) == (2, "")
    assert sentence in ran.err
    assert ran.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_help_has_an_example(fewbit):
    assert "fewbit plot points" in fewbit("plot", "points", "--help").out
    assert "fewbit plot error" in fewbit("plot", "error", "--help").out
