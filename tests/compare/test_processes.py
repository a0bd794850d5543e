"""Processes of rows: how they end, and what each gets of the processors."""

from fewbit.compare import processes
from fewbit.compare.processes import Processes


def test_a_process_that_is_killed_is_a_failed_row(tmp_path, monkeypatch):
    script = tmp_path / "python"
    script.write_text('#!/bin/sh\ncat > /dev/null\necho \'["step", "block", 1, 2]\'\nkill -9 $$\n')
    script.chmod(0o755)
    monkeypatch.setattr(processes.sys, "executable", str(script))
    steps = []
    kind, said = Processes(1).run({}, lambda *said: steps.append(said))
    assert (kind, steps) == ("failed", [("block", 1, 2)])
    assert "SIGKILL" in said
    assert "memory" in said
    script.write_text("#!/bin/sh\ncat > /dev/null\nexit 3\n")
    assert "code 3" in Processes(1).run({}, print)[1]


def test_an_end_kills_what_runs_and_lets_nothing_begin(tmp_path, monkeypatch):
    script = tmp_path / "python"
    script.write_text('#!/bin/sh\necho \'["step", "block", 1, 2]\'\nexec sleep 60\n')
    script.chmod(0o755)
    monkeypatch.setattr(processes.sys, "executable", str(script))
    ours = Processes(2)
    kind, said = ours.run({}, lambda *_: ours.end())
    assert (kind, ours.ended) == ("failed", True)
    assert "SIGKILL" in said
    assert ours.run({}, print) == ("failed", "the comparison has ended")


def test_processes_share_the_processors(tmp_path, monkeypatch):
    script = tmp_path / "python"
    script.write_text('#!/bin/sh\necho "[\\"row\\", \\"$OMP_NUM_THREADS\\"]"\n')
    script.chmod(0o755)
    monkeypatch.setattr(processes.sys, "executable", str(script))
    monkeypatch.setattr(processes.os, "cpu_count", lambda: 16)
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert [Processes(n).run({}, print)[1] for n in (1, 8, 40)] == ["", "2", "1"]
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert Processes(8).run({}, print)[1] == "5"
