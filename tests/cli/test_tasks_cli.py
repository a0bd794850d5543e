"""eval --tasks: scores beside the original's, the turned answers, and what is refused before any work."""

import json

import pytest

ROW = {"premise": "It was {}.", "choice1": "The cat sat.", "choice2": "A dog ran.", "question": "cause"}


@pytest.fixture
def folder(tmp_path):
    rows = [ROW | {"premise": f"It was {i}.", "label": i % 2} for i in range(12)]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "copa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "data"


def test_scores_stand_beside_those_of_the_original(fewbit, llama, checkpoint, folder):
    words = ("eval", checkpoint, "--tasks", "copa", "--task-data", folder, "--against", llama)
    found = fewbit(*words, "--json").json
    (row,) = found["tasks"]
    assert (row["task"], row["metric"], row["questions"]) == ("copa", "acc", 12)
    old, new = round(12 * row["original"]), round(12 * row["value"])
    assert new - old == len(row["gained"]) - len(row["lost"])
    assert 0 < row["p"] <= 1
    assert found["bits_per_weight"] == 4.5
    same = fewbit("eval", llama, *words[2:], "--json").json["tasks"][0]
    assert (same["lost"], same["gained"], same["p"]) == ([], [], 1)
    ran = fewbit(*words, "--limit", 8)
    for said in ("copa", "McNemar", "lost", "only the first 8 questions", "standard error"):
        assert said in ran.out
    assert ran.err.strip().splitlines()[-1] == "request 16/16"
    assert "it/s" not in ran.err


def test_alone_there_is_nothing_to_compare(fewbit, llama, folder):
    ran = fewbit("eval", llama, "--tasks", "copa", "--task-data", folder)
    assert ran.code == 0
    assert "McNemar" not in ran.out
    assert "original" not in ran.out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--limit", 3), "--limit belongs to tasks"),
        (("--task-data", "data"), "--task-data belongs to tasks"),
        (("--tasks", "copa", "--window", 32), "has no use for --window"),
        (("--tasks", "copa", "--pairs", "x.tsv"), "has no use for --pairs"),
        (("--tasks", ",", "--task-data", "data"), "the tasks are none"),
        (("--tasks", "piqa", "--task-data", "data"), "no file piqa"),
        (("--tasks", "copa", "--task-data", "data", "--limit", 0), "'--limit'"),
        (("--tasks", "copa", "--task-data", "data", "--batch", 0), "'--batch'"),
    ],
)
def test_wrong_arguments_are_one_sentence(fewbit, llama, folder, words, said):
    ran = fewbit("eval", llama, *words)
    assert ran.code == 2
    assert ran.err.splitlines()[-1].startswith("fewbit: ")
    assert said in ran.err
    assert "Traceback" not in ran.err
