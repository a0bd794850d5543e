"""What a run will take, before it starts: memory and disk. Its time is in ``timing``."""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path

import torch

from fewbit.errors import InputError
from fewbit.stream.memory import resident
from fewbit.stream.sites import BATCH

SPREAD = 4  # tokens of a whole block that an expert is solved from, for each of its inputs
SENTENCE = 32  # tokens of a usual one


def check_disk(output: Path, size: int) -> None:
    """Twice the result must fit while finished blocks are put together into shards."""
    folder = output.absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < 2 * size + (1 << 20):
        raise InputError(
            f"{folder} has {free / 1e6:,.0f} MB free and this run needs {2 * size / 1e6:,.0f} MB; free some "
            "space or "
            "choose another output folder with -o"
        )


def memory(model, blocks, layers, calibration, device, depth, item, recipe) -> tuple[str, int]:
    """(depth, predicted peak bytes on the device that computes): weights of one block, activations, Gram
    matrices (of experts those of one); for maps folded before experts what a fold copies; for tuning the
    float model's outputs, Adam's state of a block and one batch's backward.
    """
    per_block = [sum(p.numel() for p in b.parameters()) * item for b in blocks.modules]
    largest = max(math.prod(layer.shape) for layer in layers) * 4
    outer = sum(p.numel() for p in model.parameters()) * item - sum(per_block)
    base = _base(device)
    tokens = calibration.samples * calibration.seqlen if calibration else 64
    widths, tuning = sorted({layer.shape[1] for layer in layers}), recipe.tuning
    hidden = model.config.get_text_config().hidden_size
    grams = widths[-1] ** 2 * 4 * 4  # H, its permuted copy, its factor and M
    alive = {
        "linear": tokens * item * (3 * hidden + 2 * widths[-1]),
        "block": tokens * item * 2 * hidden + sum(w * w * 4 for w in widths) * 2,
    }

    learning = 0
    experts = [0] * len(blocks)
    for layer in layers:
        experts[layer.block] += math.prod(layer.shape) * (layer.share < 1)
    if any(experts):
        alive["block"] += tokens * item * hidden  # what the experts were called with
        # all that read one norm are scaled at once: the weights before, and in float for the choice
        learning += max(experts) * (item + 4) if recipe.transforms else 0
    if tuning is not None:  # weights, the best of them, gradients, two moments; what backward keeps of a call
        call = tuning.batch * calibration.seqlen * (16 * hidden + 6 * widths[-1])
        learning += 2 * tokens * item * hidden + 5 * max(per_block) // item * 4 + 4 * call

    # Embeddings and head are resident only while no activations are: at the very start and the very end.
    def peak(d: str) -> int:
        working = max(per_block) * 1.2 + alive[d] + learning + (grams if calibration else 0) + 4 * largest
        return int(base + 1.4 * max(outer, working))  # 1.4: what allocators keep between uses, measured

    if depth == "auto":
        depth = "linear" if peak("linear") < 0.8 * available(device) else "block"
    if depth not in alive:
        raise InputError(f"depth {depth!r} is unknown; choose auto, linear or block")
    if peak(depth) > available(device):
        raise InputError(
            f"this run needs about {peak(depth) / 1e9:.1f} GB and {device} has "
            f"{available(device) / 1e9:.1f} GB; use "
            "fewer --samples or a shorter --seqlen"
        )
    return depth, peak(depth)


def memory_whole(model, layers, calibration, device, depth, item) -> tuple[str, int]:
    """("whole", predicted peak bytes) of a model that is held at once: its weights, what rounding the largest
    of them takes, or one batch of sentences.
    """
    if depth not in ("auto", "whole"):
        raise InputError(f"depth {depth!r} is for models that are read block by block; leave it at auto")
    weights = sum(p.numel() for p in model.parameters()) * item
    rounding = 6 * max(math.prod(layer.shape) for layer in layers) * 4
    config, sentence = model.config, calibration.seqlen if calibration else 32
    tokens = BATCH * min(sentence, config.max_position_embeddings)
    running = tokens * item * (8 * config.hidden_size + 4 * config.intermediate_size)
    peak = int(_base(device) + 1.4 * (weights + max(rounding, running)))
    if peak > available(device):
        raise InputError(
            f"this run needs about {peak / 1e9:.1f} GB and {device} has {available(device) / 1e9:.1f} GB"
        )
    return "whole", peak


def _base(device: str) -> int:
    """Bytes that the process holds already, of the device that computes; where the system does not tell, the
    usual size of torch and transformers.
    """
    return 0 if device != "cpu" else resident() or 500_000_000


def available(device: str) -> int:
    """Bytes that could be used on the device."""
    if device != "cpu":
        return torch.cuda.mem_get_info(torch.device(device))[0]
    try:
        with open("/proc/meminfo") as f:
            kb = {line.split(":")[0]: int(line.split()[1]) for line in f}
        return kb["MemAvailable"] * 1024 + _base(device)
    except (OSError, KeyError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
