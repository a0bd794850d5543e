"""``fewbit.quantize``: from what a user names to a verified checkpoint folder.

plan -> calibration tokens -> job folder -> loop (block by block, to disk) -> shards -> read back and compared
-> the folder appears under its name.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from fewbit.errors import InputError, WriteError
from fewbit.format.codec import to_plain
from fewbit.io import compressed_tensors, native
from fewbit.io.source import open_source
from fewbit.recipe import Recipe
from fewbit.stream.coverage import coverage
from fewbit.stream.data import Calibration, sample_tokens, token_hash
from fewbit.stream.encoder import Encoder
from fewbit.stream.job import MANIFEST, RECIPE, Job, depth_of_interrupted, write_text
from fewbit.stream.loop import Loop
from fewbit.stream.memory import keep_freed_arrays
from fewbit.stream.plan import make_plan
from fewbit.stream.planned import Plan
from fewbit.stream.progress import LayerRow, Progress
from fewbit.stream.rotate import learned_map
from fewbit.stream.sites import read_sentences
from fewbit.stream.verify import verify
from fewbit.stream.weights import Rounded


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a run left: the checkpoint's folder, its plan and rows, and the check of the file against the
    run.
    """

    output: Path
    plan: Plan
    rows: tuple[LayerRow, ...]
    difference: float | None  # max |logits in memory - of the reloaded file| over the largest; None: not read
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
            "sites": len(self.plan.sites),
            "experts": None if (found := coverage(self.rows)) is None else found.as_dict(),
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
    read_back: bool = True,
    progress: Progress | None = None,
) -> Result:
    """Quantize ``model`` (hub id, folder, GGUF file, "smollm2") by ``recipe`` into the folder ``output``.

    The result is a compressed-tensors checkpoint where that format can hold it, fewbit's own otherwise. An
    interrupted run is taken up by calling again with the same arguments. Raises ``InputError`` for input that
    cannot work, before anything is written; the output folder appears only when it is complete and, with
    ``read_back``, verified: the checkpoint is read from disk and must give the logits of the run.
    """
    start = time.perf_counter()
    keep_freed_arrays()
    progress = progress or Progress()
    output = Path(output)
    source = open_source(model)
    if depth == "auto":  # it depends on free memory: an interrupted run goes on as it began
        depth = depth_of_interrupted(output) or depth
    calibration = calibration or Calibration()
    plan, skeleton, blocks, mapping = make_plan(
        source, recipe, calibration, output=output, device=device, depth=depth
    )
    seen = read_calibration(plan)
    job = Job(output, _key(plan, seen))
    if job.open():
        rows, difference = _read_manifest(output)
        seconds = time.perf_counter() - start
        return Result(
            output=output,
            plan=plan,
            rows=rows,
            difference=difference,
            resumed_blocks=len(blocks),
            seconds=seconds,
            finished_before=True,
        )
    progress.start(plan)
    try:
        if recipe.of_encoder:
            made = _whole(plan, skeleton, mapping, seen, job, progress)
        else:
            loop = Loop(plan=plan, model=skeleton, blocks=blocks, mapping=mapping, job=job, progress=progress)
            made = _by_blocks(loop, seen)
        plan = made.plan
        source.release()
        progress.phase("writing the checkpoint")
        _write(made, job)
        source.release()
        difference = None
        if read_back:
            progress.phase("reading it back")
            difference = made.check()
        _write_manifest(plan, job, made.rows, difference)
    except WriteError:
        raise  # finished blocks stay: the same command goes on from them
    except InputError:
        job.discard()  # the same command would fail again
        raise
    job.commit()
    return Result(
        output=output,
        plan=plan,
        rows=tuple(made.rows),
        difference=difference,
        resumed_blocks=made.resumed,
        seconds=time.perf_counter() - start,
    )


def read_calibration(plan: Plan) -> Tensor | list[dict[str, Tensor]] | None:
    """What the run will see: windows of tokens; for encoders with sites batches of sentences; or nothing."""
    if plan.calibration is None:
        return None
    if plan.recipe.of_encoder:
        return read_sentences(plan.calibration, plan.source.tokenizer(), plan.source.config())
    return sample_tokens(plan.calibration, plan.source.tokenizer())


@dataclass(frozen=True, kw_only=True)
class _Made:
    """A finished model. outer: tensors of the file beside those of the ``blocks`` blocks on disk; check:
    reads the file and compares its answer with the run's.
    """

    plan: Plan
    rows: list[LayerRow]
    outer: dict[str, Tensor]
    check: Callable[[], float]
    blocks: int = 0
    resumed: int = 0
    untied: bool = False


