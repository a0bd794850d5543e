"""From a model to one that trains as it will compute, and from there to codes.

    prepare   every linear layer of the blocks that a rule gives a weight format  ->  FakeLinear, in place
    convert   every FakeLinear                                                    ->  QLinear, in place

The outputs of the two agree bit for bit where the product is computed from decoded weights, because both get
their numbers from the same ``Format.encode``. What is left over is the order of float sums: a kernel that
multiplies int8 by int8, or decodes a large weight by parts, adds in another order.

Layers are those that ``fewbit quantize`` takes. A rule's solver is not asked: training takes its place, and
codes are the nearest ones.

Road not taken: to swap the class of linears anywhere. Heads, routers and towers that see would come along,
and none of the recipes means them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fewbit.errors import InputError
from fewbit.format.split import SplitTensor
from fewbit.nn.blocks import find_blocks, is_transposed, linears
from fewbit.nn.experts import is_fused
from fewbit.nn.linear import QLinear, transform_input
from fewbit.train.fake import FakeQuant, Straight
from fewbit.train.linear import FakeLinear
from fewbit.train.steps import StepLinear

TRAINED = (FakeLinear, StepLinear)
KEPT = 8192  # tokens of calibration inputs of a layer that steps start from


class Rules(Protocol):
    """What is asked of a ``fewbit.recipe.Recipe``."""

    name: str

    def rule_for(self, layer: str) -> Any:
        """The rule of a layer, or None."""


def prepare(
    model: nn.Module,
    recipe: Rules,
    *,
    weight: FakeQuant | None = None,
    input: FakeQuant | None = None,
    batches: Iterable[Mapping[str, Tensor]] = (),
) -> nn.Module:
    """``model`` with a `FakeLinear` in place of every layer that a rule of ``recipe`` quantizes.

    weight, input: how gradients of weights and inputs pass and who owns their steps; `Straight` where None.
    batches: keyword arguments of calls of the model, from which static steps of inputs start. Parameters stay
    the objects that they were; trained steps are new ones, so make the optimizer afterwards. Raises
    ``InputError``, with the model as it was, for a recipe that does more than rules of formats and bases, for
    one that matches nothing, and for layers that cannot be trained.
    """
    weight, input = weight or Straight(), input or Straight()
    for field in ("transforms", "rotation", "tuning", "sites", "embedding"):
        if getattr(recipe, field, None):
            raise InputError(
                f"recipe {recipe.name!r} has {field}, and training takes weight formats, input formats and "
                "bases alone; leave that out"
            )
    chosen = {}
    blocks = find_blocks(model)
    for block, module in zip(blocks.names, blocks.modules, strict=True):
        if any(is_fused(m) for m in module.modules()):
            raise InputError(
                f"{block} holds fused experts, which are no linear layers; call "
                "fewbit.nn.experts.split_experts before the weights are loaded, as fewbit.load does"
            )
        for name, layer in linears(module).items():
            rule = recipe.rule_for(f"{block}.{name}")
            if rule is not None and rule.weight is not None:
                _check(f"{block}.{name}", layer, rule)
                chosen[f"{block}.{name}"] = (layer, rule)
    if not chosen:
        raise InputError(f"no rule of recipe {recipe.name!r} gives a layer of the model a weight format")
    static = {n: m for n, (m, rule) in chosen.items() if rule.input is not None and rule.input.static}
    samples = _inputs(model, static, batches) if static else {}
    made = {
        name: FakeLinear(
            layer,
            rule.weight,
            weight,
            activation=rule.input,
            input_quant=input,
            sample=samples.get(name),
            basis=rule.basis,
        )
        for name, (layer, rule) in chosen.items()
    }
    for name, layer in made.items():
        model.set_submodule(name, layer)
    return model


def start_from(model: nn.Module, quantized: nn.Module) -> nn.Module:
    """``model``, prepared, beginning at the weights and steps that another method found in ``quantized``.

    quantized: the same model with `QLinear` layers, as ``fewbit.load`` gives a checkpoint: of GPTQ, say,
    whose codes are a better start than the nearest ones. Biases, norms and all else that both have come
    along, for AWQ and SmoothQuant fold their scales there. Raises ``InputError``, with the model as it was,
    for layers that are not quantized there, or in another format, or behind other maps than those of
    ``model``, and for a checkpoint with parameters that ``model`` lacks.
    """
    pairs = []
    for name, layer in model.named_modules():
        if isinstance(layer, FakeLinear):
            try:
                found = quantized.get_submodule(name)
            except AttributeError:
                found = None
            if not isinstance(found, QLinear) or isinstance(found.qweight, SplitTensor):
                raise InputError(f"{name} is trained and has no quantized layer to start from; quantize it")
            if layer.maps() != (found.online, found.output):
                raise InputError(
                    f"{name} was quantized behind other maps of its input and output than the model trains "
                    "with; start from a checkpoint without rotations, or train with the basis of its recipe"
                )
            layer.check_start(found.qweight)
            pairs.append((layer, found))
    if not pairs:
        raise InputError(f"{type(model).__name__} has no fake-quantized layers; call prepare first")
    own, rest = dict(model.named_parameters()), dict(quantized.named_parameters())
    for name, p in rest.items():
        if name not in own or own[name].shape != p.shape:
            raise InputError(
                f"the quantized model has {name} {list(p.shape)} and the model that trains has not, as where "
                "a rotation has parted the head from the embedding; start from a checkpoint without it"
            )
    for layer, found in pairs:
        layer.start_from(found.qweight)
    with torch.no_grad():
        for name, p in rest.items():
            own[name].copy_(p)
    return model


def convert(model: nn.Module) -> nn.Module:
    """``model`` with a `QLinear` in the place of every `FakeLinear` and `StepLinear`; in place, in evaluation
    mode.

    Raises ``InputError`` where there is none.
    """
    made = {n: m.to_quantized() for n, m in model.named_modules() if isinstance(m, TRAINED)}
    if not made:
        raise InputError(f"{type(model).__name__} has no fake-quantized layers; call prepare first")
    for name, layer in made.items():
        model.set_submodule(name, layer)
    return model.eval()


def _check(name: str, layer: nn.Module, rule: Any) -> None:
    if is_transposed(layer) or type(layer) is not nn.Linear:
        raise InputError(
            f"{name} is a {type(layer).__name__}, and training takes torch.nn.Linear; leave it out of the "
            "rules"
        )
    if rule.alternatives or rule.split is not None:
        raise InputError(
            f"the rule of {name} has alternatives or keeps columns apart, which calibration chooses; leave "
            "them out of training"
        )


@torch.no_grad()
def _inputs(
    model: nn.Module, layers: Mapping[str, nn.Module], batches: Iterable[Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """Inputs of layers over all batches, float [tokens up to KEPT, in], extremes of every column included."""
    seen: dict[str, list[Tensor]] = {name: [] for name in layers}

    def watch(name: str):
        def look(x: Tensor) -> Tensor:
            rows = x.reshape(-1, x.shape[-1]).float()
            step = -(-len(rows) // KEPT)
            seen[name].append(torch.cat([rows[::step], *(r[None] for r in torch.aminmax(rows, dim=0))]))
            return x

        return look

    undo = [transform_input(layer, watch(name)) for name, layer in layers.items()]
    training = model.training
    model.eval()
    try:
        for batch in batches:
            model(**batch)
    finally:
        model.train(training)
        for remove in undo:
            remove()
    return {name: _thin(torch.cat(rows)) for name, rows in seen.items() if rows}


def _thin(rows: Tensor) -> Tensor:
    step = -(-len(rows) // KEPT)
    return torch.cat([rows[::step], *(r[None] for r in torch.aminmax(rows, dim=0))])
