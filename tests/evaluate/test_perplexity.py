"""Figures equal to sums done by hand on a model that is a table, and to the loss of real architectures."""

import json
import math
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from tiny import ARCHITECTURES, tiny, tiny_ids

import fewbit
from fewbit.errors import InputError
from fewbit.evaluate import perplexity as module
from fewbit.evaluate.perplexity import Protocol, evaluate, windows
from fewbit.io.text import Join, Text

# Row i: what follows token i, in exact shares. Q is a worse copy of P.
P = [[0.5, 0.25, 0.25], [0.125, 0.75, 0.125], [0.25, 0.25, 0.5]]
Q = [[0.25, 0.5, 0.25], [0.25, 0.5, 0.25], [0.125, 0.125, 0.75]]


class Table:
    """A language model whose next word depends on the last one alone; logits are off by a constant."""

    def __init__(self, table, dtype=torch.float32):
        self.logits = (torch.tensor(table).log() + torch.tensor([[3.0], [-2.0], [7.0]])).to(dtype)

    def __call__(self, input_ids):
        return SimpleNamespace(logits=self.logits[input_ids])


def letters(text, *, add_special_tokens, verbose):
    assert not add_special_tokens
    return {"input_ids": ["abc".index(letter) for letter in text if letter in "abc"]}


TEXT = Text("t", ("abca\n", "\n", "bbcacba"))
IDS = [0, 1, 2, 0, 1, 1, 2, 0, 2, 1, 0]


def run(model, protocol, **keywords):
    return evaluate(model, windows(letters, TEXT, protocol), protocol, **keywords)


def nll(table, pairs):
    return -sum(math.log(table[a][b]) for a, b in pairs) / len(pairs)


def pairs_within(starts, window):
    return [(IDS[i], IDS[i + 1]) for start in starts for i in range(start, start + window - 1)]


def test_windows_are_cut_end_to_end_and_the_rest_is_dropped():
    tokens = windows(letters, TEXT, Protocol(window=3))
    assert tokens.tolist() == [IDS[0:3], IDS[3:6], IDS[6:9]]
    assert windows(letters, TEXT, Protocol(window=3, windows=2)).tolist() == [IDS[0:3], IDS[3:6]]
    assert windows(letters, TEXT, Protocol(window=3, windows=None)).tolist() == tokens.tolist()
    assert windows(letters, TEXT, Protocol(window=11)).tolist() == [IDS]
    strided = windows(letters, TEXT, Protocol(window=4, stride=3))
    assert strided.tolist() == [IDS[0:4], IDS[3:7], IDS[6:10]]


def test_the_join_of_the_protocol_decides_the_tokens():
    def count(text, *, add_special_tokens, verbose):
        return {"input_ids": [0] * len(text)}

    lengths = {how: windows(count, TEXT, Protocol(window=2, join=how, windows=None)).numel() for how in Join}
    assert lengths == {Join.SOLID: 12, Join.ROWS: 16}


def test_perplexity_of_a_table_is_the_one_computed_by_hand():
    result = run(Table(P), Protocol(window=4))
    expected = nll(P, pairs_within([0, 4], 4))
    assert result.nll == pytest.approx(expected, rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(expected), rel=1e-6)
    assert (result.tokens, result.windows, result.window, result.stride) == (6, 2, 4, 4)
    assert result.kl is result.kl_error is result.top1 is None


def test_kl_and_agreement_with_the_original_are_those_computed_by_hand():
    result = run(Table(Q), Protocol(window=4), against=Table(P))
    pairs = pairs_within([0, 4], 4)
    kl = [sum(p * math.log(p / q) for p, q in zip(P[a], Q[a], strict=True)) for a, _ in pairs]
    agree = [P[a].index(max(P[a])) == Q[a].index(max(Q[a])) for a, _ in pairs]
    assert result.kl == pytest.approx(sum(kl) / 6, rel=1e-5)
    assert result.top1 == pytest.approx(sum(agree) / 6)
    assert result.perplexity == pytest.approx(math.exp(nll(Q, pairs)), rel=1e-6)
    first, second = sum(kl[:3]) / 3, sum(kl[3:]) / 3
    assert result.kl_error == pytest.approx(abs(first - second) / 2, rel=1e-4)
    first, second = nll(Q, pairs[:3]), nll(Q, pairs[3:])
    assert result.nll_error == pytest.approx(abs(first - second) / 2, rel=1e-4)


