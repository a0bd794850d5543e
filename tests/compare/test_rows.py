"""The front of rows, and the file that keeps them."""

import itertools
import json
import random

import pytest

from fewbit.compare import Comparison, Row, front
from fewbit.compare.page import report
from fewbit.compare.rows import read_rows, write_rows
from fewbit.errors import InputError

SETUP = {
    "model": "<m>",
    "device": "cpu",
    "calibration": {"samples": 1, "seqlen": 2, "source": "t", "seed": 0},
    "protocol": {"windows": 1, "window": 2, "join": "solid"},
    "data": "text",
    "tasks": ["copa"],
    "limit": 4,
}
TASK = {
    "task": "copa", "metric": "acc", "value": 0.5, "error": 0.1, "questions": 4, "outcomes": "1010",
    "original": 0.5, "original_error": 0.1, "lost": [1], "gained": [2], "p": 1.0,
}  # fmt: skip


def row(name, bits=4.0, kl=0.1, **more):
    return Row(
        name=name, key=name, bits=bits, kl=kl, kl_error=0.01, top1=0.9, perplexity=9.0, size_bytes=10, **more
    )


def test_nothing_beats_what_is_on_the_front_and_everything_else_is_beaten():
    rng = random.Random(0)
    for _ in range(50):
        rows = [row(str(i), rng.randint(2, 6), rng.randint(0, 6) / 10) for i in range(8)]
        kept = front(rows)
        assert kept
        for a, b in itertools.product(rows, kept):
            assert a.bits > b.bits or a.kl > b.kl or (a.bits, a.kl) == (b.bits, b.kl)
        for a in rows:
            beaten = any(b.bits <= a.bits and b.kl <= a.kl and (a.bits, a.kl) != (b.bits, b.kl) for b in rows)
            assert beaten != (a in kept)
        assert [r.bits for r in kept] == sorted(r.bits for r in kept)


def test_a_failed_row_is_on_no_front_and_stands_last():
    failed = Row(name="bad", key="bad", error="no")
    found = Comparison(setup=SETUP, original=row("original"), rows=(failed, row("b", 4), row("a", 3)))
    assert [r.name for r in found.by_bits] == ["a", "b", "bad"]
    assert [r.name for r in found.failed] == ["bad"]
    assert failed not in front(found.rows)


def test_rows_come_back_from_their_file_but_for_the_failed(tmp_path):
    first = row("a", tasks=(TASK,), words="-r a", recipe="x: 1\n")
    rows = (first, Row(name="bad", key="bad", error="no"))
    write_rows(tmp_path, Comparison(setup=SETUP, original=row("original"), rows=rows, kept=(row("old"),)))
    assert set(read_rows(tmp_path)) == {"original", "a", "old"}
    assert read_rows(tmp_path)["a"] == first
    assert list(tmp_path.iterdir()) == [tmp_path / "results.json"]


def test_a_file_of_something_else_is_refused(tmp_path):
    assert read_rows(tmp_path) == {}
    good = Comparison(setup=SETUP, original=row("original"), rows=()).as_dict()
    for text in ("", "[]", "{}", json.dumps(good | {"format": "other"}), json.dumps(good | {"rows": [{}]})):
        (tmp_path / "results.json").write_text(text)
        with pytest.raises(InputError, match="choose another folder"):
            read_rows(tmp_path)


def test_the_report_holds_every_row_and_escapes_names():
    rows = (
        row("a<b", 3, 0.4, tasks=(TASK,), words="-r a"),
        row("worse", 4, 0.5),
        Row(name="bad", key="bad", error="it broke"),
    )
    text = report(Comparison(setup=SETUP, original=row("original", 16.0, None, tasks=(TASK,)), rows=rows))
    for said in (
        "a&lt;b",
        "worse",
        "it broke",
        "fewbit quantize &lt;m&gt; -r a",
        "copa",
        "McNemar",
        "first 4 questions",
        "<svg",
    ):
        assert said in text
    assert "<b " not in text
    assert text.count('<tr class="marked">') == 1


def test_a_report_without_a_picture_says_so():
    only = Comparison(setup=SETUP, original=row("original"), rows=(row("exact", 8, 0.0),))
    assert "No recipe has a KL above 0" in report(only)
    failed = Comparison(setup=SETUP, original=Row(name="original", key="o", error="x"), rows=())
    assert "original failed: x" in report(failed)
