"""Which tokens are trained on, in which order, and which are held out."""

import itertools

import pytest
import torch

from fewbit.errors import InputError
from fewbit.trainer.data import batches, read_corpus
from fewbit.trainer.settings import Settings
from fewbit.trainer.small import byte_tokenizer

SETTINGS = Settings(batch=3, length=8, held=4)


def starts(rows: torch.Tensor) -> list[int]:
    return rows[:, 0].tolist()


def test_every_byte_is_a_token_and_comes_back():
    tokenizer, said = byte_tokenizer(), "Grüße, 世界!\n\tif x:  pass"
    ids = tokenizer(said)["input_ids"]
    assert len(ids) == len(said.encode())
    assert tokenizer.decode(ids) == said
    assert len(tokenizer) == 256


def test_an_epoch_takes_no_window_twice_and_the_next_one_another_order():
    ids = torch.arange(8 * 31)
    each = (31 - 1) // 3
    seen = [starts(batch) for batch in itertools.islice(batches(ids, SETTINGS), 2 * each)]
    first, second = (list(itertools.chain(*part)) for part in (seen[:each], seen[each:]))
    for epoch in (first, second):
        assert len(set(epoch)) == len(epoch)
        assert len({at % 8 for at in epoch}) == 1  # windows of one phase: no two overlap
    assert first != second


def test_a_batch_can_be_had_without_those_before_it():
    ids = torch.arange(8 * 31)
    all_of_them = list(itertools.islice(batches(ids, SETTINGS), 25))
    for i in (0, 7, 9, 10, 24):
        assert torch.equal(next(batches(ids, SETTINGS, first=i)), all_of_them[i])
    other = next(batches(ids, Settings(batch=3, length=8, seed=1)))
    assert not torch.equal(other, all_of_them[0])


def test_what_is_held_out_is_not_trained_on(text):
    corpus = read_corpus(byte_tokenizer(), text, SETTINGS)
    whole = byte_tokenizer()(text.read_text())["input_ids"]
    assert corpus.ids.tolist() == whole[: len(corpus.ids)]
    rest = whole[len(corpus.ids) :]
    assert 0.04 < len(rest) / len(whole) < 0.06
    places = {tuple(rest[i : i + 8]) for i in range(len(rest) - 7)}
    assert corpus.held.shape == (4, 8)
    assert all(tuple(window) in places for window in corpus.held.tolist())


def test_a_text_that_is_too_short_is_refused_with_the_count(tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("only a few words\n" * 2)
    with pytest.raises(InputError, match=r"needs 32 tokens; give a longer text"):
        read_corpus(byte_tokenizer(), path, SETTINGS)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("steps", 0, "--steps is 0"),
        ("length", 1, "--length is 1"),
        ("lr", 0.0, "--lr is 0.0"),
        ("lr", float("nan"), "--lr is nan"),
        ("warmup", 2.0, "from 0 to 1"),
        ("micro", 5, "give a --micro that divides it"),
        ("precision", "fp8", "precision 'fp8' is unknown"),
    ],
)
def test_settings_that_train_nothing_are_refused(field, value, said):
    with pytest.raises(InputError, match=said):
        Settings(**{field: value})


def test_the_rate_rises_to_its_peak_and_falls_to_its_floor():
    plan = Settings(steps=100, warmup=0.1, floor=0.1)
    rates = [plan.rate(i) for i in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == 1.0
    assert rates[99] == pytest.approx(0.1, abs=1e-3)
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))
