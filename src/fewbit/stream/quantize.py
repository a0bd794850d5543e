"""The one loop: a model in, a quantized checkpoint out, one block in memory at a time.

    for each block i:                         all batches wait at block i (see suspend.py)
        read the weights of block i
        for each group of linears with one input, in the order of the forward:
            resume every batch to that group; reduce its input to H = X^T X / tokens
            solve the group's linears; put the quantized weights in place
        resume every batch to block i + 1     through the quantized block
        write block i, drop its weights

That is GPTQ's true-sequential order with one forward pass in all. With ``depth="block"`` batches are suspended at
blocks only: the block runs once more to gather all its groups' inputs at once, which needs less memory for
activations and twice the arithmetic (inputs inside a block then come from its float weights).

One more flow, the *witness*, a few tokens, goes with the batches and on to the logits; the checkpoint is read back
from disk after writing and must reproduce them.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from fewbit.errors import InputError
from fewbit.format import QTensor
from fewbit.format.codec import to_plain
from fewbit.io.skeleton import dematerialize, materialize
from fewbit.io.source import Source, check_finite, open_source
from fewbit.kernel.gram import add_gram, full
from fewbit.recipe import Recipe
from fewbit.solve import Need, Rtn, SolverWarning, Stats
from fewbit.stream.blocks import Blocks, set_weight, watch, weight_of
from fewbit.stream.data import Calibration, sample_tokens
from fewbit.stream.job import MANIFEST, RECIPE, Job, write_text
from fewbit.stream.plan import Plan, PlannedLayer, codec, make_plan
from fewbit.stream.progress import LayerRow, Progress
from fewbit.stream.suspend import Flow, wait

SMALL = 1 << 20  # parameters outside the blocks with fewer elements stay resident
BATCH_TOKENS = 2048  # calibration tokens in one suspended forward


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a run left: the checkpoint's folder, its plan and rows, and the check of the file against the run."""

    output: Path
    plan: Plan
    rows: tuple[LayerRow, ...]
    difference: float  # max |logits in memory - logits of the reloaded file|, relative to the largest logit
    resumed_blocks: int
    seconds: float
    finished_before: bool = False

    def as_dict(self) -> dict:
        """Plain data for ``fewbit quantize --json``."""
        return {
            "output": str(self.output),
            "model": self.plan.source.name,
            "recipe": self.plan.recipe.name,
            "checkpoint": self.plan.checkpoint,
            "bits_per_weight": self.plan.bits_per_weight,
            "size_bytes": sum(f.stat().st_size for f in self.output.glob("*.safetensors")),
            "source_bytes": self.plan.source_bytes,
            "layers": [row.as_dict() for row in self.rows],
            "mean_error": sum(row.error for row in self.rows) / len(self.rows),
            "reload_difference": self.difference,
            "resumed_blocks": self.resumed_blocks,
            "finished_before": self.finished_before,
            "seconds": self.seconds,
        }


def quantize(
    model: str | Path,
    recipe: Recipe,
    *,
    output: str | Path,
    calibration: Calibration | None = None,
    device: str = "cpu",
    depth: str = "auto",
    progress: Progress | None = None,
) -> Result:
    """Quantize ``model`` (hub id, folder, GGUF file, "smollm2") by ``recipe`` into the folder ``output``.

    The result is a compressed-tensors checkpoint where that format can hold it, fewbit's own otherwise. An
    interrupted run is taken up by calling again with the same arguments. Raises ``InputError`` for input that cannot
    work, before anything is written; the output folder appears only when it is complete and verified.
    """
    start = time.perf_counter()
    progress = progress or Progress()
    output = Path(output)
    source = open_source(model)
    plan, skeleton, blocks, mapping = make_plan(
        source, recipe, calibration or Calibration(), output=output, device=device, depth=depth
    )
    progress.start(plan)
    progress.phase("reading calibration text")
    tokens = sample_tokens(plan.calibration, source.tokenizer()) if plan.calibration else None
    job = Job(output, _key(plan, tokens))
    if job.open():
        rows, difference = _read_manifest(output)
        seconds = time.perf_counter() - start
        return Result(
            output=output, plan=plan, rows=rows, difference=difference, resumed_blocks=len(blocks), seconds=seconds,
            finished_before=True,
        )  # fmt: skip
    loop = Loop(plan=plan, model=skeleton, blocks=blocks, mapping=mapping, job=job, progress=progress)
    logits = loop.run(tokens)
    progress.phase("writing the checkpoint")
    _write(plan, job, loop, len(blocks))
    progress.phase("reading it back")
    difference = verify(job.ready, loop.witness, logits, device)
    _write_manifest(plan, job, loop.rows, difference)
    job.commit()
    return Result(
        output=output, plan=plan, rows=tuple(loop.rows), difference=difference, resumed_blocks=loop.resumed,
        seconds=time.perf_counter() - start,
    )  # fmt: skip


