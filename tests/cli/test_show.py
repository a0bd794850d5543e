"""Sizes, durations and shares as people read them; JSON as machines do."""

import json
import math

from fewbit.cli import show


def test_sizes_durations_and_shares_are_readable():
    assert [show.size(n) for n in (0, 999, 1000, 98_449_120, 999_960_000)] == [
        "0 bytes", "999 bytes", "1.0 kB", "98.4 MB", "1.0 GB"
    ]  # fmt: skip
    assert [show.duration(s) for s in (0.04, 9.96, 59.7, 130, 3900)] == [
        "0.0 s", "10 s", "1 min 00 s", "2 min 10 s", "1 h 05 min"
    ]  # fmt: skip
    assert [show.percent(e) for e in (0, 0.5, 0.0021, 0.0000123)] == [
        "0.00 %",
        "50.00 %",
        "0.21 %",
        "0.0012 %",
    ]
    assert show.some(list("abcdef"), 2) == "a, b and 4 more"


def test_json_has_no_infinity(capsys):
    show.print_json({"a": math.inf, "b": [math.nan, 1.5], "c": {"d": None}})
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": [None, 1.5], "c": {"d": None}}
