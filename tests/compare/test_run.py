"""The comparison: figures equal those of the single commands, rows are kept, failures stay alone."""

import dataclasses
import itertools
import json
import threading
import time

import pytest

import fewbit
from fewbit.compare import Entry, Row, Schedule, Setup, Watch, compare, from_words, worker
from fewbit.compare.processes import Processes
from fewbit.compare.rows import read_rows, stand_in
from fewbit.errors import InputError
from fewbit.evaluate import Protocol, windows
from fewbit.io.source import open_source
from fewbit.io.text import HELD_OUT, read_text
from fewbit.stream.data import Calibration

SMALL = {
    "calibration": Calibration(samples=4, seqlen=32),
    "protocol": Protocol(window=32, windows=3),
}
RTN, GPTQ, BAD = (from_words(t) for t in ("rtn:group_size=32", "gptq:group_size=32", "rtn:group_size=48"))
NF4 = from_words("nf4")


class Seen(Watch):
    """Names of rows as they begin and as they are there."""

    def __init__(self):
        self.begun, self.kept, self.steps = [], [], []

    def row(self, number, total, name):
        self.begun.append(name)

    def step(self, name, what, done, total):
        self.steps.append((what, done, total))

    def done(self, row, kept):
        if kept:
            self.kept.append(row.name)


@pytest.fixture
def setup(folders):
    return Setup(model=str(folders / "llama"), **SMALL)


@pytest.fixture
def here(monkeypatch):
    """Rows are made in this process, which has imported everything; counts them."""
    made = []

    def work(self, job, step):
        made.append(job["recipe"])
        try:
            return "row", json.loads(json.dumps(worker.run(job, lambda kind, *said: step(*said))))
        except InputError as error:
            return "failed", str(error)

    monkeypatch.setattr(Processes, "run", work)
    return made


@pytest.fixture
def fake(monkeypatch):
    """Rows cost nothing: figures are those of the recipe's text. Raises what is put into the list."""
    raised = []

    def work(self, job, step):
        text = job["recipe"]
        if text is None:
            return "row", {"bits": 32.0, "perplexity": 1.0}
        if raised and len(text) == len(raised[0].recipe.to_yaml()):
            raise KeyboardInterrupt
        return "row", {"bits": 4.0, "kl": sum(text.encode()) / 1e6, "perplexity": 2.0}

    monkeypatch.setattr(Processes, "run", work)
    return raised


def test_a_process_of_its_own_gives_the_figures_of_the_single_calls(setup, tmp_path):
    seen = Seen()
    found = compare(setup, [GPTQ], tmp_path / "out", seen)
    (row,) = found.rows
    out = tmp_path / "single"
    made = fewbit.quantize(setup.model, GPTQ.recipe, output=out, calibration=setup.calibration)
    tokens = windows(open_source(setup.model).tokenizer(), read_text(HELD_OUT), setup.protocol)
    got = fewbit.evaluate(fewbit.load(out), tokens, setup.protocol, against=fewbit.load(setup.model))
    assert (row.kl, row.kl_error, row.top1) == (got.kl, got.kl_error, got.top1)
    assert row.perplexity == got.perplexity
    assert row.bits == made.plan.bits_per_weight
    assert row.size_bytes == (out / "model.safetensors").stat().st_size
    assert row.cpu_seconds > 0 < row.wall_seconds
    assert 1e8 < row.peak_bytes < 4e9
    assert found.original.perplexity != row.perplexity
    assert (found.original.bits, found.original.kl) == (32, None)
    assert seen.begun == ["original", GPTQ.name]
    assert ("block", 2, 2) in seen.steps
    assert ("window", 3, 3) in seen.steps
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["results.json"]


def test_an_interrupted_comparison_goes_on_with_the_rows_that_are_missing(setup, fake, tmp_path):
    fake.append(GPTQ)
    with pytest.raises(KeyboardInterrupt):
        compare(setup, [RTN, GPTQ], tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]
    fake.clear()
    seen = Seen()
    found = compare(setup, [RTN, GPTQ], tmp_path, seen)
    assert (seen.begun, seen.kept) == ([GPTQ.name], ["original", RTN.name])
    assert found == compare(setup, [RTN, GPTQ], tmp_path / "other")


def test_a_row_is_measured_again_when_what_it_depends_on_has_changed(setup, fake, tmp_path, folders):
    compare(setup, [RTN], tmp_path)
    again = Seen()
    for changed in (
        {"calibration": Calibration(samples=3, seqlen=32)},
        {"protocol": Protocol(window=32, windows=2)},
        {"model": str(folders / "qwen2")},
    ):
        compare(dataclasses.replace(setup, **changed), [RTN], tmp_path, again)
    assert again.begun == ["original", RTN.name] * 3
    compare(
        setup, [Entry(name="mine", recipe=RTN.recipe, words="")], tmp_path, again
    )  # its name is no matter
    assert again.kept == ["original", "mine"]


def test_rows_that_are_not_asked_for_are_kept_for_later(setup, fake, tmp_path):
    compare(setup, [RTN], tmp_path)
    other = compare(setup, [GPTQ], tmp_path)
    assert [r.name for r in other.kept] == [RTN.name]
    both = Seen()
    compare(setup, [RTN, GPTQ], tmp_path, both)
    assert both.begun == []


def test_a_failed_row_stops_no_other_and_is_tried_again(setup, here, tmp_path):
    found = compare(setup, [BAD, RTN], tmp_path)
    bad, good = found.rows
    assert "48 does not divide" in bad.error
    assert good.kl > 0
    assert found.failed == [bad]
    again = Seen()
    compare(setup, [BAD, RTN], tmp_path, again)
    assert again.begun == [BAD.name]


