"""Perplexity, KL divergence and top-1 agreement in one pass over windows of a text.

    perplexity = exp( mean over scored tokens of  -log p(x_t | x_<t in its window) )

A window is ``window`` tokens of the joined text with no special token. Windows start every ``stride``
tokens. At ``stride == window``, the protocol of GPTQ and of nearly every quantization paper, they do not
overlap and each predicts its tokens 2..window. A smaller stride gives each token at least ``window -
stride`` tokens of context and scores, after the first window, only the ``stride`` new ones. Tokens behind
the last whole window are not scored. Figures of different windows, strides or joins must not be compared,
so they are part of the result.

One forward over a window never reads a cache of keys and values. With ``chunk``, a window goes through the
model so many tokens at a time; a call attends to its own keys and values as they are and to those of earlier
calls as the cache gives them back. ``chunk=1`` is decoding, token by token; 64 is much faster and nearly as
strict. Compare a quantized cache with the float one under the same chunk.

Logits become float32 log probabilities a few positions at a time: beside the logits themselves, memory is
bounded by `CHUNK` whatever the vocabulary. Sums are kept in float64.

Shapes: w windows, l tokens of a window, n scored positions, v vocabulary.
"""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from fewbit.errors import InputError
from fewbit.evaluate.divergence import kl_divergence, top1_agreement
from fewbit.evaluate.forward import masked, predict
from fewbit.io.text import Join, Text, join, token_ids

