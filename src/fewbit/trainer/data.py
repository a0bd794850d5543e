"""Windows of a text: the first part is trained on, the last is held out.

In each epoch the tokens are cut into windows from a random phase, and the windows are taken in random order,
so that no window is seen twice before all were seen once. Order and phase of an epoch follow from (seed,
epoch) alone: batch ``i`` can be had without the ``i`` before it, which is all that resuming needs.

Shapes: ids [n] int64, a batch [b, l].

Road not taken: the state of a shuffling sampler in the checkpoint. It has to be kept in step with workers
that read ahead; a position is one number.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from fewbit.errors import InputError
from fewbit.io.text import Join, join, read_text, token_ids
from fewbit.trainer.settings import Settings

HELD_OUT = 0.05  # share of the text's end that is not trained on, where no other text is given


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """``ids`` [n] to train on, ``held`` [w, l] windows that are only scored, and where they came from."""

    ids: Tensor
    held: Tensor
    name: str

    @property
    def digest(self) -> str:
        """A hash of the tokens."""
        found = hashlib.sha256()
        for part in (self.ids, self.held):
            found.update(part.contiguous().numpy().astype("<i8").tobytes())
        return found.hexdigest()[:16]


def read_corpus(
    tokenizer: Any, data: str | Path | None, settings: Settings, held_out: str | Path | None = None
) -> Corpus:
    """The tokens of ``data``; ``held_out``: another text for the held-out windows, or None for the end of it.

    Raises ``InputError`` for a text that is too short for one batch and one held-out window.
    """
    text = read_text(data)
    ids = token_ids(tokenizer, join(text, Join.SOLID))
    l = settings.length
    if held_out is None:
        kept = max(l, int(len(ids) * HELD_OUT))
        ids, rest = ids[: max(0, len(ids) - kept)], ids[max(0, len(ids) - kept) :]
    else:
        rest = token_ids(tokenizer, join(read_text(held_out), Join.SOLID))
    windows = rest[: len(rest) // l * l].view(-1, l)
    needs = (settings.batch + 1) * l  # one batch from any phase
    if len(ids) < needs or not len(windows):
        raise InputError(
            f"{text.name} gives {len(ids)} tokens to train on and {len(windows)} held-out windows, but a "
            f"batch of {settings.batch} windows of {l} needs {needs} tokens; give a longer text, or a "
            "smaller --batch or --length"
        )
    every = max(1, len(windows) // settings.held)  # spread over the held-out part
    return Corpus(ids=ids, held=windows[::every][: settings.held].contiguous(), name=text.name)


class Windows(Dataset):
    """Tokens by the place where a window starts."""

    def __init__(self, ids: Tensor, length: int):
        self.ids, self.length = ids, length

    def __getitem__(self, start: int) -> Tensor:
        return self.ids[start : start + self.length]


class Order(Sampler[list[int]]):
    """Starts of the windows of each batch, from batch ``first`` on, without end."""

    def __init__(self, tokens: int, settings: Settings, first: int = 0):
        self.tokens, self.settings, self.first = tokens, settings, first

    def __iter__(self) -> Iterator[list[int]]:
        size, each = self.settings.batch, self._each
        i, starts, epoch = self.first, None, -1
        while True:
            at, wanted = divmod(i, each)
            if at != epoch:
                epoch, starts = at, self._starts(at)
            yield starts[wanted * size : (wanted + 1) * size]
            i += 1

    @property
    def _each(self) -> int:
        """Batches of one epoch; a window is lost to the phase."""
        return (self.tokens // self.settings.length - 1) // self.settings.batch

    def _starts(self, epoch: int) -> list[int]:
        l = self.settings.length
        draw = torch.Generator().manual_seed((self.settings.seed * 1_000_003 + epoch) % 2**63)
        phase = int(torch.randint(l, (), generator=draw))
        order = torch.randperm((self.tokens - phase) // l, generator=draw)
        return (order * l + phase).tolist()


def batches(ids: Tensor, settings: Settings, first: int = 0) -> Iterator[Tensor]:
    """Batches [b, l] from number ``first`` on, without end."""
    order, own = Order(len(ids), settings, first), torch.Generator()
    # With a generator of its own: else it draws a seed for workers from that of stochastic rounding.
    return iter(DataLoader(Windows(ids, settings.length), batch_sampler=order, generator=own))
