"""Sentence embeddings and their rank correlation with people's scores."""

from dataclasses import replace

import pytest
import torch
from tiny import tiny, tiny_tokenizer
from torch import nn

from fewbit.errors import InputError
from fewbit.evaluate.encoder import Pairs, embed, read_pairs, similarity

SENTENCES = (
    "the cat sat on the mat", "a dog", "rain is on the way to the town and the fields", "he sings",
    "an old man at the window reads", "the", "they are in the house, and it is warm", "no",
)  # fmt: skip
PAIRS = Pairs("eight", SENTENCES, SENTENCES[1:] + SENTENCES[:1], (0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 2.5, 3.5))


@pytest.fixture
def encoder():
    return tiny("bert").bert


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def write(path, rows, head="index\tsentence1\tsentence2\tscore"):
    path.write_text("\n".join([head, *rows]) + "\n", encoding="utf-8")
    return path


def test_pairs_are_read_with_quotes_as_plain_characters(tmp_path):
    path = write(tmp_path / "dev.tsv", ['0\t"Yes, he said.\tHe said "yes".\t4.5', "1\ta\tb\t0.000"])
    pairs = read_pairs(path)
    assert pairs.first == ('"Yes, he said.', "a")
    assert pairs.second == ('He said "yes".', "b")
    assert pairs.score == (4.5, 0.0)


@pytest.mark.parametrize(
    ("rows", "head", "says"),
    [
        (["0\ta\tb\t1.0", "1\ta\tb"], "index\tsentence1\tsentence2\tscore", "line 3 .* 3 cells"),
        (["0\ta\tb\tgood"], "index\tsentence1\tsentence2\tscore", "line 2 "),
        (["0\ta\t1.0"], "index\tsentence1\tscore", "expected rows with sentence1, sentence2, score"),
        ([], "sentence1\tsentence2\tscore", "has 0 rows"),
    ],
)
def test_a_broken_file_is_refused_with_its_line(tmp_path, rows, head, says):
    with pytest.raises(InputError, match=says):
        read_pairs(write(tmp_path / "dev.tsv", rows, head))
    with pytest.raises(InputError, match="cannot be read"):
        read_pairs(tmp_path / "none.tsv")


def test_an_embedding_is_the_mean_over_tokens_whatever_the_batch(encoder, tokenizer):
    together = embed(encoder, tokenizer, SENTENCES, size=8)
    with torch.no_grad():
        for sentence, got in zip(SENTENCES, together, strict=True):
            state = encoder(**tokenizer(sentence, return_tensors="pt")).last_hidden_state[0]
            expected = nn.functional.normalize(state.mean(0), dim=-1)
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    twice = embed(encoder, tokenizer, ("no", "a dog", "no"))
    assert torch.equal(twice[0], twice[2])
    torch.testing.assert_close(twice[:2], together[[7, 1]], rtol=0, atol=1e-5)


def test_spearman_asks_for_the_order_alone(encoder, tokenizer):
    """Scores in the order of the model's own cosines correlate perfectly, under any monotone map."""
    e = embed(encoder, tokenizer, PAIRS.first + PAIRS.second)
    cosine = (e[:8] * e[8:]).sum(-1)
    ranks = cosine.argsort().argsort()
    pairs = replace(PAIRS, score=tuple((ranks.double() ** 3).tolist()))
    got = similarity(encoder, tokenizer, pairs)
    assert got.spearman == pytest.approx(1.0)
    assert got.pearson < 0.999
    assert got.pairs == 8
    assert torch.equal(got.embeddings, e)
    upside_down = replace(PAIRS, score=tuple((-ranks.double()).tolist()))
    assert similarity(encoder, tokenizer, upside_down).spearman == pytest.approx(-1.0)


def test_a_model_that_cannot_embed_is_refused(encoder, tokenizer):
    with pytest.raises(InputError, match="no last_hidden_state"):
        embed(tiny("bert"), tokenizer, SENTENCES)
    with pytest.raises(InputError, match="training mode"):
        embed(encoder.train(), tokenizer, SENTENCES)
    with pytest.raises(InputError, match="at least three"):
        similarity(encoder.eval(), tokenizer, Pairs("two", ("a", "b"), ("c", "d"), (1.0, 2.0)))
