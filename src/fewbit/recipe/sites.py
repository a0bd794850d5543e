"""Tensors of an encoder that no linear reads, by their role, and the rules that give them bits.

    x = LayerNorm(a),   h = FFN(x),   y = x + h,   out = LayerNorm(y)

Bondarenko, Nagel, Blankevoort 2021, "Understanding and Overcoming the Challenges of Efficient Transformer
Quantization", https://arxiv.org/abs/2109.12948, gives each tensor of a layer bits by what it is: the input x
of the feed-forward network, its output h, their sum y. `places` finds them in a model by the names that
transformers gives the modules of BERT and its kin (RoBERTa, XLM-R, ELECTRA, CamemBERT).

The road not taken: a `Rule` per module. A Rule decides weights of linears and what they read; most of the
tensors here are outputs and sums, and their roles, not their names, are what the paper speaks of.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum

from torch import nn

from fewbit.errors import InputError
from fewbit.format.activation import Activation
from fewbit.nn.sites import At, Site


class Role(StrEnum):
    """What a tensor is to a post-norm encoder layer, in the order of the computation."""

    EMBEDDING_SUM = "embedding_sum"  # token + position + type
    EMBEDDING = "embedding"  # its LayerNorm: the first layer's input
    QUERY = "query"
    KEY = "key"
    VALUE = "value"
    CONTEXT = "context"  # softmax(Q K^T) V, all heads
    ATTENTION = "attention"  # what the output projection writes
    ATTENTION_SUM = "attention_sum"
    X = "x"  # LayerNorm of that: input of the FFN
    GELU = "gelu"
    H = "h"  # output of the FFN
    Y = "y"  # x + h
    OUT = "out"  # LayerNorm of y: output of the layer


RESIDUAL = (Role.X, Role.H, Role.Y)

# transformers' BertModel, alone or inside a model with a head: the end of a module's name, and its sites.
BERT: dict[str, tuple[tuple[Role, At], ...]] = {
    "embeddings.LayerNorm": ((Role.EMBEDDING_SUM, At.INPUT), (Role.EMBEDDING, At.OUTPUT)),
    "attention.self.query": ((Role.QUERY, At.OUTPUT),),
    "attention.self.key": ((Role.KEY, At.OUTPUT),),
    "attention.self.value": ((Role.VALUE, At.OUTPUT),),
    "attention.output.dense": ((Role.CONTEXT, At.INPUT), (Role.ATTENTION, At.OUTPUT)),
    "attention.output.LayerNorm": ((Role.ATTENTION_SUM, At.INPUT), (Role.X, At.OUTPUT)),
    "intermediate": ((Role.GELU, At.OUTPUT),),
    "output.dense": ((Role.H, At.OUTPUT),),
    "output.LayerNorm": ((Role.Y, At.INPUT), (Role.OUT, At.OUTPUT)),
}
_NAME = re.compile(r"(?:.*\.)?(?:(embeddings\.LayerNorm)|encoder\.layer\.(\d+)\.(.+))")


@dataclass(frozen=True)
class Place:
    """A site of a model, what it is, and in which layer (-1: before the first)."""

    site: Site
    role: Role
    layer: int


@dataclass(frozen=True, kw_only=True)
class SiteRule:
    """Tensors of these roles get ``activation``, or stay float with None.

    ``sorted_by``: columns are sorted by the range of this role's tensor in their layer before they are cut
    into the activation's groups; with None groups are cut in the natural order.
    """

    roles: tuple[Role, ...] = tuple(Role)
    activation: Activation | None
    sorted_by: Role | None = None

    def __post_init__(self):
        unknown = [r for r in self.roles if r not in list(Role)]
        if unknown or not self.roles:
            raise InputError(
                f"{unknown[0] if unknown else 'nothing'!r} is no tensor of an encoder layer; choose from "
                f"{', '.join(Role)}"
            )
        object.__setattr__(self, "roles", tuple(Role(r) for r in self.roles))  # YAML has their names
        if self.sorted_by is not None and (self.activation is None or self.activation.groups is None):
            raise InputError(
                f"columns sorted by {self.sorted_by} need groups to go to, and {self.activation} has none; "
                "give it groups, or leave sorted_by out"
            )


def places(model: nn.Module) -> tuple[Place, ...]:
    """Every site of a BERT that the table names. Raises InputError for a model that lacks any of them."""
    out = []
    for name, _ in model.named_modules():
        match = _NAME.fullmatch(name)
        for role, at in BERT.get(match[1] or match[3], ()) if match else ():
            out.append(Place(Site(name, at), role, -1 if match[2] is None else int(match[2])))
    layers = {p.layer for p in out} | {-1, 0}
    wanted = {(layer, role) for layer in layers for role in Role if (layer < 0) is role.startswith("embed")}
    missing = sorted(wanted - {(p.layer, p.role) for p in out})
    if missing:
        raise InputError(
            f"{type(model).__name__} is no encoder built like BERT (embeddings.LayerNorm, encoder.layer.0."
            f"output.LayerNorm and the like): the place of {str(missing[0][1])!r} was not found; give a "
            "BERT-like encoder, or a recipe of weights and inputs such as w8a8"
        )
    return tuple(out)
