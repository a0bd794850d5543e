"""Training with quantization in the loop: fake quantization with a gradient, prepare, convert."""

from fewbit.train.fake import (
    LSQ,
    PACT,
    Clipped,
    FakeQuant,
    Identity,
    Interior,
    LearnedRange,
    Straight,
    Surrogate,
    Trust,
    fake,
)
from fewbit.train.linear import FakeLinear
from fewbit.train.prepare import convert, prepare
from fewbit.train.quest import midrise, quest_input, quest_weight

__all__ = [
    "LSQ", "PACT", "Clipped", "FakeLinear", "FakeQuant", "Identity", "Interior", "LearnedRange", "Straight",
    "Surrogate", "Trust", "convert", "fake", "midrise", "prepare", "quest_input", "quest_weight",
]  # fmt: skip
