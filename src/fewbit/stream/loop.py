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

Here is the walk over the blocks; how one is solved is in solving.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from fewbit.errors import InputError
from fewbit.format.split import Apart
from fewbit.io import inputs
from fewbit.io.skeleton import dematerialize, materialize
from fewbit.io.source import check_finite
from fewbit.nn.linear import change_input, transform_input
from fewbit.seams.trial import first
from fewbit.solve.tune import Tuner
from fewbit.stream.blocks import Blocks, set_weight
from fewbit.stream.job import Job
from fewbit.stream.keyvalue import KeyValues
from fewbit.stream.memory import Heap
from fewbit.stream.place import apart_of, in_flow, read_quantized
from fewbit.stream.planned import Plan, PlannedLayer, codec
from fewbit.stream.progress import LayerRow, Progress
from fewbit.stream.rotate import online_map, outer_tensors, rotate_block, rotate_ends, round_to
from fewbit.stream.solving import Solving
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
        self.stored = Rounded(plan.source)
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
        self.kv = KeyValues(self.model, plan.recipe.kv)
        forward = lambda ids: Flow(lambda: self.model(ids.to(device), **self.kv.watch())[0])  # noqa: E731
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
                self.kv.finish(flows, self.blocks.modules[i])
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
        finished, online = self.job.finished(i), {}
        if self.stream is not None and (self.tuning or not finished):
            online = rotate_block(block, self.plan.recipe.rotation, self.stream, stop)
            round_to((tensor(self.model, n) for n in as_stored), self.plan.source.dtype)
        if self.tuning:
            self._float(block, flows)
        if finished:
            self._take_over(i, layers, as_stored, online)
        else:
            solving = Solving(
                plan=self.plan, model=self.model, progress=self.progress, block=block, name=name,
                layers=layers, as_stored=as_stored, guide=guide, flows=flows, stop=stop,
                float_outputs=self.float_outputs,
            )  # fmt: skip
            solving.run()
            turned = {layers[m].name for n in online if (m := f"{name}.{n}") in layers}
            self._store(i, solving, turned)
        self.heap.settle(self.plan.source)
        self.progress.block(i + 1, len(self.blocks), finished)

    def _store(self, i: int, solving: Solving, turned: set[str]) -> None:
        """Write solved block i; ``turned``: names of the layers before which an online map runs."""
        tensors = solving.tensors()
        for n in solving.as_stored:
            tensors[self.mapping[n]] = self.stored.as_stored(self.mapping[n], tensor(self.model, n))
        rows = [replace(r, online=r.layer in turned) for r in solving.rows]
        rows.sort(key=lambda r: r.layer)
        self.job.store(i, tensors, rows)
        self.rows += rows

    def _take_over(self, i: int, layers: dict[str, PlannedLayer], as_stored, online: dict[str, Map]) -> None:
        """Put block i in place as an interrupted run has stored it; ``online``: maps that run already."""
        tensors, rows = self.job.load(i)
        for n in as_stored:  # a fold may have changed them
            tensor(self.model, n).data.copy_(tensors[self.mapping[n]])
        self.rows += rows
        for m, layer in layers.items():
            layer = self.done(layer)
            if layer.online is not None and not online:
                transform_input(self.model.get_submodule(m), layer.online.apply)
            q = codec(self.plan).from_dict(layer.name, tensors, *layer.entry.stored).to(self.plan.device)
            set_weight(self.model.get_submodule(m), in_flow(layer, q.dequantize()))
            params = inputs.from_dict(layer.name, tensors, layer.activation, layer.shape[1])
            params = None if params is None else params.to(self.plan.device)
            read_quantized(self.model, layer, params, apart_of(q), self.flows)
        self.resumed += 1

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

    def _float(self, block: nn.Module, flows: list[Flow]) -> None:
        """Move the float model on by a block: what tuning aims at, whatever the blocks before have lost."""
        before = self.float_outputs or [flow.stop.x for flow in flows]
        self.float_outputs = [
            first(block(*args, **kwargs))
            for x, flow in zip(before, flows, strict=True)
            for args, kwargs in [change_input(lambda _, x=x: x, flow.stop.args, flow.stop.kwargs)]
        ]
