"""Text that a model writes itself, to learn from where there is no data, or too little.

LLM-QAT, Liu et al. 2023, https://arxiv.org/abs/2305.17888, section 2.1, hybrid sampling: a random first
token, the next 3 to 5 by their largest probability, the rest at random.

    argmax over v of  log p_v - log e_v,   e_v exponential with mean 1,  is a draw from p

Keys and values wait in tensors of the final length, so that every step has the same shapes: on a GPU one
step is captured as a CUDA graph and replayed. A key's head serves g query heads; a step takes these as g
queries of one head, where repeating keys and values would read the cache g times over.

Shapes: b texts, h query heads, k heads of keys, g = h / k, n new tokens, l all tokens, d head size,
v vocabulary.

Road not taken: a serving engine for this. It writes faster still, and training would depend on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from fewbit.errors import InputError

SHARED_HEADS = "fewbit_shared_heads"


@torch.no_grad()
def sample_text(
    model: Any,
    count: int,
    length: int,
    *,
    generator: torch.Generator | None = None,
    prompts: Tensor | None = None,
    greedy: tuple[int, int] = (3, 5),
    temperature: float = 1.0,
    ends: tuple[int, ...] = (),
) -> Tensor:
    """Text that a transformers causal language model writes: token ids [count, length] int64.

    A text begins with a random token of the vocabulary; the next 3 to 5 (``greedy``, drawn per text) are the
    likeliest, the others sampled at ``temperature``. After one of the tokens ``ends`` the row goes on with a
    new text. prompts: beginnings [count, p] that all rows go on from by sampling, in the place of the first
    token. generator: on the model's device. All rows run as one batch with a cache of keys and values: choose
    ``count`` by memory. Raises ``InputError`` for lengths that leave nothing to write.
    """
    begun = 1 if prompts is None else prompts.shape[1]
    if count < 1 or length <= begun:
        raise InputError(
            f"{count} texts of {length} tokens leave nothing to write after the first {begun}; ask for more"
        )
    device, vocabulary = next(model.parameters()).device, model.config.get_text_config().vocab_size
    options = {"device": device, "generator": generator}
    fresh = lambda: torch.randint(vocabulary, (count,), **options)  # noqa: E731
    drawn = lambda: torch.randint(greedy[0], greedy[1] + 1, (count,), **options)  # noqa: E731
    ids = torch.empty(count, length, dtype=torch.int64, device=device)
    ids[:, :begun] = fresh()[:, None] if prompts is None else prompts.to(device)
    token = ids[:, begun - 1].clone()
    top = drawn() if prompts is None else torch.zeros(count, dtype=torch.int64, device=device)
    stops = torch.tensor(ends, dtype=torch.int64, device=device)
    kept = {"past_key_values": _cache(model, length), "use_cache": True, "logits_to_keep": 1}

    def step(new: Tensor) -> None:
        out = model(input_ids=new, **kept)
        kept["past_key_values"] = out.past_key_values  # a cache that the model made itself
        logits = out.logits[:, -1].float()
        noise = torch.empty_like(logits).exponential_(generator=generator)
        chosen = torch.where(top > 0, logits.argmax(-1), (logits / temperature - noise.log()).argmax(-1))
        ended = torch.isin(token, stops)
        token.copy_(torch.where(ended, fresh(), chosen))
        top.copy_(torch.where(ended, drawn(), (top - 1).clamp(min=0)))

    with shared_heads(model) if device.type == "cuda" else nullcontext():
        again = lambda: step(token[:, None])  # noqa: E731
        for at in range(begun, length):
            if at == begun:
                step(ids[:, :begun])
            else:
                again()
            ids[:, at] = token
            if at == begun + 1 and _static(model) and device.type == "cuda":
                again = _captured(again, generator)
    return ids


def _static(model: Any) -> bool:
    """Whether transformers gives this architecture a cache of fixed shapes."""
    return bool(getattr(model, "_can_compile_fullgraph", False))


def _cache(model: Any, length: int) -> Any:
    """Keys and values of ``length`` tokens, or None: the model makes its own."""
    if not _static(model):
        return None
    from transformers import StaticCache

    return StaticCache(config=model.config, max_cache_len=length)


def _captured(step: Callable[[], None], generator: torch.Generator | None) -> Callable[[], None]:
    """One step as a CUDA graph; capturing does not run it."""
    graph = torch.cuda.CUDAGraph()
    if generator is not None:
        graph.register_generator_state(generator)
    with torch.cuda.graph(graph):
        step()
    return graph.replay


@contextmanager
def shared_heads(model: Any) -> Iterator[None]:
    """`attend` in the place of torch's attention, while the block lasts; other kinds of attention stay."""
    before = model.config._attn_implementation
    if before != "sdpa":
        yield
        return
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(SHARED_HEADS, attend)
    AttentionMaskInterface.register(SHARED_HEADS, sdpa_mask)
    model.set_attn_implementation(SHARED_HEADS)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def attend(
    module: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Queries [b, h, n, d], keys and values [b, k, l, d], mask [b or 1, 1, n, l] of what is seen to
    [b, n, h, d]. No mask: a first pass, token i sees keys 0 to i, or a single token that sees all. The g
    heads of a key follow one another, as in `repeat_interleave`.
    """
    b, h, n, d = q.shape
    g = h // k.shape[1]
    if attention_mask is None:
        attention_mask = torch.ones(1, 1, n, k.shape[2], dtype=torch.bool, device=q.device)
        attention_mask = attention_mask.tril() if n > 1 else attention_mask
    seen = attention_mask[..., : k.shape[2]].repeat(1, 1, g, 1)
    out = scaled_dot_product_attention(q.reshape(b, -1, g * n, d), k, v, attn_mask=seen, scale=scaling)
    return out.reshape(b, h, n, -1).transpose(1, 2), None
