"""Rotations of a whole model: what lies outside the blocks, and everything at once for a model in memory.

    E <- E Q  (learned positions, too)      final norm: gain 1      head W <- W diag(gain) Q

A head tied to the embeddings has to be untied: the gain of the final norm is between the two. That is all the
rotation adds to a checkpoint. QuaRot, Ashkboos et al. 2024, https://arxiv.org/abs/2404.00456, section 4.

Shapes: V tokens, n channels; embeddings and head [V, n].
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from fewbit.errors import InputError
from fewbit.nn.blocks import find_blocks, is_transposed, weight_of
from fewbit.nn.linear import transform_input
from fewbit.seams.heads import find_values, fold_online, rotate_values_checked
from fewbit.seams.norms import absorb, form_of
from fewbit.seams.residual import REMEDY, Centred, check_map, find_residual, restored, rotate_checked
from fewbit.seams.trial import SAME, change
from fewbit.transform import Hadamard, Map

_ROWS = 4096  # of an embedding, in float64 at a time


@dataclass(frozen=True, kw_only=True)
class Outside:
    """Full names of what touches the residual stream outside the blocks. norm, head: None where absent."""

    size: int
    embeddings: tuple[str, ...]
    norm: str | None
    head: str | None
    tied: bool
    centred: bool


@dataclass(frozen=True, kw_only=True)
class Rotated:
    """What was done to a model: the map of the stream; per linear, the map that now runs before it; names of
    linears whose heads are rotated; parameters that a checkpoint has to store for the first time.
    """

    stream: Map
    online: dict[str, Map] = field(default_factory=dict)
    values: tuple[str, ...] = ()
    untied: tuple[str, ...] = ()


@torch.no_grad()
def find_outside(model: nn.Module) -> Outside:
    """Embeddings, final norm and head; their weights must be in memory, the blocks' need not.

    Raises ``InputError`` for any other parameter outside the blocks (a projection, a norm of the embeddings).
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    size, kind = embedding.embedding_dim, type(model).__name__
    inside = tuple(name + "." for name in find_blocks(model).names)
    embeddings, norms = [], {}
    for name, module in model.named_modules():
        if name.startswith(inside) or module is head or not [*module.parameters(recurse=False)]:
            continue
        if isinstance(module, nn.Embedding) and module.embedding_dim == size:
            embeddings.append(name)
        elif not isinstance(module, nn.Linear) and not is_transposed(module) and form_of(module, size):
            norms[name] = form_of(module, size)
        else:
            raise InputError(
                f"{name} ({type(module).__name__}) of {kind} is no embedding of {size} channels, no norm "
                f"and not the head, so the residual stream cannot be rotated past it; {REMEDY}"
            )
    if len(norms) > 1 or (norms and head is None):
        raise InputError(
            f"{kind} has {len(norms)} norms outside its blocks ({', '.join(norms)}) and "
            f"{'a' if head is not None else 'no'} head; a rotation needs one norm, read by the head; {REMEDY}"
        )
    return Outside(
        size=size,
        embeddings=tuple(embeddings),
        norm=next(iter(norms), None),
        head=next((n for n, m in model.named_modules() if m is head), None) if head is not None else None,
        tied=head is not None and head.weight is embedding.weight,
        centred=not norms or any(form.centred for form in norms.values()),
    )


def stream_map(outside: Outside, seed: int = 0) -> Map:
    """A random Hadamard map of the stream that suits the model's kind of norm."""
    q = Hadamard(outside.size, seed=seed)
    return Centred(q) if outside.centred else q


