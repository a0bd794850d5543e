"""What kind of token stands at each place of a text: the first of its window, special, a separator,
punctuation, or another.

Outliers of the residual stream sit at tokens that say little, where attention that has nothing to do can
rest: [SEP] and punctuation in BERT (Bondarenko, Nagel, Blankevoort 2021, https://arxiv.org/abs/2109.12948,
section 3), the first token in decoders, and after it line ends and full stops (Massive Activations: Sun,
Chen, Kolter, Liu 2024, https://arxiv.org/abs/2402.17762, section 2.2).

Shapes: tokens [windows, l].
"""

from __future__ import annotations

import unicodedata
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor


class Kind(IntEnum):
    """A kind of token; the first that fits. FIRST: at place 0; SPECIAL: in the tokenizer's list of special
    tokens; SEPARATOR: white space alone, line ends included; PUNCTUATION: no letter and no digit.
    """

    FIRST = 0
    SPECIAL = 1
    SEPARATOR = 2
    PUNCTUATION = 3
    OTHER = 4

    @property
    def words(self) -> str:
        """As reports say it."""
        return self.name.lower()


class Tokens:
    """Windows of tokens with the kind and the text of each. Cuts nothing, adds nothing."""

    def __init__(self, ids: Tensor, tokenizer: Any):
        self.ids = ids
        self._texts = {i: tokenizer.decode([i]) for i in ids.unique().tolist()}
        special = set(getattr(tokenizer, "all_special_ids", ()))
        kinds = {i: _kind(text, i in special) for i, text in self._texts.items()}
        self.kinds = torch.tensor([[kinds[i] for i in row] for row in ids.tolist()])
        self.kinds[:, 0] = Kind.FIRST

    def text(self, token: int) -> str:
        """What a token id says; white space as an escape that can be seen."""
        text = self._texts[token]
        return repr(text)[1:-1] if not text.strip() else text

    def at(self, place: int) -> str:
        """The token at a place of the windows laid end to end, in quotes, with where it stands."""
        window, position = divmod(place, self.ids.shape[1])
        return f"'{self.text(int(self.ids[window, position]))}' at {position}"


def _kind(text: str, special: bool) -> Kind:
    if special:
        return Kind.SPECIAL
    if not text.strip():
        return Kind.SEPARATOR
    wordlike = any(unicodedata.category(c)[0] in "LN" for c in text)
    return Kind.OTHER if wordlike else Kind.PUNCTUATION