def _by_blocks(loop: Loop, tokens: Tensor | None) -> _Made:
    """The streaming loop; memory is one block."""
    plan, job = loop.plan, loop.job
    loop.stream = learned_map(plan, tokens, job, loop.progress)
    logits = loop.run(tokens)
    inside = tuple(n + "." for n in loop.blocks.names)
    names = sorted({s for n, s in loop.mapping.items() if not n.startswith(inside)})
    available = plan.source.tensors()
    outer = Rounded(plan.source).read([n for n in names if n in available])
    return _Made(
        plan=replace(plan, layers=tuple(loop.done(x) for x in plan.layers)),
        rows=loop.rows,
        outer=outer | loop.outer | loop.kv.tensors(loop.mapping),
        check=lambda: verify(job.ready, loop.witness, logits, plan.device),
        blocks=len(loop.blocks),
        resumed=loop.resumed,
        untied=bool(loop.untied),
    )


def _whole(plan: Plan, model: nn.Module, mapping: dict[str, str], sentences, job: Job, progress) -> _Made:
    """An encoder with sites, in memory at once."""
    encoder = Encoder(plan, model, mapping, progress)
    encoder.run(sentences or [])
    check = lambda: encoder.check(job.ready)  # noqa: E731
    return _Made(plan=plan, rows=encoder.rows, outer=encoder.tensors, check=check)


def _key(plan: Plan, seen: Tensor | list[dict[str, Tensor]] | None) -> dict:
    """What makes two runs the same run."""
    import transformers

    import fewbit

    text = None
    if seen is not None:
        batches = isinstance(seen, list)
        tokens = torch.cat([batch["input_ids"].flatten() for batch in seen]) if batches else seen
        text = {
            "text": str(plan.calibration.source or "embedded default"),
            "samples": plan.calibration.samples,
            "seqlen": plan.calibration.seqlen,
            "seed": plan.calibration.seed,
            "tokens_sha256": token_hash(tokens),
        }
    return {
        "source": plan.source.fingerprint(),
        "recipe": to_plain(plan.recipe),
        "calibration": text,
        "depth": plan.depth,
        "device": torch.device(plan.device).type,
        "versions": {
            "fewbit": fewbit.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def _write(made: _Made, job: Job) -> None:
    """Shards, config, tokenizer and recipe of the finished checkpoint, under the job's ``ready`` folder."""
    plan = made.plan
    job.assemble(made.blocks, made.outer)
    plan.source.companions(job.ready)
    config_file = job.ready / "config.json"
    config = json.loads(config_file.read_text(encoding="utf-8"))
    config["dtype"] = str(plan.source.dtype).removeprefix("torch.")
    config.pop("torch_dtype", None)
    if made.untied:
        config["tie_word_embeddings"] = False
    config["quantization_config"] = quantization_config(plan)
    write_text(config_file, json.dumps(config, indent=2, sort_keys=True) + "\n")
    write_text(job.ready / RECIPE, plan.recipe.to_yaml())


def quantization_config(plan: Plan) -> dict:
    """The ``quantization_config`` of config.json, in the language of the plan's checkpoint format."""
    if plan.checkpoint == "native":
        entries = {x.name: x.entry for x in plan.layers}
        return native.quantization_config(entries, [site.entry for site in plan.sites], plan.recipe.kv)
    # under both its names: transformers looks for those of its model, engines for those of the file
    named = {name: x for x in plan.layers for name in (x.name, x.module)}
    formats, inputs = ({n: getattr(x, k) for n, x in named.items()} for k in ("format", "activation"))
    left = [*plan.left, *plan.left_modules]
    return compressed_tensors.quantization_config(formats, left, inputs, kv=plan.recipe.kv)


def _write_manifest(plan: Plan, job: Job, rows: list[LayerRow], difference: float | None) -> None:
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
    if (found := coverage(rows)) is not None:
        manifest["experts"] = found.as_dict()
    write_text(job.ready / MANIFEST, json.dumps(manifest, indent=1, sort_keys=True) + "\n")


def _read_manifest(output: Path) -> tuple[tuple[LayerRow, ...], float | None]:
    data = json.loads((output / MANIFEST).read_text(encoding="utf-8"))
    rows = tuple(LayerRow(**{**r, "notes": tuple(r["notes"])}) for r in data["layers"])
    return rows, data["reload_difference"]
