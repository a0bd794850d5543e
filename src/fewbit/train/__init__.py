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
from fewbit.train.lowlinear import LowLinear, lower, restore
from fewbit.train.prepare import convert, prepare
from fewbit.train.products import Keep, Product, Products
from fewbit.train.quest import midrise, quest_input, quest_weight
from fewbit.train.scalings import PRODUCTS, switchback, tensorwise

__all__ = [
    "LSQ", "PACT", "PRODUCTS", "Clipped", "FakeLinear", "FakeQuant", "Identity", "Interior", "Keep",
    "LearnedRange", "LowLinear", "Product", "Products", "Straight", "Surrogate", "Trust", "convert", "fake",
    "lower", "midrise", "prepare", "quest_input", "quest_weight", "restore", "switchback", "tensorwise",
]  # fmt: skip