def test_the_original_against_itself_loses_nothing():
    result = run(Table(P), Protocol(window=5), against=Table(P))
    assert (result.kl, result.kl_error, result.top1) == (0.0, 0.0, 1.0)


@pytest.mark.parametrize(("window", "stride"), [(2, 1), (3, 1), (3, 2), (5, 1), (5, 2), (5, 4)])
def test_a_smaller_stride_scores_every_token_once(window, stride):
    # The table needs one token of context, which every stride below the window gives; nothing may change.
    protocol = Protocol(window=window, stride=stride, windows=None)
    result = run(Table(P), protocol)
    covered = window + stride * (result.windows - 1)
    assert result.tokens == covered - 1
    assert result.nll == pytest.approx(nll(P, pairs_within([0], covered)), rel=1e-6)


def test_a_smaller_stride_gives_each_token_the_longest_context_it_can():
    # The loss of the token after i others of its window is log(1 + exp(-i)).
    def model(input_ids):
        place = torch.arange(input_ids.shape[1], dtype=torch.float32)
        return SimpleNamespace(logits=torch.stack([place, torch.zeros_like(place)], dim=1)[None])

    tokens = torch.zeros(3, 5, dtype=torch.int64)
    for stride, places in ((5, [0, 1, 2, 3] * 3), (2, [0, 1, 2, 3] + [2, 3] * 2), (1, [0, 1, 2, 3, 3, 3])):
        expected = sum(math.log1p(math.exp(-i)) for i in places) / len(places)
        result = evaluate(model, tokens, Protocol(window=5, stride=stride))
        assert (result.nll, result.tokens) == (pytest.approx(expected, rel=1e-6), len(places))


def test_one_window_has_no_standard_error():
    assert run(Table(P), Protocol(window=11)).nll_error is None


@pytest.mark.parametrize("chunk", [1, 7, 2**22])
def test_the_chunk_of_positions_changes_nothing(monkeypatch, chunk):
    expected = run(Table(Q), Protocol(window=5), against=Table(P))
    monkeypatch.setattr(module, "CHUNK", chunk)
    result = run(Table(Q), Protocol(window=5), against=Table(P))
    for name in ("nll", "kl", "top1", "tokens"):
        assert getattr(result, name) == pytest.approx(getattr(expected, name), rel=1e-6)


def test_half_precision_logits_are_scored_in_float32():
    model, exact = Table(P, torch.bfloat16), Table(P)
    exact.logits = model.logits.float()
    assert run(model, Protocol(window=5)).nll == run(exact, Protocol(window=5)).nll


def test_progress_is_told_after_each_window():
    calls = []
    run(Table(P), Protocol(window=3), progress=lambda done, total: calls.append((done, total)))
    assert calls == [(1, 3), (2, 3), (3, 3)]


def test_the_result_carries_its_protocol_and_goes_through_json():
    result = run(Table(Q), Protocol(window=3, join=Join.ROWS), against=Table(P), data="t.txt")
    read = json.loads(json.dumps(result.as_dict()))
    assert read["join"] == "rows"
    assert {"data": "t.txt", "window": 3, "windows": 3, "stride": 3, "tokens": 6}.items() <= read.items()
    assert {"perplexity", "kl", "top1", "seconds"} <= read.keys()
    assert read["kl"] == result.kl


@pytest.mark.parametrize("arch", [arch for arch in ARCHITECTURES if arch != "bert"])
def test_one_window_of_a_real_architecture_gives_its_own_loss(arch):
    model, ids = tiny(arch), tiny_ids(batch=3, length=24)
    with torch.no_grad():
        losses = [model(input_ids=row[None], labels=row[None]).loss.item() for row in ids]
    protocol = Protocol(window=24)
    result = evaluate(model, ids, protocol, against=model)
    assert result.nll == pytest.approx(sum(losses) / 3, rel=1e-5)
    assert (result.kl, result.top1, result.tokens) == (0.0, 1.0, 3 * 23)


