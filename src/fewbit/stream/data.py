"""Calibration tokens: windows of a text, chosen by a seed that nobody else sees.

A text is cut at line ends into *pages* of about two windows. Pages are taken in random order and tokenised
until they hold twice the tokens wanted (or the text ends); their tokens, one after another, are cut into
aligned windows from a random phase, and ``samples`` of those are chosen at random. So windows never
overlap, a text with ``samples * seqlen`` tokens is always enough, and the cost is that of the tokens
wanted, not of the text: 0.2 CPU s instead of 2.0 for 32 x 512 tokens of 2.2 MB.

The price is a seam between two far-apart pages inside about every second window. The road not taken is to
tokenise everything and cut windows from the unbroken stream: fewer seams on a book, as many on web pages,
which are shorter than a window.

The generator is created here from the seed. The global one is neither read nor moved, so calibration never
changes what else a program draws.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewbit.errors import InputError
from fewbit.io.text import Join, join, read_text, token_ids

PAGE = 8  # characters per token of a window: pages of about two windows of English
POOL = 2  # tokens read per token wanted


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Which text, and how much of it: ``samples`` windows of ``seqlen`` tokens.

    ``source`` is what `fewbit.io.text.read_text` takes; ``None`` is the embedded default. GPTQ wants at least
    five times as many tokens as the widest linear has inputs.
    """

    source: str | Path | None = None
    samples: int = 128
    seqlen: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("samples", 1), ("seqlen", 2), ("seed", 0)):
            value = getattr(self, name)
            if type(value) is not int or not least <= value < 2**63:
                raise InputError(f"calibration {name} is {value!r}: expected a whole number from {least} on")


def sample_tokens(calibration: Calibration, tokenizer: Any) -> Tensor:
    """Token windows [samples, seqlen] int64 on the CPU; the same for the same text, tokenizer and settings.

    Raises InputError when the text has fewer than ``samples * seqlen`` tokens, with the count.
    """
    text = read_text(calibration.source)
    samples, seqlen = calibration.samples, calibration.seqlen
    wanted = samples * seqlen
    generator = torch.Generator().manual_seed(calibration.seed)

    pages = _pages(join(text, Join.SOLID), PAGE * seqlen)
    parts, n = [], 0
    for page in torch.randperm(len(pages), generator=generator).tolist():
        parts.append(token_ids(tokenizer, pages[page]))
        n += len(parts[-1])
        if n >= POOL * wanted:
            break
    if n < wanted:
        raise InputError(
            f"{text.name} gives {n} tokens, but {samples} samples of {seqlen} need {wanted}: "
            f"ask for at most {n // seqlen} samples, for shorter ones, or give a longer text"
        )
    stream = torch.cat(parts)
    phase = int(torch.randint(min(n - wanted, seqlen - 1) + 1, (), generator=generator))
    aligned = stream[phase : phase + (n - phase) // seqlen * seqlen].view(-1, seqlen)
    return aligned[torch.randperm(len(aligned), generator=generator)[:samples]]


def token_hash(tokens: Tensor) -> str:
    """SHA-256 in hex of the shape and the little-endian int64 ids of ``tokens``, for a run's manifest."""
    ids = tokens.detach().to("cpu", torch.int64).contiguous().numpy()
    shape = "x".join(str(size) for size in ids.shape).encode()
    return hashlib.sha256(shape + b":" + ids.astype("<i8").tobytes()).hexdigest()


def _pages(text: str, characters: int) -> list[str]:
    """``text`` cut at the first line end after every ``characters``; without line ends it is one page."""
    pages, start = [], 0
    while start < len(text):
        end = text.find("\n", start + characters) + 1 or len(text)
        pages.append(text[start:end])
        start = end
    return pages
