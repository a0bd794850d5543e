"""HIGGS's linear model: what an error in each layer costs the whole model.

    KL(model || model with W_l + E_l in every layer l)  ~  sum_l a_l t_l^2,     t_l^2 = |E_l|^2 / |W_l|^2

for small errors that look like noise, such as rounding in a randomly rotated basis (the linearity
theorem). a_l belongs to the model and the text, not to the grid; so one estimate serves every choice of
formats. Two estimates of it:

`noise_responses` (the paper's own): add Gaussian noise of relative norm t to layer l alone, measure the KL,
fit a line through the origin over a few t. It sees what becomes of errors that are not small.

`fisher`: the limit of the same for t -> 0. Expanding the KL to second order, with F_l the Fisher matrix,

    a_l = |W_l|^2 / (2 N_l) * tr F_l,     tr F_l = E |d log p(y | x) / d W_l|^2,   y drawn from the model

which one backward of a window gives for all layers at once: labels drawn at each position are independent, so
the expected squared norm of the sum of their gradients is the sum of their traces.

HIGGS: Malinovskii, Panferov, Ilin, Guo, Richtarik, Alistarh 2024, https://arxiv.org/abs/2411.17525.

Shapes: tokens [windows, l]; W [out, in]; N = out * in. KL in nats per token.

Road not taken: perplexity in place of KL, as in the theorem. Its increase is a small difference of two large
numbers, of either sign for a single layer; KL is never negative, and needs no text that is like the model's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from fewbit.errors import InputError
from fewbit.nn.blocks import find_blocks, linears

LEVELS = (0.05, 0.1, 0.2, 0.3)  # |E| / |W|: 0.09 is HIGGS at 4 bits, 0.17 at 3, 0.33 at 2
_LOGITS = 2**27  # elements of logits at once: 512 MiB
Tick = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class Response:
    """What noise in one layer does: ``kl[i]`` nats per token at the relative norm ``levels[i]``; ``weights``:
    N of the layer.
    """

    layer: str
    weights: int
    levels: tuple[float, ...]
    kl: tuple[float, ...]

    @property
    def coefficient(self) -> float:
        """a_l: the line through the origin over t^2 with the least squared *relative* residuals.

        Residuals are relative to t^2, so that the largest noise, where the line bends, does not decide alone.
        """
        return sum(k / t**2 for t, k in zip(self.levels, self.kl, strict=True)) / len(self.levels)

    @property
    def bend(self) -> float:
        """KL / t^2 at the largest level over that at the smallest: 1 on a line."""
        pairs = sorted(zip(self.levels, self.kl, strict=True))
        (low, first), (high, last) = pairs[0], pairs[-1]
        return (last / high**2) / max(first / low**2, 1e-30)


def block_linears(model: nn.Module) -> dict[str, nn.Module]:
    """Every linear layer in the blocks of a model by its full name, in order: what recipes quantize."""
    blocks = find_blocks(model)
    return {
        f"{b}.{n}": m
        for b, block in zip(blocks.names, blocks.modules, strict=True)
        for n, m in linears(block).items()
    }


def random_tokens(vocabulary: int, windows: int, length: int, seed: int = 0) -> Tensor:
    """Uniformly random tokens [windows, length]: HIGGS's calibration where there is no text."""
    return torch.randint(
        vocabulary, (windows, length), generator=torch.Generator().manual_seed(seed), device="cpu"
    )


def noise(w: Tensor, seed: int) -> Tensor:
    """Gaussian noise of the expected norm of ``w``, like it; the same for a seed on every device."""
    z = torch.randn(w.shape, generator=torch.Generator().manual_seed(seed))
    return z.to(w.device) * (w.detach().float().norm() / w.numel() ** 0.5)