def test_tasks_are_paired_with_the_original(setup, here, tmp_path):
    rows = [
        {
            "premise": f"It was {i}.",
            "choice1": "A cat.",
            "choice2": "A dog.",
            "question": "cause",
            "label": i % 2,
        }
        for i in range(8)
    ]
    (tmp_path / "copa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = dataclasses.replace(setup, tasks=("copa",), task_data=tmp_path)
    found = compare(asked, [RTN], tmp_path / "out")
    (old,), (new,) = found.original.tasks, found.rows[0].tasks
    assert old["original"] is None
    assert new["original"] == old["value"]
    assert round(8 * (new["value"] - old["value"])) == len(new["gained"]) - len(new["lost"])
    rows[0]["premise"] = "Other."
    (tmp_path / "copa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    again = Seen()
    compare(asked, [RTN], tmp_path / "out", again)
    assert again.begun == ["original", RTN.name]


def test_what_cannot_be_compared_is_refused_before_any_work(setup, here, tmp_path):
    twice = Entry(name="other", recipe=RTN.recipe, words="")
    (tmp_path / "file").write_text("")
    for entries, folder, changed, said in (
        ([], "out", {}, "no recipe"),
        ([RTN, RTN], "out", {}, "give each recipe once"),
        ([RTN, twice], "out", {}, "the same recipe"),
        ([RTN], "file", {}, "is a file"),
        ([RTN], "out", {"model": "./nothing"}, "no model"),
        ([RTN], "out", {"data": "nothing.txt"}, "no text file"),
        ([RTN], "out", {"calibration": Calibration(samples=10**6)}, "give a longer text"),
        ([RTN], "out", {"limit": 3}, "belong to tasks"),
        ([RTN], "out", {"tasks": ("copa",), "task_data": tmp_path}, "has no file copa"),
    ):
        with pytest.raises(InputError, match=said):
            compare(dataclasses.replace(setup, **changed), entries, tmp_path / folder)
    assert here == []
    assert not (tmp_path / "out").exists()


def test_rows_of_another_device_stand_in_until_they_are_measured(setup, fake, tmp_path):
    compare(setup, [RTN, GPTQ], tmp_path)
    path = tmp_path / "results.json"
    data = json.loads(path.read_text())
    for row in (data["original"], *data["rows"]):
        row["key"] += " there"
        row["on"] = "H100"
    path.write_text(json.dumps(data))
    seen = Seen()
    found = compare(setup, [RTN, GPTQ, NF4], tmp_path, seen, Schedule(only=("rtn",)))
    assert seen.begun == ["original", RTN.name]
    assert [(row.name, row.on) for row in found.rows] == [(RTN.name, None), (GPTQ.name, "H100")]
    assert found.missing == (NF4.name,)
    assert [row.on for row in found.kept] == ["H100", "H100"]  # the original's and RTN's
    longer = dataclasses.replace(setup, protocol=Protocol(window=32, windows=2))  # no row of it is anywhere
    found = compare(longer, [RTN, GPTQ], tmp_path, schedule=Schedule(minutes=0))
    assert (found.rows, found.missing) == ((), (RTN.name, GPTQ.name))
    assert len(found.kept) == 5


def test_of_several_stand_ins_the_present_version_then_a_gpu_is_taken():
    def row(name, version, on):
        return Row(name=name, key=name, terms="t", versions={"fewbit": version}, on=on), None

    now = fewbit.__version__
    rows = [
        row("a", "before", "H100"),
        row("b", "before", "CPU"),
        row("c", now, "CPU"),
        row("d", now, "H100"),
    ]
    for order in itertools.permutations(rows):
        assert stand_in(order, None, "t").name == "d"
        assert stand_in(order[:0], None, "t") is None
        assert stand_in(order, None, "other") is None
        assert stand_in(order, RTN.recipe, "t") is None
    assert stand_in(rows[:3], None, "t").name == "c"
    assert stand_in(rows[:2], None, "t").name == "a"


def test_rows_at_a_time_give_the_same_comparison_in_the_same_order(setup, fake, tmp_path):
    one = compare(setup, [RTN, GPTQ, NF4], tmp_path / "one")
    assert compare(setup, [RTN, GPTQ, NF4], tmp_path / "three", schedule=Schedule(workers=3)) == one
    assert read_rows(tmp_path / "three") == read_rows(tmp_path / "one")


def test_as_many_rows_are_at_work_as_workers_and_the_original_alone(setup, tmp_path, monkeypatch):
    together, alone = threading.Barrier(2, timeout=20), []

    def work(self, job, step):
        if job["recipe"] is None:
            alone.append(together.n_waiting)
        else:
            together.wait()  # breaks unless two rows meet here
        return "row", {"bits": 4.0, "perplexity": 1.0}

    monkeypatch.setattr(Processes, "run", work)
    found = compare(setup, [RTN, GPTQ], tmp_path, schedule=Schedule(workers=2))
    assert (len(found.rows), found.failed, alone) == (2, [], [0])


def test_no_row_begins_after_the_last_minute(setup, tmp_path, monkeypatch):
    clock = [0.0]

    def work(self, job, step):
        clock[0] += 50
        return "row", {"bits": 4.0, "perplexity": 1.0}

    monkeypatch.setattr(Processes, "run", work)
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    seen = Seen()
    found = compare(setup, [RTN, GPTQ, NF4], tmp_path, seen, Schedule(minutes=1))
    assert seen.begun == ["original", RTN.name]
    assert found.missing == (GPTQ.name, NF4.name)
    found = compare(setup, [RTN, GPTQ, NF4], tmp_path, seen, Schedule(minutes=0))
    assert len(found.missing) == 2
    assert compare(setup, [RTN, GPTQ, NF4], tmp_path, seen).missing == ()
