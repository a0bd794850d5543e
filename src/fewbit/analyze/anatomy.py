"""What decides a model's memory: counts, linear shapes, widths of a block, and what its cache keeps.

Everything is read off a skeleton (parameters on the meta device), so a configuration is enough. The shapes
of keys and values are those of a cache that a forward on the meta device fills: grouped queries, sliding
windows, layers that share a cache and latent attention (which keeps a latent and a rotary part instead of
keys and values) need no table. Road not taken: heads x head size from the configuration. It is wrong for
Falcon, whose cache holds the broadcast heads, and for latent attention.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from fewbit.errors import InputError
from fewbit.io.base import Source, first_line
from fewbit.io.skeleton import build_skeleton
from fewbit.nn.blocks import Blocks, find_blocks, linears, weight_of
from fewbit.nn.experts import in_experts

_FFN = ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "d_ff")
_PROBE = 3  # tokens
_STATELESS = {"logits", "last_hidden_state", "pooler_output"}  # what a model returns that keeps nothing


@dataclass(frozen=True, kw_only=True)
class CacheLayer:
    """What one layer keeps: ``key`` and ``value`` elements per token, for the last ``window`` - 1 tokens
    (None: for all). ``heads`` and ``head_dim`` are those of the keys.
    """

    key: int
    value: int
    heads: int
    head_dim: int
    window: int | None

    def tokens(self, context: int) -> int:
        """Tokens kept after ``context`` tokens; transformers drops the one that leaves the window next."""
        return context if self.window is None else min(context, self.window - 1)


@dataclass(frozen=True, kw_only=True)
class Widths:
    """Elements per token inside one block: residual stream, q, k, v, the MLP's hidden layer, norms.

    ``gated``: the MLP multiplies two branches (SwiGLU, GeGLU). ``rms``, ``layer_norm``: how many norms of
    either kind read the residual stream's width. ``head_norm``: elements that norms of single heads see.
    """

    hidden: int
    query: int
    key: int
    value: int
    heads: int
    ffn: int
    gated: bool
    rms: int
    layer_norm: int
    head_norm: int


@dataclass(frozen=True, kw_only=True)
class Anatomy:
    """A model's counts.

    parameters: tied ones once; linears: shape [out, in] of every linear in the blocks; embedding: parameters
    of the embeddings and the output head; experts: parameters of experts stored as one tensor, which are no
    linear layers. ``cache`` is None where it is not modelled, and ``widths`` too;
    ``cache_reason`` and ``widths_reason`` then say why. A model that
    keeps nothing between tokens (an encoder) has an empty cache.
    """

    name: str
    kind: str
    parameters: int
    linears: tuple[tuple[int, int], ...]
    blocks: int
    embedding: int
    experts: int
    tied: bool
    vocabulary: int
    longest: int | None
    cache: tuple[CacheLayer, ...] | None
    cache_reason: str
    widths: Widths | None
    widths_reason: str

    @property
    def linear_parameters(self) -> int:
        """Weights of the linear layers in the blocks: what quantization changes."""
        return sum(math.prod(shape) for shape in self.linears)

    @property
    def rest(self) -> int:
        """All other parameters: embeddings, head, norms, biases."""
        return self.parameters - self.linear_parameters


def anatomy(source: Source) -> Anatomy:
    """The counts of the model that ``source`` configures.

    Raises ``InputError`` for a model without blocks.
    """
    model = build_skeleton(source)
    text = source.config().get_text_config(decoder=True)
    blocks = find_blocks(model)
    shapes = tuple(tuple(weight_of(m).shape) for b in blocks.modules for m in linears(b).values())
    ends = {m for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m is not None}
    ends_parameters = {id(m.weight): m.weight.numel() for m in ends if isinstance(m.weight, nn.Parameter)}
    widths, why_not = _widths(text, blocks)
    cache, reason = _cache(model, text)
    return Anatomy(
        name=source.name,
        kind=type(model).__name__,
        parameters=sum(p.numel() for p in model.parameters()),
        linears=shapes,
        blocks=len(blocks),
        embedding=sum(ends_parameters.values()),
        experts=sum(p.numel() for b in blocks.modules for p in b.parameters() if p.ndim == 3),
        tied=len(ends) == 2 and len(ends_parameters) == 1,
        vocabulary=text.vocab_size,
        longest=getattr(text, "max_position_embeddings", None),
        cache=cache,
        cache_reason=reason,
        widths=widths,
        widths_reason=why_not,
    )


def _cache(model: nn.Module, text) -> tuple[tuple[CacheLayer, ...] | None, str]:
    """(layers, "") as a forward on the meta device fills them; (None, reason) where that does not work.

    Puts ``model`` on the meta device as bfloat16, buffers included: nothing can be computed with it after.
    """
    if model.config.is_encoder_decoder:
        return None, "the model is an encoder with a decoder, whose two caches are not modelled"
    model.to(device="meta", dtype=torch.bfloat16)  # kernels of experts take nothing wider
    text = model.config.get_text_config(decoder=True)
    before, text.pad_token_id = text.pad_token_id, None  # a warning about padding would look at the values
    ids = torch.zeros(1, _PROBE, dtype=torch.long, device="meta")
    try:
        with torch.no_grad():
            out = model(input_ids=ids, use_cache=True)
        if set(out) <= _STATELESS:
            return (), ""
        layers = (layer for layer in out.past_key_values.layers if type(layer).__name__ != "DummyLayer")
        return tuple(_cache_layer(layer) for layer in layers), ""
    except Exception as error:  # recurrent states, kernels without a meta form: each fails in its own way
        return None, (
            f"the cache of a {text.model_type} model is not one of keys and values that could be found "
            f"({type(error).__name__}: {first_line(error)})"
        )
    finally:
        text.pad_token_id = before


def _cache_layer(layer) -> CacheLayer:
    if not isinstance(getattr(layer, "keys", None), torch.Tensor) or hasattr(layer, "conv_states"):
        raise InputError(f"a {type(layer).__name__} keeps more than keys and values")
    (_, heads, _, dim), value = layer.keys.shape, layer.values.shape
    return CacheLayer(
        key=heads * dim,
        value=value[1] * value[3],
        heads=heads,
        head_dim=dim,
        window=getattr(layer, "sliding_window", None),
    )


def _widths(text, blocks: Blocks) -> tuple[Widths | None, str]:
    """The widths of a plain transformer block, or why the blocks are not plain."""
    if any(in_experts(b) or any(p.ndim == 3 for p in b.parameters()) for b in blocks.modules):
        return None, "activations of a mixture of experts are not modelled"
    if getattr(text, "kv_lora_rank", None):
        return None, "activations of latent attention are not modelled"
    h, heads = text.hidden_size, text.num_attention_heads
    dim = getattr(text, "head_dim", None) or h // heads
    kv = getattr(text, "num_key_value_heads", None) or getattr(text, "num_kv_heads", None) or heads
    f = next((v for name in _FFN if isinstance(v := getattr(text, name, None), int)), 4 * h)
    if not all(isinstance(n, int) for n in (h, heads, dim, kv)):
        return None, "activations of blocks of several widths are not modelled"
    q, k = heads * dim, kv * dim
    attention = h * (2 * q + 2 * k)
    mean = sum(m.weight.numel() for b in blocks.modules for m in linears(b).values()) / len(blocks)
    matrices = (mean - attention) / (h * f)  # 2: up and down; 3: gate as well
    if min(abs(matrices - 2), abs(matrices - 3)) > 0.35:
        return None, (
            f"activations are not modelled: a block has {mean:,.0f} linear weights, which are not those of "
            "attention and one MLP"
        )
    norms = [(n, m) for n, m in blocks.modules[0].named_modules() if "norm" in type(m).__name__.lower()]
    sizes = [(m, n, sum(p.numel() for p in m.parameters(recurse=False))) for n, m in norms]
    wide = [m for m, _, size in sizes if size in (0, h, 2 * h) and size != dim]
    per_head = [n.rpartition(".")[2] for _, n, size in sizes if size == dim and dim != h]
    layer = sum(isinstance(m, nn.LayerNorm) for m in wide)
    return Widths(
        hidden=h,
        query=q,
        key=k,
        value=k,
        heads=heads,
        ffn=f,
        gated=matrices > 2.5,
        rms=len(wide) - layer,
        layer_norm=layer,
        head_norm=sum(q if name.startswith("q") else k for name in per_head),
    ), ""
