"""What a run will do, as data: each layer with its rule, and the whole of them with what it costs."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from torch import Tensor

from fewbit.format import Format, QTensor
from fewbit.format.activation import Activation
from fewbit.format.split import Apart, SplitTensor
from fewbit.io import compressed_tensors, inputs, native
from fewbit.io.source import Source
from fewbit.recipe import Recipe
from fewbit.recipe.recipe import Rule
from fewbit.solve import Need
from fewbit.solve.tune import Tuner
from fewbit.stream.data import Calibration
from fewbit.stream.sites import PlannedSite
from fewbit.transform import Map


@dataclass(frozen=True, kw_only=True)
class PlannedLayer:
    """One linear layer and what the recipe does with it.

    module: name in the model; name: name in the checkpoint; block: index of its block; shape: (out, in);
    kind: class of the module, "Linear" or "Conv1D"; "Embedding", in block -1, of a token table.
    """

    module: str
    name: str
    block: int
    shape: tuple[int, int]
    kind: str
    rule: Rule
    share: float = 1.0  # of the block's tokens, those that reach it: k of E for an expert
    online: Map | None = None  # what a rotation has left for every call; known once the block is rotated
    apart: Apart | None = None  # columns kept in float; known once the layer is solved

    @property
    def transposed(self) -> bool:
        """Whether the module stores its weight as [in, out]."""
        return self.kind == "Conv1D"

    @property
    def format(self) -> Format:
        """The Format of its weight."""
        return self.rule.weight

    @property
    def activation(self) -> Activation | None:
        """How its input is quantized, or None."""
        return self.rule.input

    @property
    def input_map(self) -> Map | None:
        """The map of its input at every call, or None."""
        return self.rule.basis.input_map(self.shape[1]) if self.rule.basis else self.online

    @property
    def output_map(self) -> Map | None:
        """The map whose inverse its output takes at every call, or None."""
        return self.rule.basis.output_map(self.shape[0]) if self.rule.basis else None

    @property
    def text(self) -> str:
        """Formats of weight and input in words."""
        formats = (str(w) if x is None else f"{w}, input {x}" for w, x in self.rule.choices)
        return " or ".join(formats) + self.basis_text

    @property
    def basis_text(self) -> str:
        """The basis in which its weight is kept, in words; empty for its own."""
        return "" if self.rule.basis is None else f", {self.rule.basis}"

    def chosen(self, choice: int) -> PlannedLayer:
        """The layer with one of its rule's choices made."""
        return replace(self, rule=self.rule.chosen(choice)) if self.rule.alternatives else self

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight, with the static steps or the means of its input; of several choices the
        most. Columns apart count once they are known.
        """
        rows, columns = self.shape
        beside = 0 if self.apart is None else self.apart.bits(rows)
        return max(
            weight.bits_per_weight(self.shape) + (beside + inputs.bits(own, columns)) / (rows * columns)
            for weight, own in self.rule.choices
        )

    @property
    def entry(self) -> native.Entry:
        """What a native checkpoint says of it."""
        return native.Entry(
            format=self.format,
            shape=self.shape,
            transposed=self.transposed,
            activation=self.activation,
            online=self.input_map,
            output=self.output_map,
            apart=self.apart,
        )


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run will do. Built by ``make_plan``; sizes in bytes, time in seconds."""

    source: Source
    recipe: Recipe
    calibration: Calibration | None
    layers: tuple[PlannedLayer, ...]
    left: tuple[str, ...]  # linear layers that stay as they are (checkpoint names)
    left_modules: tuple[str, ...]  # their names in the model where those differ
    unused: tuple[str, ...]  # stored tensors that no parameter of the model uses
    checkpoint: str  # "compressed-tensors" or "native"
    checkpoint_reason: str  # why not compressed-tensors, or ""
    caveats: tuple[str, ...]  # what readers of the checkpoint do differently
    size_bytes: int
    source_bytes: int
    depth: str  # where forwards are suspended: "linear" or "block"
    peak_bytes: int
    seconds: float
    device: str
    sites: tuple[PlannedSite, ...] = ()  # tensors of an encoder that no linear reads, and are rounded
    fallbacks: tuple[str, ...] = ()  # of the caveats, formats that some layers get in another's place

    @property
    def bits_per_weight(self) -> float:
        """Mean stored bits over the weights that are quantized; steps of an encoder's activations counted."""
        n = sum(math.prod(layer.shape) for layer in self.layers)
        bits = sum(layer.bits_per_weight * math.prod(layer.shape) for layer in self.layers)
        return (bits + 8 * sum(s.entry.nbytes for s in self.sites)) / n

    @property
    def needs(self) -> frozenset[Need]:
        """Calibration statistics that any layer needs."""
        return needs_of(self.layers, self.recipe)

    def as_dict(self) -> dict:
        """Plain data for ``fewbit plan --json``."""
        return {
            "model": self.source.name,
            "recipe": self.recipe.name,
            "layers": [
                {
                    "layer": layer.name,
                    "shape": list(layer.shape),
                    "format": layer.text,
                    "solver": type(layer.rule.solver).__name__.lower(),
                    "bits_per_weight": layer.bits_per_weight,
                    "size_bytes": math.ceil(layer.bits_per_weight * math.prod(layer.shape) / 8),
                }
                for layer in self.layers
            ],
            "sites": [
                {
                    "tensor": str(s.place.site),
                    "role": str(s.place.role),
                    "format": s.text,
                    "columns": s.columns,
                    "size_bytes": s.entry.nbytes,
                }
                for s in self.sites
            ],
            "left": list(self.left),
            "unused": list(self.unused),
            "checkpoint": self.checkpoint,
            "checkpoint_reason": self.checkpoint_reason,
            "caveats": list(self.caveats),
            "bits_per_weight": self.bits_per_weight,
            "size_bytes": self.size_bytes,
            "source_bytes": self.source_bytes,
            "calibration_tokens": self.calibration.samples * self.calibration.seqlen
            if self.calibration
            else 0,
            "depth": self.depth,
            "peak_bytes": self.peak_bytes,
            "seconds": self.seconds,
            "device": self.device,
        }


