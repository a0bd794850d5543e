"""The one loop: blocks of a model solved one by one, with all calibration batches waiting at each.

    for each block i:                         all batches wait at block i (see suspend.py)
        read the weights of block i
        for each group of linears with one input, in the order of the forward:
            resume every batch to that group; reduce its input to H = X^T X / tokens
            solve the group's linears; put the quantized weights in place
        resume every batch to block i + 1     through the quantized block
        write block i, drop its weights

That is GPTQ's true-sequential order with one forward pass in all. With ``depth="block"`` batches are
suspended at blocks only: the block runs once more to gather all its groups' inputs at once, which needs less
memory for activations and twice the arithmetic (inputs inside a block then come from its float weights).

One more flow, the *witness*, a few tokens, goes with the batches and on to the logits; the checkpoint is read
back from disk after writing and must reproduce them (verify.py).
"""

from __future__ import annotations

import functools
import math
import time
import warnings
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from fewbit.errors import InputError
from fewbit.format import Params, QTensor, Stats
from fewbit.format.fake import Through
from fewbit.format.split import Apart, SplitTensor, without
from fewbit.io import inputs
from fewbit.io.skeleton import dematerialize, materialize
from fewbit.io.source import check_finite
from fewbit.nn.linear import change_input, transform_input
from fewbit.seams.diagonal import first
from fewbit.solve import Rtn, SolverWarning
from fewbit.solve.blocktune import Soft
from fewbit.solve.tune import Tuner
from fewbit.stream.between import make_up
from fewbit.stream.blocks import Blocks, set_weight, watch, weight_of
from fewbit.stream.choose import choose, error, static_params
from fewbit.stream.fold import Notes, fold_maps
from fewbit.stream.inputs import Inputs
from fewbit.stream.job import Job
from fewbit.stream.let import tune_layers
from fewbit.stream.memory import Heap
from fewbit.stream.plan import Plan, PlannedLayer, codec
from fewbit.stream.progress import LayerRow, Progress
from fewbit.stream.rotate import online_map, outer_tensors, rotate_block, rotate_ends, round_to
from fewbit.stream.suspend import Flow, advance, wait
from fewbit.stream.weights import Rounded, forget, tensor
from fewbit.transform import Map

SMALL = 1 << 20  # parameters outside the blocks with fewer elements stay resident
BATCH_TOKENS = 2048  # calibration tokens in one suspended forward