@torch.no_grad()
def rotate_outside(model: nn.Module, outside: Outside, q: Map) -> tuple[str, ...]:
    """Move embeddings, final norm and head to the basis x ``q``; names of parameters to store anew.

    All weights of `outside` must be in memory. A tied head gets a weight of its own, and the config says so.
    Proved on random x: the head reads from norm(x q) what it read from norm(x).
    """
    check_map(q, outside.size, outside.centred)
    embeddings = [model.get_submodule(name) for name in outside.embeddings]
    head = model.get_output_embeddings()
    if outside.tied:
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)
        model.config.tie_word_embeddings = False
    for embedding in embeddings:
        for rows in embedding.weight.detach().split(_ROWS):
            rows.copy_(q.apply(rows.double()))
    if head is None:
        return ()
    norm = nn.Identity() if outside.norm is None else model.get_submodule(outside.norm)
    x = torch.randn(4, outside.size, generator=torch.Generator().manual_seed(0)).to(head.weight)
    before = head(norm(x))
    if outside.norm is None:
        for rows in head.weight.detach().split(_ROWS):
            rows.copy_(q.dual(rows.double()))
    else:
        absorb(norm, outside.norm, [head], q)
    changed = change(before, head(norm(q.apply(x))))
    assert changed < max(SAME, 8 * torch.finfo(x.dtype).eps), f"the rotated head differs by {changed:.1e}"
    return (f"{outside.head}.weight",) if outside.tied else ()


@torch.no_grad()
def rotate_stream(model: nn.Module, seed: int = 0, tokens: Tensor | None = None) -> Rotated:
    """Rotate the residual stream of a model in memory, in place: its logits stay, and so does its class.

    tokens [b, t] int64, on which each block is proved; some are made up otherwise. Raises ``InputError``, and
    leaves the model as it was, where a part cannot be rotated. Holds the weights twice meanwhile.
    """
    found = [(block, find_residual(block, call), call) for _, block, call in block_calls(model, tokens)]
    outside = find_outside(model)
    q = stream_map(outside, seed)
    with restored(model):
        for block, residual, call in found:
            rotate_checked(block, residual, q, call)
    return Rotated(stream=q, untied=rotate_outside(model, outside, q))


@torch.no_grad()
def rotate_model(model: nn.Module, seed: int = 0, tokens: Tensor | None = None) -> Rotated:
    """All of QuaRot's rotations on a float model in memory, in place: stream, values, and online Hadamards
    (as hooks) before the writers, whose inputs no fold can rotate as a whole. Its logits stay.

    For tests and small models; raises ``InputError`` as `rotate_stream` does.
    """
    done = rotate_stream(model, seed, tokens)
    values: list[str] = []
    online: dict[str, Map] = {}
    for name, block, call in block_calls(model, tokens):
        residual = find_residual(block, call)
        here = find_values(block, residual, call)
        if here is not None:
            rotate_values_checked(block, here, Hadamard(here.head_dim, seed=seed), call)
            values.append(f"{name}.{here.source}")
        for writer in residual.writers:
            module = block.get_submodule(writer)
            t = online[f"{name}.{writer}"] = Hadamard(weight_of(module).shape[1], seed=seed)
            fold_online(module, t)
            transform_input(module, t.apply)
    return replace(done, online=online, values=tuple(values))


def block_calls(model: nn.Module, tokens: Tensor | None) -> Iterator[tuple[str, nn.Module, object]]:
    """(name, block, what runs it once) for each block, with the inputs it has in one forward of the model.

    tokens [b, t] int64; None: 32 made up. The inputs of all blocks are held until the last one was yielded.
    """
    if tokens is None:
        tokens = (torch.arange(1, 33) * 7919 % model.get_input_embeddings().num_embeddings)[None]
    blocks = find_blocks(model)
    inputs = {}
    handles = [
        block.register_forward_pre_hook(
            lambda m, args, kwargs, name=name: inputs.setdefault(name, (args, kwargs)) and None,
            with_kwargs=True,
        )
        for name, block in zip(blocks.names, blocks.modules, strict=True)
    ]
    try:
        with torch.no_grad():
            model(tokens.to(next(model.parameters()).device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    for name, block in zip(blocks.names, blocks.modules, strict=True):
        args, kwargs = inputs[name]
        yield name, block, lambda block=block, args=args, kwargs=kwargs: block(*args, **kwargs)