def test_a_masked_model_is_compared_at_all_positions_and_has_no_perplexity():
    original, ids, protocol = tiny("bert"), tiny_ids(batch=3, length=24), Protocol(window=24)
    worse, generator = tiny("bert"), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in worse.parameters():
            weight.add_(0.01 * torch.randn(weight.shape, generator=generator))
        p, q = (model(input_ids=ids).logits.log_softmax(-1) for model in (original, worse))
    result = evaluate(worse, ids, protocol, against=original)
    assert result.perplexity is result.nll is result.nll_error is None
    assert result.tokens == 3 * 24
    assert result.kl == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-4)
    assert result.top1 == pytest.approx((p.argmax(-1) == q.argmax(-1)).double().mean().item())
    assert 0 < result.top1 < 1
    with pytest.raises(
        InputError, match="BertForMaskedLM fills in masked words and has no perplexity: name the"
    ):
        evaluate(original, ids, protocol)


def test_a_text_shorter_than_a_window_is_refused():
    with pytest.raises(InputError, match="t gives 11 tokens, fewer than one window of 12"):
        windows(letters, TEXT, Protocol(window=12))


def broken(value, token):
    model = Table(P)
    model.logits[token, 1] = value
    return model


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_logit_that_is_no_number_names_its_window(value):
    # Token 2 stands first in the text at place 3: in the second of the windows of 2.
    with pytest.raises(InputError, match="window 2 of 5: the logits hold NaN or"):
        run(broken(value, 2), Protocol(window=2))
    with pytest.raises(InputError, match="window 2 of 5: the original's logits hold NaN or"):
        run(Table(P), Protocol(window=2), against=broken(value, 2))


def test_a_word_ruled_out_is_a_number():
    assert run(broken(-math.inf, 0), Protocol(window=4)).perplexity == math.inf


def test_two_vocabularies_are_not_compared():
    class Wide(Table):
        def __call__(self, input_ids):
            return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 4))

    with pytest.raises(InputError, match="original gives 4 logits per token and the result 3"):
        run(Table(P), Protocol(window=4), against=Wide(P))


def test_what_cannot_be_evaluated_is_refused_in_one_sentence():
    ids, protocol = tiny_ids(batch=1, length=24), Protocol(window=24)
    with pytest.raises(InputError, match=r"tokens have the shape \[1, 24\]: expected \[windows, 25\]"):
        evaluate(Table(P), ids, Protocol(window=25))
    with pytest.raises(InputError, match=r"tokens have the shape \[0, 24\]"):
        evaluate(Table(P), ids[:0], protocol)
    with pytest.raises(InputError, match="LlamaForCausalLM is in training mode"):
        evaluate(tiny("llama").train(), ids, protocol)
    with pytest.raises(InputError, match="LlamaModel gives nothing for logits"):
        evaluate(tiny("llama").model, ids, protocol)
    with pytest.raises(
        InputError, match="a window of 129 tokens is longer than the 128 positions of GPT2LMHeadModel"
    ):
        evaluate(tiny("gpt2"), tiny_ids(batch=1, length=129), Protocol(window=129))
    with pytest.raises(InputError, match="token 288 is outside the 288 words of LlamaForCausalLM"):
        evaluate(tiny("llama"), torch.full((1, 24), 288), protocol)
    rows = SimpleNamespace(logits=torch.zeros(1, 2))
    with pytest.raises(
        InputError, match=r"gives the shape \[1, 2\] for logits, expected \[1, 24, vocabulary\]"
    ):
        evaluate(lambda input_ids: rows, ids, protocol)
    seq2seq = SimpleNamespace(config=SimpleNamespace(is_encoder_decoder=True))
    with pytest.raises(InputError, match="is an encoder-decoder"):
        evaluate(seq2seq, ids, protocol)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"window": 1}, "a window of 1 tokens predicts nothing"),
        ({"window": 2.0}, "a window of 2.0 tokens"),
        ({"windows": 0}, "the number of windows is 0"),
        ({"stride": 0}, "the stride is 0: expected 1 to 512"),
        ({"stride": 513}, "the stride is 513"),
        ({"join": "rows"}, "the join is 'rows': expected Join.ROWS or Join.SOLID"),
    ],
)
def test_impossible_protocols_are_refused(settings, sentence):
    with pytest.raises(InputError, match=sentence):
        Protocol(**settings)


@pytest.mark.parametrize("first", ["from fewbit.evaluate import Protocol", "fewbit.evaluate"])
def test_the_public_name_can_be_called_whatever_was_imported_first(first):
    then = "from fewbit.evaluate import Protocol\nassert callable(fewbit.evaluate)"
    code = f"import fewbit\n{first}\n{then}"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    assert fewbit.evaluate(Table(P), torch.tensor([IDS]), Protocol(window=11)).windows == 1
