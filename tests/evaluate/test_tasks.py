"""Tasks: every packaged task over rows of its own format, what is refused, and the paired comparison."""

import itertools
import json

import pytest
from tiny import tiny, tiny_tokenizer

from fewbit.errors import InputError
from fewbit.evaluate.tasks import LOCAL, Score, answer, beside, open_tasks, paired, read_local

STEM = {
    "stem": "What is warm?",
    "choices": [{"text": "the sun", "label": "A"}, {"text": "ice", "label": "B"}],
}
ROWS = {
    "arc_easy": {"id": "1", "question": STEM, "answerKey": "A"},
    "boolq": {"question": "is it so", "passage": "It is so.", "idx": 1, "label": True},
    "copa": {
        "premise": "He fell.", "choice1": "He was ill.", "choice2": "It rained.",
        "question": "cause", "label": 1, "idx": 0,
    },
    "hellaswag": {"activity_label": "Rain", "ctx": "it", "label": 3, "endings": ["a", "b", "c", "d"]},
    "lambada": {"text": "the cat sat on the mat"},
    "openbookqa": {"id": "2", "question": STEM, "answerKey": "B"},
    "piqa": {"id": "3", "goal": "rest", "sol1": "sit down", "sol2": "stand"},
}  # fmt: skip
PROMPTS = {
    "arc_easy": ("Question: What is warm?\nAnswer:", 0, ["the sun", "ice"]),
    "boolq": ("It is so.\nQuestion: is it so?\nAnswer:", 1, ["no", "yes"]),
    "copa": ("He fell because", 1, ["he was ill.", "it rained."]),
    "hellaswag": ("Rain: it", 3, ["a", "b", "c", "d"]),
    "lambada": ("the cat sat on the", " mat", None),
    "openbookqa": ("What is warm?", 1, ["the sun", "ice"]),
    "piqa": ("Question: rest\nAnswer:", 1, ["sit down", "stand"]),
}


