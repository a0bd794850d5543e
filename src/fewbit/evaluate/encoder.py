"""How well a sentence encoder keeps meaning: Spearman correlation on STS-B.

    e(s) = mean over the tokens of s of the last layer,  normalised;   score(s1, s2) = e(s1) . e(s2)

The figure is the rank correlation of these cosines with people's scores (0 to 5): Cer, Diab, Agirre,
Lopez-Gazpio, Specia 2017, "SemEval-2017 Task 1", https://arxiv.org/abs/1708.00055; mean pooling and cosine as
in Reimers and Gurevych 2019, "Sentence-BERT", https://arxiv.org/abs/1908.10084.

Ranks hide small changes: 1,500 pairs cannot tell two models apart whose embeddings differ by a percent. So
`Similarity` comes with the embeddings themselves, and `drift` compares them with the original's.

The road not taken: a classifier on GLUE's own regression head, which would have to be trained first.

Shapes: n sentences, t tokens, d embedding dimensions, p pairs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewbit.errors import InputError

_COLUMNS = ("sentence1", "sentence2", "score")


@dataclass(frozen=True)
class Pairs:
    """Sentence pairs with people's scores of their similarity."""

    name: str
    first: tuple[str, ...]
    second: tuple[str, ...]
    score: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Similarity:
    """Rank and linear correlation of cosine and score, -1 to 1, and the embeddings [2 p, d] behind them.

    The first p rows belong to the first sentences of the pairs. ``error``: standard error of the rank
    correlation, (1 - r^2) / sqrt(p - 1).
    """

    spearman: float
    pearson: float
    error: float
    pairs: int
    embeddings: Tensor


def read_pairs(path: str | Path) -> Pairs:
    """GLUE's STS-B file: tab-separated with a header, columns sentence1, sentence2 and score.

    Quotes are plain characters. Raises InputError for a file without these columns, a row that is short or
    a score that is no number.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); give STS-B's dev.tsv of GLUE") from None
    head, *rows = text.rstrip("\n").split("\n")
    names = head.rstrip("\r").split("\t")
    missing = [c for c in _COLUMNS if c not in names]
    if missing or not rows:
        raise InputError(
            f"{path} has {len(rows)} rows and columns {', '.join(names)}: expected rows with "
            f"{', '.join(_COLUMNS)}, as in STS-B's dev.tsv of GLUE"
        )
    at = [names.index(c) for c in _COLUMNS]
    out = []
    for number, row in enumerate(rows, 2):
        cells = row.rstrip("\r").split("\t")
        try:
            first, second, score = (cells[i] for i in at)
            out.append((first, second, float(score)))
        except (IndexError, ValueError):
            raise InputError(
                f"line {number} of {path} has {len(cells)} cells and no score where the header puts it; "
                "repair or remove it"
            ) from None
    return Pairs(Path(path).name, *map(tuple, zip(*out, strict=True)))


def batches(
    tokenizer: Any, sentences: list[str] | tuple[str, ...], *, size: int = 64, tokens: int = 128
) -> list[dict[str, Tensor]]:
    """Keywords for an encoder: sentences in their order, ``size`` a batch, padded to the longest, cut at
    ``tokens``.
    """
    return [
        dict(
            tokenizer(
                list(sentences[i : i + size]),
                padding=True,
                truncation=True,
                max_length=tokens,
                return_tensors="pt",
            )
        )
        for i in range(0, len(sentences), size)
    ]


def embed(model: nn.Module, tokenizer: Any, sentences: list[str] | tuple[str, ...], **cut: int) -> Tensor:
    """Unit embeddings [n, d] float32: the mean of the last hidden states of a sentence's tokens.

    Sentences run sorted by length, so that little is padded, and each once however often it occurs. ``cut``:
    ``size`` and ``tokens`` of `batches`. Raises InputError for a model in training mode or without hidden
    states.
    """
    if model.training:
        raise InputError(f"{type(model).__name__} is in training mode, where dropout is random: call .eval()")
    unique = sorted(set(sentences), key=lambda s: (len(s), s))
    parts, device = [], next(model.parameters()).device
    with torch.no_grad():
        for batch in batches(tokenizer, unique, **cut):
            batch = {name: part.to(device) for name, part in batch.items()}
            state = getattr(model(**batch), "last_hidden_state", None)
            if state is None:
                raise InputError(f"{type(model).__name__} gives no last_hidden_state; load it without a head")
            mask = batch["attention_mask"][..., None].to(state)
            parts.append(((state * mask).sum(1) / mask.sum(1)).float())
    table = nn.functional.normalize(torch.cat(parts).cpu(), dim=-1)
    index = {s: i for i, s in enumerate(unique)}
    return table[torch.tensor([index[s] for s in sentences])]


def similarity(model: nn.Module, tokenizer: Any, pairs: Pairs, **cut: int) -> Similarity:
    """Correlation of the cosines of the pairs' embeddings with their scores; keywords as in `embed`."""
    from scipy.stats import pearsonr, spearmanr

    p = len(pairs.score)
    if p < 3:
        raise InputError(f"{pairs.name} has {p} pairs; a correlation needs at least three")
    e = embed(model, tokenizer, pairs.first + pairs.second, **cut)
    cosine = (e[:p] * e[p:]).sum(-1).double().numpy()
    rank = float(spearmanr(cosine, pairs.score).statistic)
    return Similarity(
        spearman=rank,
        pearson=float(pearsonr(cosine, pairs.score).statistic),
        error=(1 - rank**2) / math.sqrt(p - 1),
        pairs=p,
        embeddings=e,
    )


def drift(embeddings: Tensor, original: Tensor) -> float:
    """Relative squared change sum |e - e0|^2 / sum |e0|^2 of embeddings [n, d]."""
    return ((embeddings - original).double().square().sum() / original.double().square().sum()).item()