@torch.no_grad()
def noise_responses(
    model: nn.Module,
    tokens: Tensor,
    *,
    layers: Sequence[str] | None = None,
    levels: Sequence[float] = LEVELS,
    seed: int = 0,
    progress: Tick | None = None,
) -> tuple[Response, ...]:
    """The response of each layer of ``layers`` (all in the blocks) to noise in it alone.

    The model is a float language model in evaluation mode; its weights are as before when this returns.
    Raises ``InputError`` for no or impossible levels.
    """
    if not levels or not all(0 < t < 10 for t in levels):
        raise InputError(f"noise levels {tuple(levels)} are impossible; give relative norms such as 0.1")
    modules, judge = block_linears(model), Judge(model, tokens)
    names, out = list(modules if layers is None else layers), []
    for i, name in enumerate(names):
        weight = modules[name].weight
        off = noise(weight, seed + 1_000_003 * i)
        found = []
        for t in levels:
            with replaced(weight, weight + t * off):
                found.append(judge.kl())
        out.append(Response(layer=name, weights=weight.numel(), levels=tuple(levels), kl=tuple(found)))
        if progress is not None:
            progress(i + 1, len(names))
    return tuple(out)


def fisher(
    model: nn.Module, tokens: Tensor, *, seed: int = 0, progress: Tick | None = None
) -> dict[str, float]:
    """a_l of every layer in the blocks from squared gradients, one backward a window of ``tokens`` [w, l]."""
    modules, total = block_linears(model), dict.fromkeys(block_linears(model), 0.0)
    weights = [m.weight for m in modules.values()]
    asked = [p.requires_grad for p in model.parameters()]
    generator = torch.Generator(device=weights[0].device).manual_seed(seed)
    model.requires_grad_(False)
    try:
        for weight in weights:
            weight.requires_grad_(True)
        for i, window in enumerate(tokens):
            with torch.enable_grad():
                logits = logits_of(model, window[None])[0]
                drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
                loss = functional.cross_entropy(logits, drawn, reduction="sum")
                grads = torch.autograd.grad(loss, weights)
            for name, grad in zip(modules, grads, strict=True):
                total[name] += float(grad.float().square().sum())
            if progress is not None:
                progress(i + 1, len(tokens))
    finally:
        for p, before in zip(model.parameters(), asked, strict=True):
            p.requires_grad_(before)
    return {
        name: total[name] / tokens.numel() * float(m.weight.detach().float().square().mean()) / 2
        for name, m in modules.items()
    }


def predict(coefficients: Mapping[str, float], errors: Mapping[str, float]) -> float:
    """sum_l a_l t_l^2 over the layers of ``errors``: the expected KL."""
    return sum(coefficients[name] * t2 for name, t2 in errors.items())


class Judge:
    """KL(model as it was at first || model as it is now) over ``tokens`` [w, l], in nats per token.

    Keeps the log probabilities of the first pass, float32: l * vocabulary * 4 bytes a window.
    """

    def __init__(self, model: nn.Module, tokens: Tensor):
        if model.training:
            raise InputError(f"{type(model).__name__} is in training mode: call model.eval()")
        self.model, self.tokens = model, tokens
        first = logits_of(model, tokens[:1])
        self.parts = tokens.split(max(1, _LOGITS // first.numel()))
        with torch.no_grad():
            self.float = [logits_of(model, part).log_softmax(-1) for part in self.parts]

    @torch.no_grad()
    def kl(self) -> float:
        """The divergence now."""
        total = 0.0
        for part, p in zip(self.parts, self.float, strict=True):
            q = logits_of(self.model, part).log_softmax(-1)
            total += float(functional.kl_div(q, p, reduction="sum", log_target=True).double())
        return total / self.tokens.numel()


@contextmanager
def replaced(weight: nn.Parameter, value: Tensor) -> Iterable[None]:
    """Other values in a parameter, for a while."""
    before = weight.data
    weight.data = value.to(weight.dtype)
    try:
        yield
    finally:
        weight.data = before


def logits_of(model: nn.Module, ids: Tensor) -> Tensor:
    """Float32 logits [w, l, v]."""
    device = next(model.parameters()).device
    cache = {"use_cache": False} if getattr(model.config, "use_cache", False) else {}
    return model(input_ids=ids.to(device), **cache).logits.float()
