"""Names of stored tensors and of parameters: what transformers does between the two when it loads, as data.

transformers renames what older files call otherwise, and builds some parameters from several tensors. The
renamings are applied here as they are. Of what is built, experts alone are taken: here they are no 3-D
parameter but linears (``fewbit.nn.experts``), so tensors stored for each expert need only their names, which
the rules tell (w1, w2 and w3 in Mixtral), and what is stored as 3-D is cut where it is read.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping

from torch import nn

from fewbit.errors import InputError
from fewbit.io.base import Cut, Source
from fewbit.nn.experts import Experts, Names, in_experts

# patterns of transformers, such as mlp.experts.*.w1.weight, and what of an expert a fused parameter holds
_EXPERT = re.compile(r".*experts\.?\*\.(\w+)\.weight\$?")
_KINDS = {"gate_up_proj": ("gate", "up"), "up_proj": ("up",), "down_proj": ("down",)}


def expert_names(model: nn.Module) -> Names:
    """What checkpoints of ``model`` call the matrices of an expert: what transformers merges on loading."""
    found = {}
    for rule in _rules(model)[0]:
        leaves = [_EXPERT.fullmatch(pattern.replace("\\", "")) for pattern in rule.source_patterns]
        target = rule.target_patterns[0].rpartition(".")[2]
        if leaves and all(leaves) and target in _KINDS and len(leaves) == len(_KINDS[target]):
            found |= zip(_KINDS[target], (leaf[1] for leaf in leaves), strict=True)
    return Names(**found)


def _rules(model: nn.Module) -> tuple[list, list]:
    """What builds parameters of ``model`` from several stored tensors in transformers, and what renames."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    rules = get_model_conversion_mapping(model)
    builds = [rule for rule in rules if isinstance(rule, WeightConverter)]
    return builds, [rule for rule in rules if not isinstance(rule, WeightConverter)]


def renamed(source: Source, model: nn.Module, infos: Mapping, slots: Mapping) -> list[tuple[str, str]]:
    """(stored name, the name transformers gives it) for every stored tensor."""
    from transformers.core_model_loading import dot_natural_key, rename_source_key

    builds, renamings = _rules(model)
    converters = [rule for rule in builds if not merges_experts(rule)]
    prefix, fused = model.base_model_prefix, _fused(model)
    found = []
    for stored in sorted(infos, key=dot_natural_key):
        name, rebuilt = rename_source_key(stored, renamings, converters, prefix, slots | fused)
        if name not in slots and stored in slots:
            name, rebuilt = rename_source_key(stored, [], [], prefix, slots)
        if (name in slots or name in fused) and rebuilt is not None:
            raise InputError(
                f"{source.name} stores {stored} in a form that has to be rebuilt on loading ({rebuilt}), "
                "which is not supported; use a model whose tensors are stored as they are."
            )
        found.append((stored, name))
    return found


def merges_experts(rule) -> bool:
    """Whether a rule of transformers does no more than stack what is stored for each expert."""
    kind = rule.target_patterns[0].rpartition(".")[2] in _KINDS
    return kind and all(_EXPERT.fullmatch(pattern.replace("\\", "")) for pattern in rule.source_patterns)


def _fused(model: nn.Module) -> dict[str, tuple[Experts, str]]:
    """What experts would be as 3-D parameters: name in ``model`` -> (the experts, name of the parameter)."""
    return {f"{n}.{p}": (experts, p) for n, experts in in_experts(model).items() for p in experts.shapes}


def cut_experts(source: Source, model: nn.Module) -> None:
    """Make ``source`` present experts that it stores as 3-D tensors as one matrix each, read one by one."""
    fused, infos = _fused(model), source.tensors()
    cuts: dict[str, Cut] = {}
    for stored, name in renamed(source, model, infos, model.state_dict(keep_vars=True)) if fused else ():
        if name not in fused:
            continue
        experts, parameter = fused[name]
        if infos[stored].shape != experts.shapes[parameter]:
            raise InputError(
                f"{source.name} stores {stored} with shape {list(infos[stored].shape)}, but its config asks "
                f"for {list(experts.shapes[parameter])}; config.json and weights do not belong together."
            )
        bias = parameter.endswith("_bias")
        for part, (e, cut) in experts.parts(parameter).items():
            take = functools.partial(experts.cut, cut=cut, bias=bias)
            cuts[f"{stored.rpartition('.')[0]}.{part}"] = Cut(stored=stored, index=e, take=take)
    if cuts:
        source.present(cuts)


def module_names(model: nn.Module) -> Callable[[str], str]:
    """What transformers makes of a stored module's name when it loads ``model``."""
    from transformers.core_model_loading import rename_source_key

    _, rules = _rules(model)
    slots = {f"{name}.weight": True for name, _ in model.named_modules()}
    rename = lambda name: rename_source_key(name, rules, [], model.base_model_prefix, slots)[0]  # noqa: E731
    return lambda name: rename(f"{name}.weight").removesuffix(".weight")
