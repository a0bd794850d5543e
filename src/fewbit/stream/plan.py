"""Preflight: everything that can be known, and refused, before any work is done.

Which tensor gets which Format by which solver; bits per weight with scales and zeros; size of the output;
predicted peak memory and time; and which checkpoint format can hold the result. A rule that matches nothing,
a block that does not tile a layer, a format that a solver cannot serve and a disk that is too small raise
here.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from fewbit.errors import InputError
from fewbit.format import Format, Zero
from fewbit.io import compressed_kv, compressed_tensors, gguf_fallback
from fewbit.io.skeleton import build_skeleton, parameter_map
from fewbit.io.source import Source
from fewbit.nn.experts import in_experts, is_fused, routers
from fewbit.recipe import Recipe
from fewbit.recipe.recipe import Rule
from fewbit.solve import Need
from fewbit.solve.blocktune import BlockTuning
from fewbit.stream.blocks import Blocks, find_blocks, is_transposed, linears, weight_of
from fewbit.stream.data import Calibration
from fewbit.stream.estimate import check_disk, memory, memory_whole
from fewbit.stream.keyvalue import kv_refusal
from fewbit.stream.learning import learning, learns
from fewbit.stream.planned import Plan, PlannedLayer, needs_of
from fewbit.stream.sites import check_sentences, plan_sites, wants_sentences
from fewbit.stream.timing import seconds


def make_plan(
    source: Source,
    recipe: Recipe,
    calibration: Calibration,
    *,
    output: Path | None = None,
    device: str = "cpu",
    depth: str = "auto",
) -> tuple[Plan, nn.Module, Blocks, dict[str, str]]:
    """The plan, and what it was made from: skeleton, blocks, parameter map (for the run that follows).

    Raises ``InputError`` for everything that cannot work.
    """
    model = build_skeleton(source)
    mapping, unused = parameter_map(source, model)
    blocks = find_blocks(model)
    sites = plan_sites(model, recipe) if recipe.of_encoder else ()
    layers, left = assign(model, blocks, recipe, mapping)
    refusals = (compressed_tensors.refusal(w, x.kind, a) for x in layers for w, a in x.rule.choices)
    reason = next((r for r in refusals if r), "")
    if any(layer.activation is not None for layer in layers):
        reason = reason or "engines find steps of inputs in their own ways; `fewbit export` writes it there"
    if recipe.rotation is not None and recipe.rotation.online:
        reason = reason or "Hadamard maps at every call are what only some engines run (`fewbit export`)"
    if recipe.of_encoder:
        reason = "tables and quantizers of sums and outputs have no place there"
    if any(layer.rule.basis for layer in layers):
        reason = reason or "weights in a basis of their own are not written there"
    if any(x.rule.split is not None for x in layers):
        reason = reason or "columns kept in float have no place there"
    cannot = kv_refusal(recipe.kv, model)
    needs, reason = needs_of(layers, recipe), reason or cannot
    used = calibration if needs or recipe.kv or learns(recipe) or wants_sentences(recipe) else None
    if wants_sentences(recipe):
        check_sentences(recipe, calibration)
    if recipe.tuning is not None:
        depth = _check_tuning(recipe.tuning, calibration, depth)
    info = source.tensors()
    quantized = {f"{layer.name}.weight" for layer in layers}
    item = torch.empty((), dtype=source.dtype).element_size()
    stored = set(mapping.values())
    rest = sum(math.prod(info[n].shape) * item for n in stored if n in info and n not in quantized)
    codes = sum(layer.bits_per_weight * math.prod(layer.shape) / 8 for layer in layers)
    size = math.ceil(codes + rest) + sum(s.entry.nbytes for s in sites)
    if output is not None:
        check_disk(output, size)
    item_run = 4 if device == "cpu" else source.dtype.itemsize  # the loop computes in float32 on a CPU
    if recipe.of_encoder:
        chosen, peak = memory_whole(model, layers, used, device, depth, item_run)
    else:
        chosen, peak = memory(model, blocks, layers, used, device, depth, item_run, recipe)
    fallbacks = gguf_fallback.said(
        (x.module, x.shape[1], wanted, got)
        for x in layers
        if x.block >= 0
        for (wanted, _), (got, _) in zip(recipe.rule_for(x.module).choices, x.rule.choices, strict=True)
        if got != wanted
    )
    caveats = (*fallbacks, *_caveats(layers, source, used, reason, recipe))
    if learns(recipe):
        dtype = torch.float32 if device == "cpu" else source.dtype
        most, caveat = learning(recipe, layers, model, used, device, dtype)
        peak, caveats = max(peak, most), (*caveats, caveat)
    plan = Plan(
        source=source,
        recipe=recipe,
        calibration=used,
        layers=tuple(layers),
        left=tuple(left),
        left_modules=_names_in_model(left, mapping),
        unused=tuple(unused),
        checkpoint="native" if reason else "compressed-tensors",
        checkpoint_reason=reason,
        caveats=caveats,
        size_bytes=size,
        source_bytes=sum(info[n].nbytes for n in stored if n in info),
        depth=chosen,
        peak_bytes=peak,
        seconds=seconds(model, layers, recipe, used, device, chosen),
        device=device,
        sites=sites,
        fallbacks=fallbacks,
    )
    return plan, model, blocks, mapping


def _check_tuning(tuning: BlockTuning, calibration: Calibration, depth: str) -> str:
    """Where tuning between groups suspends forwards: always at blocks."""
    if depth == "linear":
        raise InputError(
            "tuning between groups runs each block from its own inputs and cannot wait at its linears; leave "
            "the depth at auto, or tune nothing"
        )
    if calibration.samples < 2 * tuning.batch:
        raise InputError(
            f"{calibration.samples} calibration windows are too few to tune with {tuning.batch} at a time "
            f"and hold some out; use --samples {2 * tuning.batch} or more"
        )
    return "block"


def _caveats(layers, source, calibration, reason, recipe) -> tuple[str, ...]:
    """What a person should know before starting: how readers differ, too little calibration, much time."""
    out, tuning = [], recipe.tuning
    if tuning is not None:
        tokens = tuning.batch * calibration.seqlen
        out.append(
            f"tuning makes {tuning.steps} updates of {tokens} tokens after each group of layers and keeps "
            "the outputs of the float model in memory; it is most of the time"
        )
    if not reason:
        given = {layer.name: layer.activation for layer in layers if layer.activation is not None}
        out += compressed_tensors.caveats({x.name: x.format for x in layers}, source.dtype, given)
        asymmetric = any(x.format.zero is not Zero.NONE for x in layers)
        out += compressed_kv.caveats(recipe.kv, asymmetric)
        experts = {x.format for x in layers if x.share < 1}
        if any(format.zero is not Zero.NONE for format in experts):
            out.append(
                "transformers 5.23, and vLLM of before June 2026, load experts without zero points only: use "
                "symmetric=true for them"
            )
        if len(experts) > 1:
            out.append("vLLM runs the experts of a block as one and needs one format for them")
    if any(layer.rule.split is not None for layer in layers):
        out.append("columns that meet outliers in the calibration are stored in float on top of this size")
    solved = [layer for layer in layers if Need.GRAM in layer.rule.solver.needs]
    if solved and calibration:
        tokens, widest = calibration.samples * calibration.seqlen, max(layer.shape[1] for layer in solved)
        if tokens < 5 * widest:
            out.append(
                f"{tokens} calibration tokens are few for layers of {widest} inputs: GPTQ fits their "
                f"noise below "
                f"five times as many; use --samples {math.ceil(5 * widest / calibration.seqlen)} or more"
            )
        experts = [layer for layer in solved if layer.share < 1]
        if experts:
            each, wide = tokens * experts[0].share, max(layer.shape[1] for layer in experts)
        if experts and each < 5 * wide:
            out.append(
                f"of {tokens} calibration tokens an expert gets about {each:,.0f}, few for layers of {wide} "
                "inputs; those with fewer tokens than inputs are solved mostly from others; add --samples"
            )
    return tuple(out)


def assign(
    model: nn.Module, blocks: Blocks, recipe: Recipe, mapping: dict[str, str]
) -> tuple[list[PlannedLayer], list[str]]:
    """The layers a recipe quantizes, and the names of the linear layers it leaves.

    Rules see a layer's name in the model. Raises ``InputError`` for a rule that matches nothing and for a
    block that does not tile.
    """
    layers, left, used = [], [], set()
    inside = {
        f"{b}.{n}": (i, m) for i, b in enumerate(blocks.names) for n, m in linears(blocks.modules[i]).items()
    }
    _check_experts(blocks)
    shares = _shares(model)
    for name, module in linears(model).items():
        stored = mapping.get(f"{name}.weight", f"{name}.weight").removesuffix(".weight")
        if stored.rpartition(".")[2] != name.rpartition(".")[2]:
            stored = name  # tied: the tensor is stored under another module's name, but readers know this one
        rule = recipe.rule_for(name) if name in inside else None
        if rule is not None:
            used.add(rule)
        if rule is None or rule.weight is None:
            left.append(stored)
            continue
        shape = tuple(weight_of(module).shape)
        rule = _fitting(rule, shape[1])
        for weight, input in rule.choices:
            weight.check(shape, f"layer {name}")
            if rule.basis is not None:
                rule.basis.check(shape, f"layer {name}")
            if input is not None:
                input.format.check((1, shape[1]), f"the input of layer {name}")
        layers.append(
            PlannedLayer(
                module=name,
                name=stored,
                block=inside[name][0],
                shape=shape,
                kind="Conv1D" if is_transposed(module) else "Linear",
                rule=rule,
                share=shares.get(name.rpartition(".")[0], 1.0),
            )
        )
    left += [mapping.get(f"{n}.weight", f"{n}.weight").removesuffix(".weight") for n in routers(model)]
    if recipe.embedding is not None:
        layers.append(_table(model, recipe.embedding, mapping))
    for i, rule in enumerate(recipe.rules, 1):
        if rule not in used:
            some = ", ".join(list(inside)[:3])
            raise InputError(
                f"rule {i} of recipe {recipe.name!r} (match={rule.match!r}) applies to none of the "
                f"{len(inside)} linear "
                f"layers in the blocks; a pattern must match full names such as {some}, and no earlier rule "
                "may take them"
            )
    if not layers:
        raise InputError(
            f"recipe {recipe.name!r} leaves every layer as it is; give a rule with a weight format"
        )
    return layers, left


def _fitting(rule: Rule, columns: int) -> Rule:
    """The rule with formats whose blocks tile rows of ``columns``, where llama.cpp would take others."""
    weight = gguf_fallback.fitting(rule.weight, columns)
    others = [replace(a, weight=gguf_fallback.fitting(a.weight, columns)) for a in rule.alternatives]
    return replace(rule, weight=weight, alternatives=tuple(others))


def _check_experts(blocks: Blocks) -> None:
    """Refuse experts that are no linear layers here: most of the model would stay as it is, unsaid."""
    for name, block in zip(blocks.names, blocks.modules, strict=True):
        for n, module in block.named_modules():
            if is_fused(module):
                raise InputError(
                    f"the experts {name}.{n} ({type(module).__name__}) have more to them than gate, up and "
                    "down matrices, or another transformers is needed to tell; models with such experts are "
                    "not quantized"
                )


def _names_in_model(stored: list[str], mapping: dict[str, str]) -> tuple[str, ...]:
    """Names in the model, where they differ, of modules that are given by their names in the checkpoint."""
    pairs = ((n.removesuffix(".weight"), s.removesuffix(".weight")) for n, s in mapping.items())
    kept = set(stored)
    return tuple(n for n, s in pairs if s in kept and n not in kept)


def _shares(model: nn.Module) -> dict[str, float]:
    """Of the tokens that pass a mixture, the share that each expert gets, by the expert's name."""
    k = getattr(model.config.get_text_config(), "num_experts_per_tok", None) or 1
    found = in_experts(model).items()
    return {f"{name}.{e}": min(1.0, k / len(experts)) for name, experts in found for e in range(len(experts))}


def _table(model: nn.Module, format: Format, mapping: dict[str, str]) -> PlannedLayer:
    """The token table. Raises ``InputError`` for one that is tied to the head, which would need a copy."""
    table = model.get_input_embeddings()
    name = next(n for n, module in model.named_modules() if module is table)
    stored = mapping[f"{name}.weight"]
    tied = [n for n, s in mapping.items() if s == stored and n != f"{name}.weight"]
    if tied:
        raise InputError(
            f"the token table {name} of {type(model).__name__} is also {tied[0]} of its head, which stays "
            "float; quantize the encoder without its head, or leave the table float with --set "
            "embedding_bits=none"
        )
    shape = tuple(table.weight.shape)
    format.check(shape, f"the token table {name}")
    return PlannedLayer(
        module=name,
        name=stored.removesuffix(".weight"),
        block=-1,
        shape=shape,
        kind="Embedding",
        rule=Rule(match=name, weight=format),
    )
