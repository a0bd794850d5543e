"""``fewbit export``: a quantized checkpoint in another layout, code for code, or refused with the reason.

A layout holds a weight when it has its grid, its blocks, its zeros and its steps; then codes go over as they
are, and the file is read back and compared by value. Steps may change their dtype where the layout prescribes
one (float16 in GPTQ and AWQ files): what that changes is measured and said. A weight that is not held is
refused with its layer, unless ``requantize`` allows to round it to the nearest format that the layout has;
what that costs is measured, too. Everything else of the source goes along as it is stored.

Tensors are read, packed and written one by one; memory is one shard. The folder appears under its name when
it is complete and has been verified.

Road not taken: to quantize the model again from its decoded weights whatever the formats. It is less code,
and turns a lossless change of packing into a second loss that nobody asked for.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from fewbit.errors import InputError
from fewbit.format.qtensor import QTensor, value_of
from fewbit.format.split import SplitTensor
from fewbit.io import compressed_tensors, fp8, inputs
from fewbit.io.ordered import OrderedTensor
from fewbit.io.skeleton import build_skeleton, parameter_map
from fewbit.io.source import Source, open_source
from fewbit.nn.blocks import linears
from fewbit.stream.client import Seen, look
from fewbit.stream.job import write_text
from fewbit.stream.layouts import (
    LAYOUTS,
    TARGETS,
    Layer,
    besides,
    beyond,
    caveats,
    configuration,
    plan_layers,
)
from fewbit.stream.shards import Shards

STEPS_ONLY = 2**-10  # relative change of a weight that rounding its steps to float16 can make

Progress = Callable[[int, int], None]
Stored = QTensor | SplitTensor | OrderedTensor


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What an export did. copied: tensors that went along as they are; rounded_floats: those whose dtype
    changed; tied: parameters that are stored under another name; seen: None when it was not verified.
    """

    output: Path
    target: str
    layers: tuple[Layer, ...]
    copied: tuple[str, ...]
    rounded_floats: tuple[str, ...]
    tied: Mapping[str, str]
    unused: tuple[str, ...]
    caveats: tuple[str, ...]
    shards: int
    nbytes: int
    seen: Seen | None

    @property
    def requantized(self) -> tuple[Layer, ...]:
        """Layers that were rounded again, the largest error first."""
        return tuple(sorted((x for x in self.layers if x.why), key=lambda x: -x.error))

    def as_dict(self) -> dict:
        """Plain data for --json."""
        seen = self.seen
        return {
            "output": str(self.output),
            "to": self.target,
            "layers": len(self.layers),
            "requantized": [
                {
                    "layer": x.name,
                    "from": str(x.entry.format),
                    "to": str(x.to.format),
                    "why": x.why,
                    "error": x.error,
                }
                for x in self.requantized
            ],
            "largest_step_change": max((x.change for x in self.layers), default=0.0),
            "copied": list(self.copied),
            "rounded_floats": list(self.rounded_floats),
            "tied": dict(self.tied),
            "unused": list(self.unused),
            "caveats": list(self.caveats),
            "shards": self.shards,
            "size_bytes": self.nbytes,
            "verified": seen is not None,
            "client_difference": None if seen is None else seen.difference,
            "client_refused": None if seen is None else seen.why or None,
        }