class Rounded:
    """A Source whose floating tensors are rounded to the dtype in which the output will store them."""

    def __init__(self, source: Source, dtype: torch.dtype):
        self._source, self._dtype = source, dtype

    def read(self, names):
        """Tensors as the output checkpoint will hold them."""
        return {n: t.to(self._dtype) if t.is_floating_point() else t for n, t in self._source.read(names).items()}

    def __getattr__(self, name):
        return getattr(self._source, name)


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
    outer: dict[str, Tensor] = field(default_factory=dict)
    witness: Tensor | None = None

    @torch.no_grad()
    def run(self, tokens: Tensor | None) -> Tensor:
        """Solve and store every block; returns the witness's logits, float32 on the CPU."""
        plan, device = self.plan, self.plan.device
        self.dtype = torch.float32 if device == "cpu" else plan.source.dtype
        self.stored = Rounded(plan.source, plan.source.dtype)
        inside = tuple(n + "." for n in self.blocks.names)
        outside = [n for n in self.mapping if not n.startswith(inside)]
        materialize(self.model, outside, self.stored, self.mapping, device, self.dtype)
        vocabulary = self.model.get_input_embeddings().num_embeddings
        self.witness = tokens[:1, :64] if tokens is not None else (torch.arange(1, 33) * 7919 % vocabulary)[None]
        forward = lambda ids: Flow(lambda: self.model(ids.to(device), use_cache=False).logits)  # noqa: E731
        guide = forward(self.witness)
        flows = []
        if tokens is not None:
            flows = [forward(ids) for ids in tokens.split(max(1, BATCH_TOKENS // tokens.shape[1]))]
        handles = [b.register_forward_pre_hook(wait, with_kwargs=True) for b in self.blocks.modules]
        large = [n for n in outside if _get(self.model, n).numel() >= SMALL]
        try:
            for i in range(len(self.blocks)):
                stop = _advance([guide, *flows], self.blocks.modules[i])[0]
                if i == 0:
                    _forget(self.model, large)
                self._block(i, guide, flows, stop)
                if i < len(self.blocks) - 1:
                    continue
                for flow in flows:  # only the witness goes on to the logits
                    flow.abandon()
                materialize(self.model, large, self.stored, self.mapping, device, self.dtype)
                if guide.resume() is not None:
                    raise InputError("the model calls its blocks more than once in a forward; this is not supported")
                dematerialize(self.blocks.modules[i])
        finally:
            for handle in handles:
                handle.remove()
            for flow in [guide, *flows]:
                flow.abandon()
        dematerialize(self.model)
        return guide.result.float().cpu()

    def _block(self, i: int, guide: Flow, flows: list[Flow], stop) -> None:
        """Solve block i (or take it from disk), with all flows waiting at it; they still wait in it afterwards."""
        block, name = self.blocks.modules[i], self.blocks.names[i]
        if i:
            dematerialize(self.blocks.modules[i - 1])
        layers = {layer.module: layer for layer in self.plan.layers if layer.block == i}
        weights = {f"{m}.weight" for m in layers}
        names = [n for n in self.mapping if n.startswith(name + ".")]
        materialize(self.model, [n for n in names if n in weights], self.plan.source, self.mapping, self.plan.device,
                    torch.float32 if self.plan.device == "cpu" else self.dtype)  # fmt: skip
        materialize(self.model, [n for n in names if n not in weights], self.stored, self.mapping, self.plan.device,
                    self.dtype)  # fmt: skip
        for n in names:
            check_finite(self.mapping[n], _get(self.model, n))
        out: dict[str, QTensor] = {}
        if self.job.finished(i):
            tensors, rows = self.job.load(i)
            for m, layer in layers.items():
                q = codec(self.plan).from_dict(layer.name, tensors, layer.format, layer.shape)
                set_weight(self.model.get_submodule(m), q.dequantize().to(self.plan.device))
            self.resumed += 1
        else:
            groups = watch(block, lambda: _outside_flow(block, stop))
            groups = [[layers[f"{name}.{n}"] for n in g if f"{name}.{n}" in layers] for g in groups]
            groups = [g for g in groups if g]
            reached = {layer.module for g in groups for layer in g}
            missed = [layer for m, layer in layers.items() if m not in reached]
            rows = []
            solve = self._at_linears if self.plan.depth == "linear" else self._at_block
            solve(block, groups, guide, flows, out, rows)
            for layer in missed:
                self._solve([layer], Stats(), out, rows, ("never reached by the calibration text: rounded",))
            tensors = {}
            for m, layer in layers.items():
                tensors |= codec(self.plan).to_dict(layer.name, out[m])
            for n in names:
                if n not in weights:
                    value = _get(self.model, n)
                    dtype = self.plan.source.dtype if value.is_floating_point() else value.dtype
                    tensors[self.mapping[n]] = value.detach().to("cpu", dtype).contiguous()
            rows.sort(key=lambda r: r.layer)
            self.job.store(i, tensors, rows)
        self.rows += rows
        self.plan.source.release()
        self.progress.block(i + 1, len(self.blocks), self.job.finished(i) and not out)

    def _at_linears(self, block, groups, guide, flows, out, rows) -> None:
        """Suspend at each group in turn: its inputs come through the layers solved before it."""
        for group in groups:
            leader = self.model.get_submodule(group[0].module)
            if not any(layer.rule.needs for layer in group):
                self._solve(group, Stats(), out, rows)
                continue
            handle = leader.register_forward_pre_hook(wait, with_kwargs=True)
            try:
                gram = _Gram()
                _advance([guide], leader)
                for flow in flows:
                    gram.add(_advance([flow], leader)[0].x)
            finally:
                handle.remove()
            self._solve(group, gram.stats(), out, rows)

    def _at_block(self, block, groups, guide, flows, out, rows) -> None:
        """Suspend at the block only: run it once outside the flows to gather every group's inputs."""
        grams = {g[0].module: _Gram() for g in groups if any(layer.rule.needs for layer in g)}
        handles = [
            self.model.get_submodule(m).register_forward_pre_hook(
                lambda mod, args, kwargs, gram=gram: gram.add(args[0] if args else next(iter(kwargs.values()))),
                with_kwargs=True,
            )
            for m, gram in grams.items()
        ]
        try:
            for flow in flows:
                _outside_flow(block, flow.stop)
        finally:
            for handle in handles:
                handle.remove()
        for group in groups:
            gram = grams.get(group[0].module)
            self._solve(group, gram.stats() if gram else Stats(), out, rows)

    def _solve(self, group: list[PlannedLayer], stats: Stats, out, rows, notes: tuple[str, ...] = ()) -> None:
        """Quantize the layers of one group in place; layers with equal rules and independent rows are stacked."""
        for layers in _stacks(group):
            start = time.perf_counter()
            modules = [self.model.get_submodule(layer.module) for layer in layers]
            parts = [weight_of(m).detach().float() for m in modules]
            w = torch.cat(parts) if len(parts) > 1 else parts[0]
            rule = layers[0].rule
            solver = rule.solver
            if stats.gram is None and solver.needs:
                solver = Rtn()
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", SolverWarning)
                q = solver(w, stats, rule.weight)
            said = notes + tuple(str(c.message) for c in caught if issubclass(c.category, SolverWarning))
            begin = 0
            seconds = (time.perf_counter() - start) / len(layers)
            for layer, module, part in zip(layers, modules, parts, strict=True):
                own = q if len(layers) == 1 else q.rows(begin, begin + len(part))
                begin += len(part)
                value = own.dequantize()
                row = LayerRow(
                    layer=layer.name,
                    format=str(layer.format),
                    solver=type(solver).__name__.lower(),
                    bits_per_weight=layer.bits_per_weight,
                    error=_error(part, value, stats.gram),
                    tokens=stats.tokens,
                    notes=said,
                )
                if not math.isfinite(row.error):
                    raise InputError(f"layer {layer.name} became NaN in quantization; check its weights and inputs")
                set_weight(module, value)
                out[layer.module] = own.to("cpu")
                rows.append(row)
                self.progress.layer(row, seconds)


class _Gram:
    """Running X^T X of one group's inputs."""

    def __init__(self):
        self.sum: Tensor | None = None
        self.tokens = 0

    def add(self, x: Tensor) -> None:
        x = x.detach().reshape(-1, x.shape[-1])
        if self.sum is None:
            self.sum = torch.zeros(x.shape[1], x.shape[1], device=x.device)
        add_gram(self.sum, x)
        self.tokens += len(x)

    def stats(self) -> Stats:
        return Stats() if self.sum is None else Stats(gram=full(self.sum).div_(self.tokens), tokens=self.tokens)


def _advance(flows: list[Flow], module: nn.Module):
    """Resume flows to ``module``, where they must stop; a flow that waits there already stays."""
    stops = []
    for flow in flows:
        if flow.stop is None or flow.stop.module is not module:
            flow.resume()
        if flow.stop is None or flow.stop.module is not module:
            raise InputError(
                f"the forward of this model did not reach a {type(module).__name__} where it was expected; its blocks are "
                "not called in their order, which the streaming loop needs"
            )
        stops.append(flow.stop)
    return stops


def _outside_flow(block: nn.Module, stop) -> object:
    """Call a block with the inputs of a waiting flow; hooks that suspend do nothing here."""
    return block(*stop.args, **stop.kwargs)


def _stacks(group: list[PlannedLayer]) -> list[list[PlannedLayer]]:
    """Layers with one input and equal rules, solved as one matrix where no block spans rows."""
    stacks: dict[object, list[PlannedLayer]] = {}
    for layer in group:
        key = layer.rule if layer.format.rows_independent else layer.module
        stacks.setdefault(key, []).append(layer)
    return list(stacks.values())


def _error(w: Tensor, value: Tensor, gram: Tensor | None) -> float:
    """Relative squared error of the output, or of the weight where no inputs were gathered."""
    e = w - value
    if gram is None:
        return float(e.square().sum() / w.square().sum().clamp(min=1e-30))
    return float(((e @ gram) * e).sum() / ((w @ gram) * w).sum().clamp(min=1e-30))


def _get(model: nn.Module, name: str) -> Tensor:
    """A parameter or buffer by its full name."""
    owner, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(owner), leaf)


def _forget(model: nn.Module, names: list[str]) -> None:
    """Back to the meta device, one parameter at a time (their modules may hold small ones that stay)."""
    for name in names:
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        if leaf in module._parameters and module._parameters[leaf] is not None:
            module._parameters[leaf] = nn.Parameter(module._parameters[leaf].to("meta"), requires_grad=False)


@torch.no_grad()
def verify(folder: Path, witness: Tensor, expected: Tensor, device: str) -> float:
    """Read a checkpoint back block by block and compare its logits; returns the largest relative difference.

    Raises ``InputError`` when they differ by more than 1e-3 of the largest logit, or are not finite.
    """
    got = stream_logits(open_source(folder), witness, device)
    if not torch.isfinite(got).all():
        raise InputError(f"the checkpoint written to {folder} gives NaN or Inf logits; nothing was published")
    difference = float((got - expected).abs().max() / expected.abs().max().clamp(min=1e-30))
    if difference > 1e-3:
        raise InputError(
            f"the checkpoint written to {folder} does not reproduce the model in memory (logits differ by "
            f"{difference:.2g} of the largest); nothing was published; please report this"
        )
    return difference


@torch.no_grad()
def stream_logits(source: Source, tokens: Tensor, device: str = "cpu") -> Tensor:
    """Logits [batch, L, vocabulary] of any source, float32 on the CPU, with one block's weights in memory at a time."""
    from fewbit.io.skeleton import build_skeleton, parameter_map
    from fewbit.stream.blocks import find_blocks

    model = build_skeleton(source)
    mapping, _ = parameter_map(source, model)
    blocks = find_blocks(model)
    dtype = torch.float32 if device == "cpu" else source.dtype
    inside = tuple(n + "." for n in blocks.names)
    outside = [n for n in mapping if not n.startswith(inside)]
    materialize(model, outside, source, mapping, device, dtype)
    handles = [b.register_forward_pre_hook(wait, with_kwargs=True) for b in blocks.modules]
    flow = Flow(lambda: model(tokens.to(device), use_cache=False).logits)
    try:
        for i, block in enumerate(blocks.modules):
            _advance([flow], block)
            if i:
                dematerialize(blocks.modules[i - 1])
            names = [n for n in mapping if n.startswith(blocks.names[i] + ".")]
            materialize(model, names, source, mapping, device, dtype)
            source.release()
        flow.resume()
    finally:
        for handle in handles:
            handle.remove()
        flow.abandon()
    return flow.result.float().cpu()


def _key(plan: Plan, tokens: Tensor | None) -> dict:
    """What makes two runs the same run."""
    import transformers

    import fewbit

    digest = hashlib.sha256(tokens.numpy().tobytes()).hexdigest() if tokens is not None else None
    return {
        "source": plan.source.fingerprint(),
        "recipe": to_plain(plan.recipe),
        "calibration": None if tokens is None else {
            "text": plan.calibration.source or "embedded default", "samples": plan.calibration.samples,
            "seqlen": plan.calibration.seqlen, "seed": plan.calibration.seed, "tokens_sha256": digest,
        },
        "depth": plan.depth,
        "device": torch.device(plan.device).type,
        "versions": {"fewbit": fewbit.__version__, "torch": torch.__version__, "transformers": transformers.__version__},
    }  # fmt: skip


def _write(plan: Plan, job: Job, loop: Loop, blocks: int) -> None:
    """Shards, config, tokenizer and recipe of the finished checkpoint, under the job's ``ready`` folder."""
    inside = tuple(n + "." for n in loop.blocks.names)
    outer_names = sorted({s for n, s in loop.mapping.items() if not n.startswith(inside)})
    available = plan.source.tensors()
    outer = Rounded(plan.source, plan.source.dtype).read([n for n in outer_names if n in available])
    job.assemble(blocks, outer)
    plan.source.companions(job.ready)
    config_file = job.ready / "config.json"
    config = json.loads(config_file.read_text(encoding="utf-8"))
    config["dtype"] = str(plan.source.dtype).removeprefix("torch.")
    config.pop("torch_dtype", None)
    config["quantization_config"] = codec(plan).quantization_config(
        {layer.name: layer.format for layer in plan.layers},
        ignore=list(plan.left),
        transposed=[layer.name for layer in plan.layers if layer.transposed],
        shapes={layer.name: layer.shape for layer in plan.layers},
    )
    write_text(config_file, json.dumps(config, indent=2, sort_keys=True) + "\n")
    write_text(job.ready / RECIPE, plan.recipe.to_yaml())


def _write_manifest(plan: Plan, job: Job, rows: list[LayerRow], difference: float) -> None:
    manifest = {
        "job": job.key,
        "model": plan.source.name,
        "checkpoint": plan.checkpoint,
        "bits_per_weight": plan.bits_per_weight,
        "reload_difference": difference,
        "left_as_they_are": list(plan.left),
        "unused_tensors": list(plan.unused),
        "layers": [row.as_dict() for row in rows],
    }
    write_text(job.ready / MANIFEST, json.dumps(manifest, indent=1, sort_keys=True) + "\n")


def _read_manifest(output: Path) -> tuple[tuple[LayerRow, ...], float]:
    data = json.loads((output / MANIFEST).read_text(encoding="utf-8"))
    rows = tuple(LayerRow(**{**r, "notes": tuple(r["notes"])}) for r in data["layers"])
    return rows, data["reload_difference"]
