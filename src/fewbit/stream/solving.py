"""Solving one block: its groups of linears in order, each with the inputs that it then has.

Groups are solved at the linears (each group's inputs come through the layers solved before it), or at the
block (all inputs from its float weights, in one run outside the flows); with tuning between groups from the
block's own inputs, once more for each group. Layers whose solver learns from the whole block come first.
"""

from __future__ import annotations

import functools
import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from fewbit.errors import InputError
from fewbit.format import Params, QTensor, Stats
from fewbit.format.split import Apart, SplitTensor, without
from fewbit.io import inputs
from fewbit.nn.experts import Experts, in_experts
from fewbit.solve import Rtn, SolverWarning
from fewbit.solve.blocktune import Soft
from fewbit.solve.calls import Call
from fewbit.stream.between import make_up
from fewbit.stream.blocks import set_weight, watch, weight_of
from fewbit.stream.choose import choose, error, static_params
from fewbit.stream.fold import Notes, fold_maps
from fewbit.stream.gather import block_runs, gather, inputs_of, outside_flow
from fewbit.stream.let import tune_layers
from fewbit.stream.mixture import fold_experts, solve_experts
from fewbit.stream.place import apart_of, as_parameter, in_flow, read_quantized
from fewbit.stream.planned import Plan, PlannedLayer, is_tuned, to_dict, together
from fewbit.stream.progress import LayerRow, Progress
from fewbit.stream.suspend import Flow, Stop, advance, wait


