"""The time left, and a bar on a terminal alone."""

import sys

from fewbit.cli import progress


def test_the_time_left_counts_solved_blocks_alone():
    now = [0.0]
    remaining = progress.Remaining(clock=lambda: now[0])
    remaining.start(100)
    now[0] = 30
    assert remaining.seconds() == 70
    remaining.block(1, 10, True)
    assert remaining.seconds() <= 100
    now[0] = 40
    remaining.block(2, 10, False)
    assert remaining.seconds() == 80  # eight blocks of ten seconds
    now[0] = 45
    assert remaining.seconds() == 75
    now[0] = 200
    assert remaining.seconds() == 0


def test_a_terminal_gets_a_bar_and_the_streams_stay_apart(fewbit, llama, monkeypatch, capsys):
    monkeypatch.setenv("TERM", "xterm")
    stderr = sys.stderr
    monkeypatch.setattr(type(stderr), "isatty", lambda self: self is stderr)
    ran = fewbit("quantize", llama, "-r", "rtn", "--group-size", 32, "--json", "-o", "out")
    assert ran.json["reload_difference"] < 1e-3
    assert "block 2/2" in ran.err
    assert "\x1b[?25h" in ran.err  # the cursor is back