def is_tuned(layer: PlannedLayer) -> bool:
    """Whether the layer's solver learns from the whole block."""
    return isinstance(layer.rule.solver, Tuner)


def together(group: list[PlannedLayer]) -> list[list[PlannedLayer]]:
    """Layers with one input and rules that do alike; each alone where it has a choice of its own."""
    alike: dict[object, list[PlannedLayer]] = {}
    for layer in group:
        does = replace(layer.rule, match="*")  # a searched recipe names each layer in a rule of its own
        alike.setdefault(layer.module if layer.rule.alternatives else does, []).append(layer)
    return list(alike.values())


def needs_of(layers: Iterable[PlannedLayer], recipe: Recipe) -> frozenset[Need]:
    """Calibration statistics that any layer or any choice of a map needs."""
    of_layers = (layer.rule.needs for layer in layers)
    block = frozenset() if recipe.tuning is None else {Need.BLOCK}
    return block.union(*of_layers, *(chooser.needs for chooser in recipe.transforms))


def to_dict(plan: Plan, layer: PlannedLayer, q: QTensor | SplitTensor) -> dict[str, Tensor]:
    """What the plan's checkpoint format stores of a layer's weight."""
    if plan.checkpoint == "native":
        return native.to_dict(layer.name, q)
    return compressed_tensors.to_dict(layer.name, q, layer.activation)


def codec(plan_or_checkpoint: Plan | str):
    """The io module that writes this plan's checkpoint format."""
    name = plan_or_checkpoint if isinstance(plan_or_checkpoint, str) else plan_or_checkpoint.checkpoint
    return native if name == "native" else compressed_tensors