@dataclass(kw_only=True)
class Solving:
    """A block whose weights are in memory and at which all flows wait.

    layers: by the full name of the module; as_stored: full names of the parameters that stay float;
    float_outputs: what the float model makes of the block, for tuning.
    """

    plan: Plan
    model: nn.Module
    progress: Progress
    block: nn.Module
    name: str
    layers: Mapping[str, PlannedLayer]
    as_stored: Sequence[str]
    guide: Flow
    flows: Sequence[Flow]
    stop: Stop  # where the guide waits
    float_outputs: Sequence[Tensor]
    out: dict[str, QTensor | SplitTensor] = field(default_factory=dict)  # by the full name of the module
    rows: list[LayerRow] = field(default_factory=list)
    params: dict[str, Params] = field(default_factory=dict)  # static steps of inputs

    def run(self) -> None:
        """Fold the recipe's maps, then solve every layer; the quantized weights are in place afterwards."""
        said = self._fold() if self.plan.recipe.transforms else {}
        found = [[f"{self.name}.{n}" for n in g] for g in watch(self.block, self._call)]
        groups = [[x for m in g for x in self._under(m)] for g in found]
        reached = {layer.module for g in groups for layer in g}
        missed = [x for m, x in self.layers.items() if m not in reached and not is_tuned(x)]
        self._tune()
        groups = [g for group in groups if (g := [x for x in group if x.module not in self.out])]
        if self.plan.recipe.tuning is not None:
            self._between(groups)
        elif self.plan.depth == "linear":
            self._at_linears(groups)
        else:
            self._at_block(groups)
        for layer in missed:
            self._solve([layer], Stats(), ("never reached by the calibration text: rounded",))
        self.rows = [replace(r, notes=said.get(r.layer, ()) + r.notes) for r in self.rows]

    def _under(self, module: str) -> list[PlannedLayer]:
        """The planned layers that a name of a group stands for: a linear's, or all of some experts'."""
        if module not in self._mixtures:
            return [self.layers[module]] if module in self.layers else []
        return list(self._inside(module).values())

    @functools.cached_property
    def _mixtures(self) -> dict[str, Experts]:
        """Experts of the block by their full names."""
        return {f"{self.name}.{n}": m for n, m in in_experts(self.block).items()}

    def _mixture(self, group: list[PlannedLayer]) -> str | None:
        """The name of the experts that a group belongs to, or None."""
        return next((m for m in self._mixtures if group[0].module.startswith(f"{m}.")), None)

    def _solve_experts(self, name: str, calls: Sequence[Call]) -> None:
        in_turn = self.plan.depth == "linear" or self.plan.recipe.tuning is not None
        left = {m: x for m, x in self.layers.items() if m not in self.out}
        solve_experts(self._mixtures[name], name, left, calls, in_turn, self._solve)

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint stores of the quantized layers."""
        tensors = {}
        for m, layer in self.layers.items():
            tensors |= to_dict(self.plan, layer, self.out[m])
            tensors |= inputs.to_dict(layer.name, self.params.get(m))
        return tensors

    @property
    def _batches(self) -> int:
        return 1 + len(self.flows)

    def _call(self) -> object:
        """Run the block on the guide's tokens."""
        return outside_flow(self.block, self.stop)

    def _runs(self) -> list[Callable[[], object]]:
        return block_runs(self.block, self.flows)

    def _calls(self) -> list[Call]:
        """How each batch calls the block."""
        return [(flow.stop.args, flow.stop.kwargs) for flow in self.flows]

    def _fold(self) -> Notes:
        """Choose and fold the recipe's maps at the seams of the block."""
        recipe, stored = self.plan.recipe, self.plan.source.dtype
        notes = fold_maps(
            self.block, self._inside(self.name), recipe.transforms, self._call,
            lambda seen: gather(self.block, seen, self._runs()), len(self.flows), stored,
        )  # fmt: skip
        for name, experts in self._mixtures.items():  # after the norm before them, which they all read
            guide, calls = ({name: []} for _ in range(2))
            gather(self.model, {}, [self._call], guide)
            gather(self.model, {}, self._runs(), calls)
            layers = self._inside(name)
            notes |= fold_experts(experts, layers, recipe.transforms, guide[name][0], calls[name], stored)
        return notes

    def _inside(self, name: str) -> dict[str, PlannedLayer]:
        """The layers of a module by their names relative to it."""
        prefix = f"{name}."
        return {m.removeprefix(prefix): x for m, x in self.layers.items() if m.startswith(prefix)}

    def _at_linears(self, groups: list[list[PlannedLayer]]) -> None:
        """Suspend at each group in turn: its inputs come through the layers solved before it."""
        for group in groups:
            mixture = self._mixture(group)
            leader = self.model.get_submodule(mixture or group[0].module)
            if not (self.flows if mixture else any(layer.rule.needs for layer in group)):
                self._solve(group, Stats())
                continue
            handle = leader.register_forward_pre_hook(wait, with_kwargs=True)
            try:
                seen = inputs_of(group, self._batches)
                advance([self.guide], leader)
                for flow in self.flows:
                    stop = advance([flow], leader)[0]
                    if mixture is None:
                        seen.add(stop.x)
            finally:
                handle.remove()
            if mixture is None:
                self._solve(group, seen.stats())
            else:
                self._solve_experts(mixture, self._calls())

    def _at_block(self, groups: list[list[PlannedLayer]]) -> None:
        """Suspend at the block only: run it once outside the flows to gather every group's inputs."""
        plain = (g for g in groups if self._mixture(g) is None)
        asking = (g for g in plain if any(layer.rule.needs for layer in g))
        seen = {g[0].module: inputs_of(g, self._batches) for g in asking}
        calls: dict[str, list[Call]] = {m: [] for g in groups if (m := self._mixture(g)) is not None}
        if seen or calls:
            gather(self.model, seen, self._runs(), calls)
        for group in groups:
            mixture, own = self._mixture(group), seen.get(group[0].module)
            if mixture is None:
                self._solve(group, own.stats() if own else Stats())
            else:
                self._solve_experts(mixture, calls.pop(mixture))

    def _between(self, groups: list[list[PlannedLayer]]) -> None:
        """Solve each group from the block's own inputs, then tune what is still float in the block."""
        stored = {n.removeprefix(f"{self.name}.") for n in self.as_stored}
        soft: dict[str, Soft] = {}
        for group in groups:
            mixture, first_row = self._mixture(group), len(self.rows)
            if mixture is not None:
                calls: dict[str, list[Call]] = {mixture: []}
                gather(self.model, {}, self._runs(), calls)
                self._solve_experts(mixture, calls[mixture])
            else:
                own = inputs_of(group, self._batches)
                if any(layer.rule.needs for layer in group):
                    gather(self.model, {group[0].module: own}, self._runs())
                self._solve(group, own.stats())
            solved = {f"{m}.weight".removeprefix(f"{self.name}."): m for m in self.out}
            for layer in group:
                if layer.rule.weight.codebook is not None:
                    q = self.out[layer.module].to(self.plan.device)
                    n = f"{layer.module}.weight".removeprefix(f"{self.name}.")
                    soft[n] = Soft(q=q, place=functools.partial(as_parameter, layer))
            found = make_up(
                self.block, solved, stored, self.plan.source.dtype, self._calls(), self.float_outputs,
                self.plan.recipe.tuning, soft,
            )  # fmt: skip
            if found.error < found.start:
                soft = {n: replace(s, q=s.moved(found.values[n])) for n, s in soft.items()}
                self.out |= {solved[n]: s.q.to("cpu") for n, s in soft.items()}
            self.rows[first_row:] = [
                replace(r, block_error=found.start, tuned_error=found.error) for r in self.rows[first_row:]
            ]

    def _tune(self) -> None:
        """Solve the layers whose solver learns from the whole block, each solver's together."""
        tuners = dict.fromkeys(x.rule.solver for x in self.layers.values() if is_tuned(x))
        for tuner in tuners:
            start, own = time.perf_counter(), {m: x for m, x in self.layers.items() if x.rule.solver == tuner}
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", SolverWarning)
                tuned, note = tune_layers(
                    self.block, self.name, own, tuner, self._calls(), self.float_outputs,
                    self._call, self.plan.source.dtype,
                )  # fmt: skip
            said = note + tuple(str(c.message) for c in caught if issubclass(c.category, SolverWarning))
            seconds = (time.perf_counter() - start) / len(own)
            for m, layer in own.items():
                part = weight_of(self.model.get_submodule(m)).detach().float()
                self._keep(layer, part, tuned[m], Stats(), tuner, seconds, said)

    def _solve(
        self,
        group: list[PlannedLayer],
        stats: Stats,
        notes: tuple[str, ...] = (),
        routed: int | None = None,
    ) -> None:
        """Quantize the layers of one group in place, those with equal rules together; ``routed``: how many
        tokens the router sent to them.
        """
        for layers in together(group):
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
                self._keep(layer, part, own, own_stats, solver, seconds, said, choice, routed)

    def _keep(
        self, layer, part, own, stats, solver, seconds, notes: tuple[str, ...] = (), choice=0, routed=None
    ) -> None:
        """Put a solved layer in place: its weight ``own`` for ``part``, its input, its row."""
        module, value, apart = self.model.get_submodule(layer.module), own.dequantize(), apart_of(own)
        if apart is not None:
            layer = replace(layer, apart=Apart(columns=len(apart), format=layer.rule.split.apart))
        row = LayerRow(
            layer=layer.name,
            format=layer.text,
            solver=type(solver).__name__.lower(),
            bits_per_weight=layer.bits_per_weight,
            error=error(part, value, stats.gram),
            tokens=stats.tokens,
            routed=routed,
            notes=notes,
            choice=choice,
            apart=0 if apart is None else len(apart),
        )
        if not math.isfinite(row.error):
            raise InputError(f"layer {layer.name} became NaN in quantization; check its weights and inputs")
        set_weight(module, in_flow(layer, value))
        self.out[layer.module] = own.to("cpu")
        rounded = stats if apart is None else without(stats, apart)
        params = static_params(layer.activation, rounded, layer.name)
        read_quantized(self.model, layer, params, apart, (self.guide, *self.flows))
        if params is not None:
            self.params[layer.module] = params.to("cpu")
        self.rows.append(row)
        self.progress.layer(row, seconds)
