"""Outliers of the inputs of a group of layers: which channels, which tokens, and what they cost in bits.

A channel j stands out

    by LLM.int8()'s criterion   |x_tj| >= 6 at 6 % of the tokens t or more        (section 3.2 of the paper)
    relatively                  rms_t x_tj >= 6 times the median of that over all channels

The first is absolute and speaks of large models in their own units; the second asks how far a channel is
from its neighbours, which is what a common step feels. A *token* stands out where max_j |x_tj| reaches 10
times its median over tokens.

Bits lost: a step is proportional to the largest magnitude, and errors to the step. With n normal values of
equal rms the largest would be about g(n) rms, where P(|z| > g) = 1 / n. So a common step loses

    bits lost = log2( max |x| / (g(n) rms(x)) )          over the whole tensor, or the mean of it over tokens

effective bits of its format; a bit is 6 dB. Zero: like a normal distribution; below: flatter than that.

LLM.int8(): Dettmers, Lewis, Belkada, Zettlemoyer 2022, https://arxiv.org/abs/2208.07339.

Shapes: x [tokens, in]. Everything but the sample is reduced as the batches pass.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

from fewbit.inspect.tokens import Kind, Tokens

ABSOLUTE, SHARE = 6.0, 0.06  # LLM.int8()
RELATIVE, TOKEN = 6.0, 10.0
SAMPLE = 256  # tokens on which remedies are tried
PICTURE = 96  # tokens of the first window that a heat map shows


@dataclass(frozen=True, kw_only=True)
class Channel:
    """A channel that stands out. ratio: its rms over the median channel's; largest: max |x|; share of tokens
    where |x| >= 6; by: "absolute", "relative" or "both".
    """

    index: int
    ratio: float
    largest: float
    share: float
    by: str


@dataclass(frozen=True, kw_only=True)
class InputReport:
    """What was seen of the input that a group of layers reads.

    low, high, rms, kurtosis (of all values together; 3 for Gauss); bits_lost by one step for the tensor,
    bits_lost_token by one for each token; channels: those that stand out, the farthest first; tokens_out:
    share of tokens that stand out; kinds: of those, how many of each kind; texts: the most frequent of them
    (both empty where the layers did not see every token).
    """

    tokens: int
    width: int
    low: float
    high: float
    rms: float
    kurtosis: float
    bits_lost: float
    bits_lost_token: float
    channels: tuple[Channel, ...]
    tokens_out: float
    kinds: dict[str, int]
    texts: tuple[str, ...]

    @property
    def largest(self) -> float:
        """max |x|."""
        return max(self.high, -self.low)


def gauss_reach(n: int) -> float:
    """g(n): the magnitude that one of n normal values exceeds on average."""
    return math.sqrt(2) * float(torch.erfinv(torch.tensor(1 - 1 / max(n, 2), dtype=torch.float64)))


class Watch:
    """Sees x [..., in] batch after batch, in the order of the windows."""

    def __init__(self, total: int):
        self._every = max(1, total // SAMPLE)
        self._n = 0
        self._sums = torch.zeros(4, dtype=torch.float64)  # of x, x^2, x^3, x^4
        self._square: Tensor | None = None  # [in], and below
        self._often: Tensor | None = None
        self._low: Tensor | None = None
        self._high: Tensor | None = None
        self._reach: list[Tensor] = []  # max |x| of each token
        self._rms: list[Tensor] = []
        self._sample: list[Tensor] = []
        self.picture: Tensor | None = None  # |x| of the first tokens

    def add(self, x: Tensor) -> None:
        """One batch."""
        x = x.detach().reshape(-1, x.shape[-1]).float()
        square = x.square()
        own = torch.stack([x.sum(), square.sum(), (square * x).sum(), square.square().sum()])
        self._sums += own.double().cpu()
        often = (x.abs() >= ABSOLUTE).sum(0)
        low, high = torch.aminmax(x, dim=0)
        if self._square is None:
            self._square, self._often, self._low, self._high = square.sum(0), often, low, high
            self.picture = x[:PICTURE].abs().cpu()
        else:
            self._square += square.sum(0)
            self._often += often
            self._low, self._high = self._low.minimum(low), self._high.maximum(high)
        self._reach.append(x.abs().amax(1))
        self._rms.append(square.mean(1).sqrt())
        # Every k-th token from k / 2 on, whatever the batches: first tokens are few and stay as few.
        first = (self._every // 2 - self._n) % self._every
        self._sample.append(x[first :: self._every])
        self._n += len(x)

    @property
    def seen(self) -> bool:
        """Whether anything came by."""
        return self._n > 0

    @property
    def sample(self) -> Tensor:
        """Evenly chosen tokens [rows, in]."""
        return torch.cat(self._sample)

    @property
    def abs_max(self) -> Tensor:
        """max_t |x_tj| [in]."""
        return self._high.maximum(-self._low)

    def report(self, tokens: Tokens) -> InputReport:
        """What was seen; ``tokens``: the windows that passed."""
        n, width = self._n, len(self._square)
        m1, m2, m3, m4 = (self._sums / (n * width)).tolist()
        variance = m2 - m1**2
        fourth = m4 - 4 * m1 * m3 + 6 * m1**2 * m2 - 3 * m1**4
        rms, largest = math.sqrt(m2), float(self.abs_max.max())
        reach, own = torch.cat(self._reach), torch.cat(self._rms)
        at = own > 0
        per_token = (reach[at] / (gauss_reach(width) * own[at])).log2().mean() if at.any() else own.sum()
        out = (reach >= TOKEN * reach.median().clamp(min=1e-30)).cpu()
        whole = len(out) == tokens.ids.numel()  # an expert sees some tokens, and nobody knows which
        named = out if whole else torch.zeros(tokens.ids.numel(), dtype=torch.bool)
        kinds, ids = tokens.kinds.flatten()[named], tokens.ids.flatten()[named]
        texts = Counter(tokens.text(i) for i in ids.tolist()).most_common(5)
        return InputReport(
            tokens=n,
            width=width,
            low=float(self._low.min()),
            high=float(self._high.max()),
            rms=rms,
            kurtosis=fourth / variance**2 if variance > 0 else 0.0,
            bits_lost=math.log2(largest / (gauss_reach(n * width) * rms)) if rms else 0.0,
            bits_lost_token=float(per_token),
            channels=self._channels(),
            tokens_out=float(out.float().mean()),
            kinds={k.words: int((kinds == k).sum()) for k in Kind if (kinds == k).any()},
            texts=tuple(text for text, _ in texts),
        )

    def _channels(self) -> tuple[Channel, ...]:
        rms = (self._square / self._n).sqrt()
        ratio, share = rms / rms.median().clamp(min=1e-30), self._often / self._n
        far, big = ratio >= RELATIVE, share >= SHARE
        found = (far | big).nonzero().flatten()
        found = found[ratio[found].argsort(descending=True)].tolist()
        by = {(True, True): "both", (True, False): "relative", (False, True): "absolute"}
        return tuple(
            Channel(
                index=j,
                ratio=float(ratio[j]),
                largest=float(self.abs_max[j]),
                share=float(share[j]),
                by=by[bool(far[j]), bool(big[j])],
            )
            for j in found
        )