def put(folder, name, rows, labels=None):
    """A file of a task, as a folder of data has it."""
    (folder / f"{name}_x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if name == "piqa":
        (folder / "piqa_x-labels.lst").write_text("".join(f"{n}\n" for n in labels or [1] * len(rows)))


@pytest.fixture(scope="module")
def llama():
    return tiny("llama"), tiny_tokenizer()


def test_every_packaged_task_asks_what_its_paper_asks(tmp_path, llama):
    assert set(LOCAL) == set(ROWS)
    for name, row in ROWS.items():
        put(tmp_path, name, [row] * 3)
    with open_tasks(LOCAL, tmp_path) as tasks:
        for name, (text, target, choices) in PROMPTS.items():
            doc = tasks[name].eval_docs[0]
            assert (tasks[name].doc_to_text(doc), tasks[name].doc_to_target(doc)) == (text, target)
            assert choices is None or tasks[name].doc_to_choice(doc) == choices
        asked = answer(*llama, tasks, limit=2)
    assert {s.task for s in asked.scores} == set(LOCAL)
    assert all(s.questions == 2 for s in asked.scores)
    assert asked.cut == 0
    # The same row twice is answered twice alike, and the metric that is meant comes first.
    assert all(len(set(s.outcomes)) == 1 for s in asked.scores if s.outcomes)
    first = {s.task: s.metric for s in reversed(asked.scores)}
    assert {first[name] for name in ("hellaswag", "openbookqa")} == {"acc_norm"}
    assert {first[name] for name in ("piqa", "copa", "boolq", "arc_easy", "lambada")} == {"acc"}


def test_the_likeliest_choice_is_the_answer(tmp_path, llama):
    """lm-eval's outcome against log likelihoods summed here."""
    import torch

    model, tokenizer = llama
    rows = [ROWS["copa"] | {"premise": f"{word} fell.", "label": i % 2} for i, word in enumerate("abcdefgh")]
    put(tmp_path, "copa", rows)
    with open_tasks(["copa"], tmp_path) as tasks:
        (score,) = answer(model, tokenizer, tasks, batch=3).scores
    expected = ""
    for row in rows:
        context = tokenizer(row["premise"][:-1] + " because")["input_ids"]
        sums = []
        for choice in (" he was ill.", " it rained."):
            ids = torch.tensor([context + tokenizer(choice)["input_ids"]])
            with torch.no_grad():
                log = model(input_ids=ids).logits.log_softmax(-1)[0, len(context) - 1 : -1]
            sums.append(log.gather(1, ids[0, len(context) :, None]).sum().item())
        expected += str(int(sums.index(max(sums)) == row["label"]))
    assert score.outcomes == expected
    p = expected.count("1") / 8
    assert (score.value, score.error) == (p, pytest.approx((p * (1 - p) / 7) ** 0.5))


def test_progress_counts_requests_and_long_ones_are_told(tmp_path, llama):
    long = ROWS["copa"] | {"premise": "word " * 200 + "."}
    put(tmp_path, "copa", [ROWS["copa"], long])
    seen = []
    with open_tasks(["copa"], tmp_path) as tasks:
        asked = answer(*llama, tasks, batch=1, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(n, 4) for n in range(1, 5)]
    assert asked.cut == 2


@pytest.mark.parametrize(
    ("name", "row", "said"),
    [
        ("copa", {"premise": "x"}, "'choice1' is missing"),
        ("copa", ROWS["copa"] | {"label": 2}, "the answer is 2 of 2 choices"),
        ("copa", ROWS["copa"] | {"label": True}, "'label' holds true; expected \"integer\""),
        ("copa", ROWS["copa"] | {"question": "reason"}, "line 2"),
        ("copa", ROWS["copa"] | {"choice2": ""}, "line 2"),
        ("arc_easy", ROWS["arc_easy"] | {"answerKey": "C"}, "is no question of arc_easy"),
        ("arc_easy", ROWS["arc_easy"] | {"question": {"stem": "x"}}, "'question' holds"),
        ("hellaswag", ROWS["hellaswag"] | {"endings": ["a", 2]}, "'endings' holds"),
        ("lambada", {"text": "word"}, "is no question of lambada"),
        ("lambada", [], "no JSON object"),
    ],
)
def test_a_bad_row_is_named(tmp_path, name, row, said):
    put(tmp_path, name, [ROWS[name], row])
    with pytest.raises(InputError, match=r"line 2 of .*jsonl") as raised, open_tasks([name], tmp_path):
        pass
    assert said in str(raised.value)


def test_what_cannot_be_found_is_named(tmp_path):
    put(tmp_path, "piqa", [ROWS["piqa"]] * 2, labels=[0])
    put(tmp_path, "boolq", [ROWS["boolq"]])
    (tmp_path / "boolq_y.jsonl").write_text("")
    (tmp_path / "lambada.jsonl").write_text("{\n")
    (tmp_path / "arc_easy.jsonl").write_text("")
    for names, folder, said in (
        (["copa"], tmp_path, "has no file copa"),
        (["copa"], tmp_path / "no", "there is no folder"),
        (["piqa"], tmp_path, "holds 1 labels for 2 rows"),
        (["boolq"], tmp_path, "several files"),
        (["lambada"], tmp_path, "line 1 .* is not JSON"),
        (["arc_easy"], tmp_path, "is empty"),
        (["pika"], tmp_path, "no task 'pika'; did you mean .*piqa"),
        (["piqa", "piqa"], tmp_path, "name each once"),
        ([], tmp_path, "none"),
    ):
        with pytest.raises(InputError, match=said), open_tasks(names, folder):
            pass
    with pytest.raises(InputError, match="at least 1"), open_tasks(["copa"], tmp_path, limit=0):
        pass
    (tmp_path / "piqa_x-labels.lst").write_text("0\nx\n")
    with pytest.raises(InputError, match=r"label 2 of .* is 'x'"):
        read_local("piqa", tmp_path)


def test_without_lm_eval_one_sentence_says_what_to_install(tmp_path, monkeypatch):
    import sys

    put(tmp_path, "copa", [ROWS["copa"]])
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(InputError, match=r"pip install 'fewbit\[tasks\]'"), open_tasks(["copa"], tmp_path):
        pass


def test_a_masked_model_is_refused(tmp_path):
    put(tmp_path, "copa", [ROWS["copa"]])
    with (
        open_tasks(["copa"], tmp_path) as tasks,
        pytest.raises(InputError, match="predicts no next token"),
    ):
        answer(tiny("bert"), tiny_tokenizer(), tasks)


def score(outcomes, task="t", metric="acc"):
    value = outcomes.count("1") / len(outcomes)
    return Score(task=task, metric=metric, value=value, error=0.1, questions=len(outcomes), outcomes=outcomes)


def test_mcnemar_is_a_coin_thrown_for_every_turned_answer():
    for lost, gained in itertools.product(range(6), range(6)):
        old = "1" * lost + "0" * gained + "10"
        new = "0" * lost + "1" * gained + "10"
        found = paired(score(new), score(old))
        assert found.lost == tuple(range(1, lost + 1))
        assert found.gained == tuple(range(lost + 1, lost + gained + 1))
        # All outcomes of the coins that are at least as uneven as what was seen.
        m, uneven = lost + gained, abs(lost - gained)
        throws = [abs(2 * sum(coins) - m) >= uneven for coins in itertools.product((0, 1), repeat=m)]
        assert found.p == pytest.approx(sum(throws) / len(throws))


def test_only_like_is_compared_with_like():
    with pytest.raises(InputError, match="same questions"):
        paired(score("10"), score("101"))
    with pytest.raises(InputError, match="same questions"):
        paired(score("10"), score("10", task="u"))
    row = beside(score("01"), score("10"))
    assert (row["lost"], row["gained"], row["original"], row["p"]) == ((1,), (2,), 0.5, 1.0)
    assert beside(score("01"), None)["p"] is None
