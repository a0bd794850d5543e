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

import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from fewbit.errors import InputError
from fewbit.kernel.gram import add_gram, full
from fewbit.nn.blocks import is_transposed, weight_of
from fewbit.search.judge import Judge, Tick, block_linears, logits_of, replaced

LEVELS = (0.05, 0.1, 0.2, 0.3)  # |E| / |W|: 0.09 is HIGGS at 4 bits, 0.17 at 3, 0.33 at 2


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
    modules, out = block_linears(model), []
    names = list(modules if layers is None else layers)
    with Judge(model, tokens) as judge:
        for i, name in enumerate(names):
            judge.start_at(name)
            out.append(response(judge, name, modules[name].weight, levels, seed))
            if progress is not None:
                progress(i + 1, len(names))
    return tuple(out)


@torch.no_grad()
def response(
    judge: Judge, layer: str, weight: nn.Parameter, levels: Sequence[float], seed: int = 0
) -> Response:
    """The response to noise in one layer, whose ``weight`` is in the model of ``judge``."""
    off, found = noise(weight, seed + zlib.crc32(layer.encode())), []
    for t in levels:
        with replaced(weight, weight + t * off):
            found.append(judge.kl())
    return Response(layer=layer, weights=weight.numel(), levels=tuple(levels), kl=tuple(found))


def fisher(
    model: nn.Module, tokens: Tensor, *, seed: int = 0, progress: Tick | None = None
) -> dict[str, float]:
    """a_l of every layer in the blocks from squared gradients, one backward a window of ``tokens`` [w, l]."""
    modules = block_linears(model)
    return {
        name: float(rows.mean() * modules[name].weight.detach().float().square().sum())
        for name, rows in fisher_rows(model, tokens, seed=seed, progress=progress).items()
    }


def fisher_rows(
    model: nn.Module, tokens: Tensor, *, seed: int = 0, progress: Tick | None = None
) -> dict[str, Tensor]:
    """r [out] of every layer in the blocks: what a squared error of 1 in a row of the weight costs,

        KL = sum_o r_o |e_o|^2,     r_o = tr F_o / (2 in),     a_l = |W|^2 * mean(r)

    float32; F_o is the Fisher matrix of the row. One backward a window of ``tokens`` [w, l].
    """
    modules = block_linears(model)
    weights = [m.weight for m in modules.values()]
    total = {n: torch.zeros(weight_of(m).shape[0], device=m.weight.device) for n, m in modules.items()}
    with _watched(model, weights):
        for i, loss in enumerate(_losses(model, tokens, seed), 1):
            grads = torch.autograd.grad(loss, weights)
            for (name, module), grad in zip(modules.items(), grads, strict=True):
                total[name] += grad.float().square().sum(0 if is_transposed(module) else 1)
            if progress is not None:
                progress(i, len(tokens))
    return {n: total[n] / (2 * tokens.numel() * weight_of(m).shape[1]) for n, m in modules.items()}


def fisher_inputs(
    model: nn.Module,
    layers: Sequence[str],
    tokens: Tensor,
    *,
    seed: int = 0,
    progress: Tick | None = None,
) -> dict[str, Tensor]:
    """M [in, in] of each layer: the Gram matrix of its inputs, each token weighted by how much the model
    minds errors there, g its gradient at the output; scaled to a mean diagonal of 1,

        M ~ sum_t |g_t|^2 x_t x_t^T,     KL ~ sum_o r_o e_o M e_o^T

    float32. One backward a window of ``tokens`` [w, l]. Layers that the text never reaches are left out.
    """
    modules, total = block_linears(model), {}
    seen: list[tuple[str, Tensor, Tensor]] = []

    def hook(name: str):
        return lambda module, args, out: seen.append((name, args[0].detach(), out))

    handles = [modules[n].register_forward_hook(hook(n)) for n in layers]
    try:
        with _watched(model, [modules[n].weight for n in layers]):
            for i, loss in enumerate(_losses(model, tokens, seed), 1):
                grads = torch.autograd.grad(loss, [out for _, _, out in seen])
                for (name, x, _), g in zip(seen, grads, strict=True):
                    rows = x.flatten(0, -2).float() * g.flatten(0, -2).float().norm(dim=1, keepdim=True)
                    total.setdefault(name, torch.zeros(rows.shape[1], rows.shape[1], device=rows.device))
                    add_gram(total[name], rows)
                seen.clear()
                if progress is not None:
                    progress(i, len(tokens))
    finally:
        for handle in handles:
            handle.remove()
    grams = {name: full(m) for name, m in total.items()}
    return {n: m / m.diagonal().mean() for n, m in grams.items() if float(m.diagonal().sum()) > 0}


def _losses(model: nn.Module, tokens: Tensor, seed: int) -> Iterator[Tensor]:
    """For each window the negative log likelihood, with its graph, of labels that the model draws itself."""
    generator = torch.Generator(device=next(model.parameters()).device).manual_seed(seed)
    for window in tokens:
        with torch.enable_grad():
            logits = logits_of(model, window[None])[0]
            drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
            yield functional.cross_entropy(logits, drawn, reduction="sum")


@contextmanager
def _watched(model: nn.Module, weights: Sequence[nn.Parameter]) -> Iterator[None]:
    """Gradients reach ``weights`` and no other parameter, for a while."""
    asked = [p.requires_grad for p in model.parameters()]
    model.requires_grad_(False)
    for weight in weights:
        weight.requires_grad_(True)
    try:
        yield
    finally:
        for p, before in zip(model.parameters(), asked, strict=True):
            p.requires_grad_(before)


def predict(coefficients: Mapping[str, float], errors: Mapping[str, float]) -> float:
    """sum_l a_l t_l^2 over the layers of ``errors``: the expected KL."""
    return sum(coefficients[name] * t2 for name, t2 in errors.items())
