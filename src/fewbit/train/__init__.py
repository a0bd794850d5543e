"""Training with quantization in the loop: fake quantization with a gradient, prepare, convert."""

from fewbit.train.adapters import add_adapters, merge_adapters
from fewbit.train.amaxes import advance
from fewbit.train.blocks import BlockError, train_blocks
from fewbit.train.dampen import dampen
from fewbit.train.distill import forward_kl, kd_loss
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
from fewbit.train.folded import Folded
from fewbit.train.gradients import clear, fp8_gradients, gradient, gradients, set_gradient
from fewbit.train.guard import Guard, LossScaler, clip_gradients
from fewbit.train.levels import LEVELS, O1, O2, O3, OPTIMIZERS, Level, low_adamw, stable_adamw
from fewbit.train.linear import FakeLinear
from fewbit.train.lowlinear import LowLinear, lower, restore
from fewbit.train.narrow import NarrowLinear, narrow, widen
from fewbit.train.optimizer import LowAdamW
from fewbit.train.prepare import convert, prepare, start_from
from fewbit.train.products import Keep, Product, Products
from fewbit.train.quest import midrise, quest_input, quest_weight
from fewbit.train.scalings import (
    PRODUCTS,
    blockwise,
    delayed,
    folded_tensorwise,
    mxfp4,
    mxfp6,
    mxfp8,
    nvfp4,
    rowwise,
    rowwise_wide_weight_gradient,
    switchback,
    switchback_memory,
    switchback_rows,
    tensorwise,
)
from fewbit.train.states import STATES, States
from fewbit.train.steps import StepLinear, train_steps
from fewbit.train.writing import sample_text

__all__ = [
    "LEVELS", "LSQ", "O1", "O2", "O3", "OPTIMIZERS", "PACT", "PRODUCTS", "STATES", "BlockError",
    "Clipped", "FakeLinear", "FakeQuant", "Folded", "Guard", "Identity", "Interior", "Keep",
    "LearnedRange", "Level", "LossScaler", "LowAdamW", "LowLinear", "NarrowLinear", "Product",
    "Products", "States", "StepLinear", "Straight", "Surrogate", "Trust", "add_adapters", "advance",
    "blockwise", "clear", "clip_gradients", "convert", "dampen", "delayed", "fake", "folded_tensorwise",
    "forward_kl", "fp8_gradients", "gradient", "gradients", "kd_loss", "low_adamw", "lower",
    "merge_adapters", "midrise", "mxfp4", "mxfp6", "mxfp8", "narrow", "nvfp4", "prepare", "quest_input",
    "quest_weight", "restore", "rowwise", "rowwise_wide_weight_gradient", "sample_text", "set_gradient",
    "stable_adamw", "start_from", "switchback", "switchback_memory", "switchback_rows", "tensorwise",
    "train_blocks", "train_steps", "widen",
]  # fmt: skip