@torch.no_grad()
def export(
    model: str | Path,
    target: str,
    output: str | Path,
    *,
    requantize: bool = False,
    shard_bytes: int = 5 * 10**9,
    verify: bool = True,
    progress: Progress | None = None,
) -> Exported:
    """Write the quantized checkpoint ``model`` into the folder ``output`` in the layout ``target``.

    progress(done, tensors) is called at the start and after each. Raises ``InputError`` for a layout or model
    that cannot work, with the first layer that is not held; nothing is left behind then.
    """
    output = Path(output)
    if target not in LAYOUTS:
        raise InputError(f"there is no layout {target!r} to export to; known are {', '.join(TARGETS)}")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"output {output} holds something already; choose another folder with -o")
    source = open_source(model)
    if not getattr(source, "entries", None):
        raise InputError(
            f"{model} holds no quantized weights that could change their layout; quantize it first: "
            f"fewbit quantize {model} -r gptq -o OUT"
        )
    skeleton = build_skeleton(source)
    mapping, unused = parameter_map(source, skeleton)
    kinds = {_stored(name, mapping): type(m).__name__ for name, m in linears(skeleton).items()}
    codec = LAYOUTS[target]
    layers = plan_layers(source, codec, kinds, requantize)
    left = [name for name in kinds if name not in layers]
    settings = configuration(target, layers, left, source)
    temporary = output.with_name(f".{output.name}.exporting")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        shards = Shards(temporary, shard_bytes)
        copied, floats = _write(source, codec, layers, shards, progress)
        shards.add(besides(target, layers, source))
        count = shards.finish()
        _configure(source, temporary, settings)
        seen = None
        if verify:
            layers = _compare(source, temporary, layers)
            later = beyond(layers) if target == "compressed-tensors" else []
            seen = Seen(difference=None, why=later[0]) if later else look(temporary, target)
        output.parent.mkdir(parents=True, exist_ok=True)
        temporary.rename(output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    stored = {}
    for name, held in mapping.items():
        stored.setdefault(held, []).append(name)
    return Exported(
        output=output,
        target=target,
        layers=tuple(layers.values()),
        copied=tuple(copied),
        rounded_floats=tuple(floats),
        tied={
            name: held for held, names in stored.items() for name in names if name != held and len(names) > 1
        },
        unused=tuple(unused),
        caveats=tuple(caveats(target, layers, source)),
        shards=count,
        nbytes=shards.total,
        seen=seen,
    )


def _stored(name: str, mapping: Mapping[str, str]) -> str:
    """A linear's name in the checkpoint; its own where it is tied to a tensor of another name (a head)."""
    stored = mapping.get(f"{name}.weight", f"{name}.weight").removesuffix(".weight")
    return stored if stored.rpartition(".")[2] == name.rpartition(".")[2] else name


# -- writing --


def _write(source: Source, codec, layers: dict[str, Layer], shards: Shards, progress: Progress | None):
    """All tensors in order; returns the names of those copied, and of those whose dtype changed."""
    weights = {f"{name}.weight": layer for name, layer in layers.items()}
    if progress is not None:
        progress(0, len(weights))
    names = sorted(
        source.tensors(), key=lambda n: [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", n)]
    )
    copied, floats = [], []
    for i, name in enumerate(names, 1):
        layer = weights.get(name)
        if layer is None:
            value = source.read([name])[name]
            kept = source.kept_dtype(name)
            if value.is_floating_point() and value.dtype != kept and value.dtype.itemsize > 1:
                floats.append(name)
                value = value.to(kept)
            copied.append(name)
            shards.add({name: value})
        else:
            shards.add(_packed(source, codec, layers, layer))
        source.release()
        if progress is not None:
            progress(i, len(names))
    return copied, floats


def _packed(source: Source, codec, layers: dict[str, Layer], layer: Layer) -> dict[str, Tensor]:
    q, to = source.read_qtensor(layer.name), layer.to
    if layer.why:
        w = q.dequantize()
        q = fp8.quantize(w) if codec is fp8 and to.format.grid == fp8.E4M3 else to.format.quantize(w)
        error = (q.dequantize() - w).square().sum() / w.square().sum().clamp(min=1e-30)
        layers[layer.name] = replace(layer, error=float(error))
    layers[layer.name] = replace(layers[layer.name], zeros=_zero_steps(layer.name, q))
    more = (to.activation,) if codec is compressed_tensors else ()
    out = codec.to_dict(layer.name, q, *more)
    if to.activation is not None:
        params = source.read_input(layer.name)
        if codec is compressed_tensors and params is not None:
            return out | codec.input_to_dict(layer.name, to.activation, params)
        given = inputs.to_dict(layer.name, params)
        names = {f"{layer.name}.{a}": f"{layer.name}.{b}" for a, b in codec.input_names.items()}
        out |= {names.get(n, n): t for n, t in given.items()}
    return out


def _zero_steps(name: str, q: Stored) -> int:
    """How many steps are 0, so that their blocks are; those that are NaN or infinite are refused."""
    rest = q if isinstance(q, QTensor) else q.rest
    steps = value_of(rest.scale)
    bad = 0 if steps is None else int((~torch.isfinite(steps.float())).sum())
    if bad:
        raise InputError(
            f"{bad} steps of {name} are NaN or infinite; the checkpoint is damaged, make it again"
        )
    return 0 if steps is None else int((steps == 0).sum())


def _configure(source: Source, folder: Path, settings: dict) -> None:
    """config.json, tokenizer and what else belongs to the model."""
    source.companions(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config.pop("torch_dtype", None)
    config["dtype"] = str(source.dtype).removeprefix("torch.")
    config["quantization_config"] = settings
    write_text(path, json.dumps(config, indent=2, sort_keys=True) + "\n")


def _compare(source: Source, folder: Path, layers: dict[str, Layer]) -> dict[str, Layer]:
    """Read every weight back from disk and compare it by value with what was meant."""
    written, out = open_source(folder), {}
    for name, layer in layers.items():
        got = written.read_qtensor(name).dequantize()
        if not torch.isfinite(got).all():
            raise InputError(f"{name} reads back with NaN or Inf; nothing was published, please report this")
        if layer.why:
            out[name] = layer
            continue
        want = source.read_qtensor(name).dequantize()
        change = float((got - want).norm() / want.norm().clamp(min=1e-30))
        if not change <= STEPS_ONLY:
            raise InputError(
                f"{name} does not read back as it was ({change:.2g} of its norm); nothing was published, "
                "please report this"
            )
        out[name] = replace(layer, change=change)
    return out