@dataclass(kw_only=True)
class Loop:
    """State of one run through the blocks."""

    plan: Plan
    model: nn.Module
    blocks: Blocks
    mapping: dict[str, str]
    job: Job
    progress: Progress
    rows: list[LayerRow] = field(default_factory=list)
    resumed: int = 0
    witness: Tensor | None = None
    params: dict[str, Params] = field(default_factory=dict)  # static steps of inputs of the block at hand
    flows: list[Flow] = field(default_factory=list)
    stream: Map | None = None  # the rotation of the residual stream; set before where it was learned
    float_outputs: list[Tensor] = field(default_factory=list)  # of the float model at this block, for tuning
    untied: tuple[str, ...] = ()  # parameters that are stored for the first time
    heap: Heap = field(default_factory=Heap)
    outer: dict[str, Tensor] = field(default_factory=dict)  # rotated tensors outside the blocks, as stored

    @torch.no_grad()
    def run(self, tokens: Tensor | None) -> Tensor:
        """Solve and store every block; returns the witness's logits, float32 on the CPU."""
        plan, device = self.plan, self.plan.device
        self.dtype = torch.float32 if device == "cpu" else plan.source.dtype
        self.stored = Rounded(plan.source, plan.source.dtype)
        inside = tuple(n + "." for n in self.blocks.names)
        outside = [n for n in self.mapping if not n.startswith(inside)]
        materialize(self.model, outside, self.stored, self.mapping, device, self.dtype)
        self._check(outside)
        rotation = plan.recipe.rotation
        if rotation is not None:
            self.stream, self.untied = rotate_ends(self.model, rotation, plan.source.dtype, self.stream)
            written = {n: self.mapping[n] for n in outside if n not in self.untied}
            self.outer = outer_tensors(self.model, written | {n: n for n in self.untied}, plan.source.dtype)
        vocabulary = self.model.get_input_embeddings().num_embeddings
        self.witness = (
            tokens[:1, :64] if tokens is not None else (torch.arange(1, 33) * 7919 % vocabulary)[None]
        )
        forward = lambda ids: Flow(lambda: self.model(ids.to(device), use_cache=False)[0])  # noqa: E731
        guide = forward(self.witness)
        flows = []
        if tokens is not None:
            flows = [forward(ids) for ids in tokens.split(self._windows(tokens.shape[1]))]
        self.flows = [guide, *flows]
        handles = [b.register_forward_pre_hook(wait, with_kwargs=True) for b in self.blocks.modules]
        # Rotated ends cannot be read again, so they stay.
        large = [n for n in outside if tensor(self.model, n).numel() >= SMALL and rotation is None]
        try:
            for i in range(len(self.blocks)):
                stop = advance([guide, *flows], self.blocks.modules[i])[0]
                if i == 0:
                    forget(self.model, large)
                self._block(i, guide, flows, stop)
                if i < len(self.blocks) - 1:
                    continue
                for flow in flows:  # only the witness goes on to the logits
                    flow.abandon()
                plan.source.release()
                materialize(self.model, large, self.stored, self.mapping, device, self.dtype)
                if guide.resume() is not None:
                    raise InputError(
                        "the model calls its blocks more than once in a forward; this is not supported"
                    )
                dematerialize(self.blocks.modules[i])
        finally:
            for handle in handles:
                handle.remove()
            for flow in [guide, *flows]:
                flow.abandon()
        dematerialize(self.model)
        return guide.result.float().cpu()

    def _block(self, i: int, guide: Flow, flows: list[Flow], stop) -> None:
        """Solve block i (or take it from disk), with all flows waiting at it; they still wait in it
        afterwards.
        """
        block, name = self.blocks.modules[i], self.blocks.names[i]
        if i:
            dematerialize(self.blocks.modules[i - 1])
        layers = {layer.module: layer for layer in self.plan.layers if layer.block == i}
        weights = {f"{m}.weight" for m in layers}
        names = [n for n in self.mapping if n.startswith(name + ".")]
        full_precision = [n for n in names if n in weights]
        as_stored = [n for n in names if n not in weights]
        device = self.plan.device
        materialize(self.model, full_precision, self.plan.source, self.mapping, device, self.dtype)
        materialize(self.model, as_stored, self.stored, self.mapping, device, self.dtype)
        self._check(names)
        out: dict[str, QTensor] = {}
        finished, online = self.job.finished(i), {}
        if self.stream is not None and (self.tuning or not finished):
            online = rotate_block(block, self.plan.recipe.rotation, self.stream, stop)
            round_to((tensor(self.model, n) for n in as_stored), self.plan.source.dtype)
        if self.tuning:
            self._float(block, flows)
        if finished:
            tensors, rows = self.job.load(i)
            for n in as_stored:  # a fold may have changed them
                tensor(self.model, n).data.copy_(tensors[self.mapping[n]])
            self.rows += rows
            for m, layer in layers.items():
                layer = self.done(layer)
                if layer.online is not None and not online:
                    transform_input(self.model.get_submodule(m), layer.online.apply)
                q = codec(self.plan).from_dict(layer.name, tensors, *layer.entry.stored).to(device)
                set_weight(self.model.get_submodule(m), in_flow(layer, q.dequantize()))
                params = inputs.from_dict(layer.name, tensors, layer.activation, layer.shape[1])
                self._see_quantized(layer, None if params is None else params.to(device), _apart(q))
            self.resumed += 1
        else:
            said = self._fold(block, name, layers, flows, stop) if self.plan.recipe.transforms else {}
            groups = watch(block, lambda: _outside_flow(block, stop))
            groups = [[layers[f"{name}.{n}"] for n in g if f"{name}.{n}" in layers] for g in groups]
            groups = [g for g in groups if g]
            reached = {layer.module for g in groups for layer in g}
            tuned = {m for m, layer in layers.items() if isinstance(layer.rule.solver, Tuner)}
            missed = [layer for m, layer in layers.items() if m not in reached | tuned]
            rows = []
            self._tune(block, name, layers, flows, stop, out, rows)
            groups = [g for group in groups if (g := [x for x in group if x.module not in out])]
            if self.plan.recipe.tuning is not None:
                stored = {n.removeprefix(f"{name}.") for n in as_stored}
                self._between(block, name, groups, flows, stored, out, rows)
            else:
                solve = self._at_linears if self.plan.depth == "linear" else self._at_block
                solve(block, groups, guide, flows, out, rows)
            for layer in missed:
                self._solve([layer], Stats(), out, rows, ("never reached by the calibration text: rounded",))
            tensors = {}
            for m, layer in layers.items():
                tensors |= codec(self.plan).to_dict(layer.name, out[m])
                tensors |= inputs.to_dict(layer.name, self.params.pop(m, None))
            for n in as_stored:
                tensors[self.mapping[n]] = tensor(self.model, n).detach().to("cpu", self.plan.source.dtype)
            turned = {layers[m].name for n in online if (m := f"{name}.{n}") in layers}
            rows = [replace(r, notes=said.get(r.layer, ()) + r.notes, online=r.layer in turned) for r in rows]
            rows.sort(key=lambda r: r.layer)
            self.job.store(i, tensors, rows)
            self.rows += rows
        self.heap.settle(self.plan.source)
        self.progress.block(i + 1, len(self.blocks), finished)

    @property
    def tuning(self) -> bool:
        """Whether anything is learned from whole blocks."""
        return self.plan.recipe.tuning is not None or self._tuners

    @property
    def _tuners(self) -> bool:
        return any(isinstance(rule.solver, Tuner) for rule in self.plan.recipe.rules)

    def _windows(self, seqlen: int) -> int:
        """Calibration windows in one suspended forward."""
        if self.plan.recipe.tuning is not None:
            return self.plan.recipe.tuning.batch
        return 1 if self._tuners else max(1, BATCH_TOKENS // seqlen)

    def done(self, layer: PlannedLayer) -> PlannedLayer:
        """A planned layer of a finished block with the choices that were made for it."""
        row = next(row for row in reversed(self.rows) if row.layer == layer.name)
        online = online_map(layer.shape[1], self.plan.recipe.rotation) if row.online else None
        apart = Apart(columns=row.apart, format=layer.rule.split.apart) if row.apart else None
        return replace(layer.chosen(row.choice), online=online, apart=apart)

    def _check(self, names: list[str]) -> None:
        """Raise ``InputError`` for a stored tensor with NaN or Inf."""
        for n in names:
            check_finite(self.mapping[n], tensor(self.model, n))

    def _at_linears(self, block, groups, guide, flows, out, rows) -> None:
        """Suspend at each group in turn: its inputs come through the layers solved before it."""
        for group in groups:
            leader = self.model.get_submodule(group[0].module)
            if not any(layer.rule.needs for layer in group):
                self._solve(group, Stats(), out, rows)
                continue
            handle = leader.register_forward_pre_hook(wait, with_kwargs=True)
            try:
                seen = self._inputs(group)
                advance([guide], leader)
                for flow in flows:
                    seen.add(advance([flow], leader)[0].x)
            finally:
                handle.remove()
            self._solve(group, seen.stats(), out, rows)

    def _at_block(self, block, groups, guide, flows, out, rows) -> None:
        """Suspend at the block only: run it once outside the flows to gather every group's inputs."""
        seen = {g[0].module: self._inputs(g) for g in groups if any(layer.rule.needs for layer in g)}
        self._watch(block, seen, flows)
        for group in groups:
            own = seen.get(group[0].module)
            self._solve(group, own.stats() if own else Stats(), out, rows)

    def _between(self, block, name, groups, flows, stored: set[str], out, rows) -> None:
        """Solve each group from the block's own inputs, then tune what is still float in the block."""
        calls = [(flow.stop.args, flow.stop.kwargs) for flow in flows]
        soft: dict[str, Soft] = {}
        for group in groups:
            own, first_row = self._inputs(group), len(rows)
            if any(layer.rule.needs for layer in group):
                self._watch(block, {group[0].module: own}, flows)
            self._solve(group, own.stats(), out, rows)
            solved = {f"{m}.weight".removeprefix(f"{name}."): m for m in out}
            for layer in group:
                if layer.rule.weight.codebook is not None:
                    q = out[layer.module].to(self.plan.device)
                    n = f"{layer.module}.weight".removeprefix(f"{name}.")
                    soft[n] = Soft(q=q, place=functools.partial(as_parameter, layer))
            found = make_up(
                block, solved, stored, self.plan.source.dtype, calls, self.float_outputs,
                self.plan.recipe.tuning, soft,
            )  # fmt: skip
            if found.error < found.start:
                soft = {n: replace(s, q=s.moved(found.values[n])) for n, s in soft.items()}
                out |= {solved[n]: s.q.to("cpu") for n, s in soft.items()}
            rows[first_row:] = [
                replace(r, block_error=found.start, tuned_error=found.error) for r in rows[first_row:]
            ]

    def _watch(self, block: nn.Module, seen: dict[str, Inputs], flows: list[Flow]) -> None:
        """Run the block once on every waiting batch and let each module's ``Inputs`` see what it reads."""
        handles = [
            self.model.get_submodule(m).register_forward_pre_hook(
                lambda mod, args, kwargs, own=own: own.add(args[0] if args else next(iter(kwargs.values()))),
                with_kwargs=True,
            )
            for m, own in seen.items()
        ]
        try:
            for flow in flows:
                _outside_flow(block, flow.stop)
        finally:
            for handle in handles:
                handle.remove()

    def _inputs(self, group: list[PlannedLayer]) -> Inputs:
        """An accumulator of what the layers of a group need of their common input."""
        needs = frozenset().union(*(layer.rule.needs for layer in group))
        return Inputs(needs, len(self.flows), [layer.activation for layer in group])

    def _fold(self, block, name, layers, flows, stop) -> Notes:
        """Choose and fold the recipe's maps at the seams of a block."""
        prefix = f"{name}."
        return fold_maps(
            block,
            {m.removeprefix(prefix): layer for m, layer in layers.items()},
            self.plan.recipe.transforms,
            lambda: _outside_flow(block, stop),
            lambda seen: self._watch(block, {prefix + n: own for n, own in seen.items()}, flows),
            len(flows),
            self.plan.source.dtype,
        )

    def _tune(self, block, name, layers, flows, stop, out, rows) -> None:
        """Solve the layers whose solver learns from the whole block, each solver's together."""
        tuners = dict.fromkeys(x.rule.solver for x in layers.values() if isinstance(x.rule.solver, Tuner))
        if not tuners:
            return
        calls = [(flow.stop.args, flow.stop.kwargs) for flow in flows]
        for tuner in tuners:
            start, own = time.perf_counter(), {m: x for m, x in layers.items() if x.rule.solver == tuner}
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", SolverWarning)
                tuned, note = tune_layers(
                    block, name, own, tuner, calls, self.float_outputs,
                    lambda: _outside_flow(block, stop), self.plan.source.dtype,
                )  # fmt: skip
            said = note + tuple(str(c.message) for c in caught if issubclass(c.category, SolverWarning))
            seconds = (time.perf_counter() - start) / len(own)
            for m, layer in own.items():
                part = weight_of(self.model.get_submodule(m)).detach().float()
                self._keep(layer, part, tuned[m], Stats(), out, rows, tuner, seconds, said)

    def _float(self, block: nn.Module, flows: list[Flow]) -> None:
        """Move the float model on by a block: what tuning aims at, whatever the blocks before have lost."""
        before = self.float_outputs or [flow.stop.x for flow in flows]
        self.float_outputs = [
            first(block(*args, **kwargs))
            for x, flow in zip(before, flows, strict=True)
            for args, kwargs in [change_input(lambda _, x=x: x, flow.stop.args, flow.stop.kwargs)]
        ]

    def _see_quantized(self, layer: PlannedLayer, params: Params | None, apart: Tensor | None) -> None:
        """From here on the layer reads its input quantized, in the flows that wait at it, too."""
        if layer.activation is None:
            return
        module, basis = self.model.get_submodule(layer.module), layer.rule.basis
        mapped = (lambda x: x) if basis is None else layer.input_map.apply

        def change(x: Tensor) -> Tensor:
            x = mapped(x)  # tuning sees gradients go straight through the rounding
            return Through.apply(x, layer.activation(x.detach(), params, apart))

        waiting = [flow.stop for flow in self.flows if flow.stop is not None and flow.stop.module is module]
        for stop in waiting:  # hooks that are added now come too late for them
            stop.change = change
        if not waiting:
            transform_input(module, change)

    def _solve(self, group: list[PlannedLayer], stats: Stats, out, rows, notes: tuple[str, ...] = ()) -> None:
        """Quantize the layers of one group in place, those with equal rules together."""
        for layers in _together(group):
            start = time.perf_counter()
            modules = [self.model.get_submodule(layer.module) for layer in layers]
            parts = [weight_of(m).detach().float() for m in modules]
            rule = layers[0].rule
            solver, basis = rule.solver, rule.basis
            own_stats = stats
            if basis is not None:
                parts = [basis.enter(part) for part in parts]
                own_stats = stats.mapped(layers[0].input_map.apply)
            if stats.gram is None and solver.needs:
                solver = Rtn()
            choice = 0
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", SolverWarning)
                if rule.alternatives:
                    choice, q = choose(parts[0], own_stats, solver, rule.choices)
                    layers, solved = [layers[0].chosen(choice)], [q]
                else:
                    if rule.split is None:
                        solved = solver.together(parts, own_stats, rule.weight)
                    else:
                        solve = lambda w, s, solver=solver, rule=rule: solver(w, s, rule.weight)  # noqa: E731
                        solved = [rule.split(part, stats, solve) for part in parts]
            said = notes + tuple(str(c.message) for c in caught if issubclass(c.category, SolverWarning))
            seconds = (time.perf_counter() - start) / len(layers)
            for layer, part, own in zip(layers, parts, solved, strict=True):
                self._keep(layer, part, own, own_stats, out, rows, solver, seconds, said, choice)

    def _keep(
        self, layer, part, own, stats, out, rows, solver, seconds, notes: tuple[str, ...] = (), choice=0
    ) -> None:
        """Put a solved layer in place: its weight ``own`` for ``part``, its input, its row."""
        module, value, apart = self.model.get_submodule(layer.module), own.dequantize(), _apart(own)
        if apart is not None:
            layer = replace(layer, apart=Apart(columns=len(apart), format=layer.rule.split.apart))
        row = LayerRow(
            layer=layer.name,
            format=layer.text,
            solver=type(solver).__name__.lower(),
            bits_per_weight=layer.bits_per_weight,
            error=error(part, value, stats.gram),
            tokens=stats.tokens,
            notes=notes,
            choice=choice,
            apart=0 if apart is None else len(apart),
        )
        if not math.isfinite(row.error):
            raise InputError(f"layer {layer.name} became NaN in quantization; check its weights and inputs")
        set_weight(module, in_flow(layer, value))
        out[layer.module] = own.to("cpu")
        rounded = stats if apart is None else without(stats, apart)
        params = static_params(layer.activation, rounded, layer.name)
        self._see_quantized(layer, params, apart)
        if params is not None:
            self.params[layer.module] = params.to("cpu")
        rows.append(row)
        self.progress.layer(row, seconds)


def in_flow(layer: PlannedLayer, value: Tensor) -> Tensor:
    """The weight that a plain linear needs in the flows: out of the basis in which it was quantized, but for
    inputs that are quantized there.
    """
    basis = layer.rule.basis
    return value if basis is None else basis.leave(value, inputs=layer.activation is None)


def as_parameter(layer: PlannedLayer, value: Tensor) -> Tensor:
    """``in_flow`` as the module stores its weight."""
    return in_flow(layer, value).t() if layer.transposed else in_flow(layer, value)


def _outside_flow(block: nn.Module, stop) -> object:
    """Call a block with the inputs of a waiting flow; hooks that suspend do nothing here."""
    return block(*stop.args, **stop.kwargs)


def _apart(q: QTensor | SplitTensor) -> Tensor | None:
    """The columns of a weight that are kept in float, or None."""
    return q.columns if isinstance(q, SplitTensor) else None


def _together(group: list[PlannedLayer]) -> list[list[PlannedLayer]]:
    """Layers with one input and equal rules; each alone where it has a choice of its own."""
    alike: dict[object, list[PlannedLayer]] = {}
    for layer in group:
        alike.setdefault(layer.module if layer.rule.alternatives else layer.rule, []).append(layer)
    return list(alike.values())
