"""A text, and settings with which a run takes a second."""

import random

import pytest

from fewbit.trainer.settings import Settings

WORDS = ("the", "cat", "sat", "on", "a", "mat", "and", "saw", "dog", "that", "ran", "to", "town", "where")


def words(count: int, seed: int = 0) -> str:
    """Lines of words in random order."""
    draw = random.Random(seed)
    return "\n".join(" ".join(draw.choices(WORDS, k=8)) for _ in range(count)) + "\n"


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """A file of 12 kB."""
    path = tmp_path_factory.mktemp("texts") / "words.txt"
    path.write_text(words(360))
    return path


@pytest.fixture
def quick():
    """Six updates of two windows."""
    return Settings(steps=6, batch=2, length=32, held=3, looks=2, save_every=2)
