"""Calibration windows: disjoint, contiguous, decided by the seed alone, no dearer than what is wanted."""

import hashlib
import struct

import pytest
import torch

from fewbit.errors import InputError
from fewbit.stream.data import PAGE, Calibration, sample_tokens, token_hash


class Numbered:
    """One token per line, the number on it: all tokens of a text differ, and the next is one larger."""

    def __init__(self):
        self.characters = 0

    def __call__(self, text, *, add_special_tokens, verbose):
        assert not add_special_tokens
        self.characters += len(text)
        return {"input_ids": [int(line) for line in text.splitlines()]}


def numbered(folder, n, width=8):
    path = folder / "numbered.txt"
    path.write_text("".join(f"{i:0{width - 1}d}\n" for i in range(n)))
    return str(path)


def sample(source, **settings):
    return sample_tokens(Calibration(source=source, **settings), Numbered())


def test_windows_do_not_overlap_and_follow_the_text(tmp_path):
    tokens = sample(numbered(tmp_path, 5000), samples=20, seqlen=64)
    assert tokens.shape == (20, 64)
    assert tokens.dtype == torch.int64
    assert len(tokens.unique()) == tokens.numel()
    # Within a page the next token of the text follows; a page holds a window or more.
    seams = (tokens.diff(dim=1) != 1).sum(dim=1)
    assert PAGE >= 8
    assert seams.max() <= 1


def test_the_seed_decides_and_the_global_generator_stays_where_it_was(tmp_path):
    source = numbered(tmp_path, 5000)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = sample(source, samples=8, seqlen=32, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(sample(source, samples=8, seqlen=32, seed=3), first)
    assert not torch.equal(sample(source, samples=8, seqlen=32, seed=4), first)


def test_windows_come_from_all_over_the_text(tmp_path):
    tokens = sample(numbered(tmp_path, 20_000), samples=32, seqlen=32)
    quarters = (tokens[:, 0] // 5000).unique()
    assert quarters.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("seed", range(5))
def test_a_text_with_exactly_enough_tokens_is_enough(tmp_path, seed):
    tokens = sample(numbered(tmp_path, 640), samples=10, seqlen=64, seed=seed)
    assert sorted(tokens.flatten().tolist()) == list(range(640))


def test_one_token_too_few_is_refused_with_the_counts(tmp_path):
    with pytest.raises(
        InputError, match="gives 639 tokens, but 10 samples of 64 need 640: ask for at most 9"
    ):
        sample(numbered(tmp_path, 639), samples=10, seqlen=64)


def test_the_cost_is_that_of_the_tokens_wanted_not_of_the_text(tmp_path):
    tokenizer = Numbered()
    source = numbered(tmp_path, 100_000)
    sample_tokens(Calibration(source=source, samples=4, seqlen=64), tokenizer)
    assert tokenizer.characters <= 8 * (2 * 4 * 64 + PAGE * 64 + 1)


def test_a_text_of_one_long_line_is_enough(tmp_path):
    path = tmp_path / "line.txt"
    path.write_text("abcdefghij" * 1000)

    def letters(text, *, add_special_tokens, verbose):
        return {"input_ids": list(text.encode())}

    first = set()
    for seed in range(8):
        tokens = sample_tokens(Calibration(source=str(path), samples=3, seqlen=100, seed=seed), letters)
        assert all(bytes(window.tolist()).decode() in "abcdefghij" * 1000 for window in tokens)
        first.add(int(tokens[0, 0]))
    assert len(first) > 1, "windows start at a random phase"


def test_the_default_text_holds_the_default_sample():
    def words(text, *, add_special_tokens, verbose):
        # Four characters to a token, as a byte-pair tokenizer of English makes them.
        return {"input_ids": list(range(len(text) // 4))}

    assert sample_tokens(Calibration(), words).shape == (128, 512)


def test_the_hash_is_of_shape_and_ids():
    tokens = torch.tensor([[1, 2], [3, 4]])
    expected = hashlib.sha256(b"2x2:" + struct.pack("<4q", 1, 2, 3, 4)).hexdigest()
    assert token_hash(tokens) == expected
    assert token_hash(tokens.T.contiguous().T.int()) == expected
    assert token_hash(tokens.view(1, 4)) != expected
    assert token_hash(tokens + 1) != expected


@pytest.mark.parametrize(
    "settings",
    [{"samples": 0}, {"seqlen": 1}, {"seed": -1}, {"samples": 2.5}, {"seed": None}, {"seed": 2**63}],
)
def test_impossible_settings_are_refused(settings):
    with pytest.raises(InputError, match=f"calibration {next(iter(settings))} is"):
        Calibration(**settings)