CHUNK = 2**22  # float32 elements of log probabilities in flight: 16 MiB


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """What is scored. ``windows``: at most so many (``None``: all); ``stride``: ``None`` means ``window``;
    ``chunk``: tokens of one call of the model, ``None`` for a whole window without a cache.

    The defaults suit a comparison of results with their original in a minute; published WikiText
    perplexities use ``window=2048, windows=None, join=Join.ROWS``.
    """

    window: int = 512
    windows: int | None = 12
    stride: int | None = None
    join: Join = Join.SOLID
    chunk: int | None = None

    def __post_init__(self) -> None:
        if type(self.window) is not int or self.window < 2:
            raise InputError(
                f"a window of {self.window!r} tokens predicts nothing: expected a whole number from 2 on"
            )
        if self.windows is not None and (type(self.windows) is not int or self.windows < 1):
            raise InputError(
                f"the number of windows is {self.windows!r}: expected one or more, or None for all"
            )
        if self.stride is not None and (type(self.stride) is not int or not 1 <= self.stride <= self.window):
            raise InputError(
                f"the stride is {self.stride!r}: expected 1 to {self.window}, the window's length"
            )
        if self.chunk is not None and (type(self.chunk) is not int or not 1 <= self.chunk <= self.window):
            raise InputError(
                f"the chunk is {self.chunk!r}: expected 1 to {self.window} tokens, the window's length"
            )
        if not isinstance(self.join, Join):
            raise InputError(f"the join is {self.join!r}: expected Join.ROWS or Join.SOLID")

    @property
    def step(self) -> int:
        """Tokens from the start of one window to the start of the next."""
        return self.window if self.stride is None else self.stride

    def first_scored(self, index: int) -> int:
        """Position in window ``index`` of the first token whose prediction is scored; the rest follow."""
        return 1 if index == 0 else max(1, self.window - self.step)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The figures, and all that must be known to read them.

    ``perplexity``: None for a masked language model. ``nll``: its logarithm, nats per token. ``kl``: nats
    per token, KL(original || result). ``top1``: 0 to 1. The errors are standard errors of the mean over
    windows (None for one window). ``tokens``: scored positions. ``seconds``: wall time of the pass, the
    original's included. ``cache_bytes``: largest cache at the end of a window, None without a chunk.
    """

    data: str
    window: int
    windows: int
    stride: int
    join: Join
    chunk: int | None
    cache_bytes: int | None
    tokens: int
    seconds: float
    perplexity: float | None
    nll: float | None
    nll_error: float | None
    kl: float | None
    kl_error: float | None
    top1: float | None

    def as_dict(self) -> dict[str, Any]:
        """Plain values under the field names, ready for JSON (an overflow stays ``inf``)."""
        return asdict(self) | {"join": self.join.value}


def windows(tokenizer: Any, text: Text, protocol: Protocol) -> Tensor:
    """Token windows [w, l] int64 of ``text`` under ``protocol``, in the order of the text.

    Raises InputError when the text is shorter than one window.
    """
    ids = token_ids(tokenizer, join(text, protocol.join))
    if len(ids) < protocol.window:
        raise InputError(
            f"{text.name} gives {len(ids)} tokens, fewer than one window of {protocol.window}: "
            "give a longer text or a shorter window"
        )
    return ids.unfold(0, protocol.window, protocol.step)[: protocol.windows].contiguous()


def evaluate(
    model: Callable[..., Any],
    tokens: Tensor,
    protocol: Protocol,
    against: Callable[..., Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
    data: str = "",
    cache: Callable[[], Any] | None = None,
) -> Evaluation:
    """Score ``model`` on ``tokens`` [w, l] from `windows`, and compare it with the original ``against``.

    ``model`` and ``against``: anything that takes ``input_ids`` [1, l] and returns an object with
    ``logits`` [1, l, v]; modules run where they are and must be in evaluation mode. A masked language model
    (BERT) predicts no next token: it needs ``against``, is compared at all positions, and has no
    perplexity. ``progress(done, total)`` is called after each window; ``data`` names the text in the
    result. ``cache()`` makes an empty cache for a window, under a protocol with a chunk; without it the model
    makes its own. The original runs whole windows, without a cache.

    Raises InputError for a window longer than the model's positions, a token outside its vocabulary, two
    vocabularies of different size, logits with NaN, and a cache that would not be read.
    """
    if tokens.ndim != 2 or len(tokens) == 0 or tokens.shape[1] != protocol.window:
        raise InputError(f"tokens have the shape {list(tokens.shape)}: expected [windows, {protocol.window}]")
    causal = not masked(model)
    if not causal and against is None:
        raise InputError(
            f"{type(model).__name__} fills in masked words and has no perplexity: "
            "name the original to compare with, for KL and top-1 agreement"
        )
    for each in (model, against):
        _check(each, tokens)
    if cache is not None and protocol.chunk is None:
        raise InputError("a window in one call never reads a cache: give the protocol a chunk, such as 64")
    if protocol.chunk is not None and not causal:
        raise InputError(f"{type(model).__name__} sees both sides and has no cache: leave the chunk out")

    start = time.perf_counter()
    rows, held = [], None
    with torch.no_grad():
        for index, ids in enumerate(tokens):
            where = f"window {index + 1} of {len(tokens)}"
            first = protocol.first_scored(index)
            # A causal model's logits at t - 1 predict token t; a masked one's are all there is to compare.
            scored = slice(first - 1, -1) if causal else slice(None)
            result, used = predict(model, ids, protocol.chunk, cache, where)
            result = result[scored]
            held = used if held is None else max(held, used)
            original = None if against is None else predict(against, ids, None, None, where)[0][scored]
            rows.append(_score(result, ids[first:] if causal else None, original, where))
            if progress is not None:
                progress(index + 1, len(tokens))
    seconds = time.perf_counter() - start

    n, nll, kl, hits = torch.tensor(rows, dtype=torch.float64).unbind(dim=1)
    total = n.sum()
    mean_nll = (nll.sum() / total) if causal else None
    return Evaluation(
        data=data,
        window=protocol.window,
        windows=len(tokens),
        stride=protocol.step,
        join=protocol.join,
        chunk=protocol.chunk,
        cache_bytes=held,
        tokens=int(total),
        seconds=seconds,
        perplexity=None if mean_nll is None else mean_nll.exp().item(),
        nll=None if mean_nll is None else mean_nll.item(),
        nll_error=_standard_error(nll / n) if causal else None,
        kl=None if against is None else (kl.sum() / total).item(),
        kl_error=None if against is None else _standard_error(kl / n),
        top1=None if against is None else (hits.sum() / total).item(),
    )


def _score(result: Tensor, targets: Tensor | None, original: Tensor | None, where: str) -> tuple[float, ...]:
    """Sums over the n positions of one window: n, negative log likelihood, KL, agreements."""
    n, v = result.shape
    if original is not None and original.shape != result.shape:
        raise InputError(
            f"the original gives {original.shape[-1]} logits per token and the result {v}: "
            "expected one vocabulary; name the model that the result was made from"
        )
    nll = kl = hits = 0.0
    step = max(1, CHUNK // v)
    for begin in range(0, n, step):
        part = slice(begin, begin + step)
        q = _log_probabilities(result[part], f"{where}: the logits")
        if targets is not None:
            nll -= q.gather(1, targets[part, None].to(q.device)).double().sum().item()
        if original is not None:
            p = _log_probabilities(original[part].to(q.device), f"{where}: the original's logits")
            kl += kl_divergence(p, q).double().sum().item()
            hits += top1_agreement(p, q).sum().item()
    return float(n), nll, kl, hits


def _log_probabilities(logits: Tensor, where: str) -> Tensor:
    log = logits.float().log_softmax(dim=-1)
    # One NaN or +inf among the logits of a position makes the whole row NaN, so one column tells.
    bad = int(log[:, 0].isnan().sum())
    if bad:
        raise InputError(
            f"{where} hold NaN or +inf at {bad} or more positions: a broken weight or an overflow; "
            "check the weights, or run it in float32"
        )
    return log


def _check(model: Callable[..., Any] | None, tokens: Tensor) -> None:
    """Raise InputError for what the model's configuration already rules out."""
    if isinstance(model, torch.nn.Module) and model.training:
        raise InputError(
            f"{type(model).__name__} is in training mode, where dropout is random: call model.eval()"
        )
    config, name = getattr(model, "config", None), type(model).__name__
    if getattr(config, "is_encoder_decoder", False):
        raise InputError(f"{name} is an encoder-decoder: expected a causal or a masked language model")
    positions = getattr(config, "max_position_embeddings", None)
    if isinstance(positions, int) and tokens.shape[1] > positions:
        raise InputError(
            f"a window of {tokens.shape[1]} tokens is longer than the {positions} positions of {name}: "
            "ask for a shorter one"
        )
    vocabulary, largest = getattr(config, "vocab_size", None), int(tokens.max())
    if isinstance(vocabulary, int) and largest >= vocabulary:
        raise InputError(
            f"token {largest} is outside the {vocabulary} words of {name}: use its own tokenizer"
        )


def _standard_error(means: Tensor) -> float | None:
    return None if len(means) < 2 else (means.std() / math.sqrt(len(means))).item()
