"""A quantized checkpoint as a Source, and the safe way to write its shards.

``Checkpoint`` presents the original names: ``tensors()`` lists ``X.weight`` with the shape it had before, and
``read`` dequantizes it. Whatever consumes a Source (evaluation, verification, quantizing once more) so
consumes a checkpoint, and what wants the codes asks ``read_qtensor``. Layouts are told apart by
``quant_method`` in config.json (``CODECS``): fewbit's own, compressed-tensors, GPTQ, AWQ, bitsandbytes and
FP8. A codec is a module, or a frozen object, with the functions

    entries(config, infos, read)    Entry of each quantized module, from configuration, headers, small tensors
    names(module, *entry.stored)    which tensors hold it; ``optional``: those that may be there, too
    from_dict, to_dict              between these tensors and a QTensor (or Split-, OrderedTensor)
    quantization_config(...)        what config.json says;  holds(format, ...): why a weight cannot be held
    input_names                     its names of static steps where they are not those of ``fewbit.io.inputs``
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from fewbit.errors import InputError, WriteError
from fewbit.format.format import Format, Params
from fewbit.format.qtensor import QTensor, value_of
from fewbit.format.split import SplitTensor
from fewbit.io import awq, bitsandbytes, compressed_tensors, fp8, gptq, inputs, kv, native
from fewbit.io.base import first_line
from fewbit.io.entry import Entry
from fewbit.io.files import check_name, read_json
from fewbit.io.ordered import OrderedTensor
from fewbit.io.sites import SiteEntry
from fewbit.io.source import SafetensorsSource, TensorInfo
from fewbit.nn.kvcache import KVFormat
from fewbit.nn.sites import Quantizer

# What a configuration of other types than those that are expected raises.
BROKEN = (KeyError, TypeError, AttributeError, ValueError, IndexError, OverflowError, re.error)
CODECS = {
    native.QUANT_METHOD: native,
    compressed_tensors.QUANT_METHOD: compressed_tensors,
    "gptq": gptq,
    "awq": awq,
    "bitsandbytes": bitsandbytes,
    "fp8": fp8,
}


def codec_of(config: Mapping, name: str):
    """What reads the layout that a ``quantization_config`` names; ``name`` of the model, for the error."""
    method = config.get("quant_method")
    if not isinstance(method, str) or method not in CODECS:
        raise InputError(
            f"{name} is quantized with {method!r:.60}, which is not read; give the unquantized model, or a "
            f"checkpoint of {', '.join(CODECS)}"
        )
    return gptq.of_config(config) if method == "gptq" else CODECS[method]


def open_folder(folder: Path, name: str) -> SafetensorsSource:
    """The source of a folder: a ``Checkpoint`` where config.json says it is quantized, else the plain one.

    Raises ``InputError`` for a quantization method that is not read.
    """
    return Checkpoint(folder, name) if _quantization_config(folder) else SafetensorsSource(folder, name)


def _quantization_config(folder: Path) -> dict:
    path = folder / "config.json"
    found = (read_json(path).get("quantization_config") if path.is_file() else None) or {}
    if not isinstance(found, dict):
        raise InputError(
            f"the quantization_config of {folder} is {found!r:.60} and no object; get the checkpoint again"
        )
    return found


class Checkpoint(SafetensorsSource):
    """A folder whose config.json has a ``quantization_config`` that a codec reads.

    Names are those of the checkpoint: a module X is quantized when ``X`` is in ``formats``.
    """

    def __init__(self, folder: Path, name: str):
        """Reads headers and shapes only. Raises ``InputError`` for an unknown layout or a missing tensor."""
        super().__init__(folder, name)
        self.quantization_config = _quantization_config(folder)
        self._codec = codec_of(self.quantization_config, name)
        try:
            self.entries: dict[str, Entry] = self._codec.entries(
                self.quantization_config, self._infos, super().read
            )
            kv_format = getattr(self._codec, "kv_format", None)
            self.kv: KVFormat | None = kv_format(self.quantization_config) if kv_format else None
        except InputError:
            raise
        except (
            KeyError,
            TypeError,
            AttributeError,
            ValueError,
            IndexError,
            OverflowError,
            re.error,
        ) as error:
            raise InputError(
                f"the quantization_config of {name} is broken ({type(error).__name__}: {first_line(error)}); "
                f"it is no {self.quantization_config['quant_method']} configuration, get the checkpoint again"
            ) from error
        for module in self.entries:
            check_name(module, name)
        self.sites: tuple[SiteEntry, ...] = ()
        if self._codec is native:
            self.sites = native.sites_from_config(self.quantization_config)
        self._parts = {module: self._stored_names(module, entry) for module, entry in self.entries.items()}
        beside = getattr(self._codec, "beside", None)
        self._beside = beside(self.quantization_config, self._infos) if beside else []
        self._parts |= {s.name: self._all_there([f"{s.name}.{n}" for n in s.layout()]) for s in self.sites}

    @property
    def formats(self) -> dict[str, Format]:
        """Format of every quantized module, by the module's name in the checkpoint."""
        return {module: entry.format for module, entry in self.entries.items()}

    @property
    def bits_per_weight(self) -> float:
        """Mean stored bits of the quantized weights: codes, scales, zeros and steps of sites."""
        n = {module: math.prod(entry.shape) for module, entry in self.entries.items()}
        bits = sum(n[m] * e.bits_per_weight for m, e in self.entries.items())
        return (bits + 8 * sum(s.nbytes for s in self.sites)) / sum(n.values())

    def read_qtensor(self, module: str) -> QTensor | SplitTensor | OrderedTensor:
        """The quantized weight [out, in] of ``module``, on the CPU. KeyError where there is none.

        Raises ``InputError`` for steps or zeros that are NaN or infinite.
        """
        stored = super().read(self._parts[module])
        found = self._codec.from_dict(module, stored, *self.entries[module].stored)
        q = found if isinstance(found, QTensor) else found.rest
        for part, what in ((q.scale, "steps"), (q.zero, "zeros")):
            bad = 0 if part is None else int((~torch.isfinite(value_of(part).float())).sum())
            if bad:
                raise InputError(
                    f"{bad} {what} of {module} are NaN or infinite; the checkpoint is damaged, get it again"
                )
        return found

    def read_apart(self, module: str) -> Tensor | None:
        """Which columns of the weight of ``module`` are kept apart in float, [k] int64; None where none."""
        if self.entries[module].apart is None:
            return None
        name = f"{module}.apart_columns"
        return super().read([name])[name].long()

    def read_input(self, module: str) -> Params | None:
        """Static steps of the input of ``module``, on the CPU; None where it is dynamic or not quantized."""
        entry = self.entries[module]
        names = self._input_names(module, entry)
        read = super().read(names).items()
        stored = {names[n]: 1 / t.float() if n.endswith(compressed_tensors.GLOBAL) else t for n, t in read}
        return inputs.from_dict(module, stored, entry.activation, entry.shape[1])

    def read_kv(self) -> dict[str, kv.Pair]:
        """Fixed steps of keys and values by attention, float32 on the CPU; empty where ``kv`` is None."""
        if self.kv is None:
            return {}
        config = self.config().get_text_config(decoder=True)
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        return kv.read(self.kv, self._infos, super().read, heads)

    def read_site(self, entry: SiteEntry) -> Quantizer:
        """The quantizer of a site, on the CPU."""
        stored, parts = super().read(self._parts[entry.name]), {}
        for name, (shape, dtype) in entry.layout().items():
            part = parts[name] = stored[f"{entry.name}.{name}"]
            if tuple(part.shape) != shape or part.dtype != dtype:
                raise InputError(
                    f"tensor {entry.name}.{name} of {self.name} is {part.dtype} of shape {list(part.shape)}, "
                    f"expected {dtype} of shape {list(shape)}; configuration and file do not belong together"
                )
        return Quantizer(entry.activation, Params(**{"zero": None, **parts}) if parts else None)

    def config(self):
        """The model's configuration, without ``quantization_config``: as a source this is a plain model."""
        config = super().config()
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        return config

    def tensors(self) -> dict[str, TensorInfo]:
        """Original names. A quantized weight counts as the float32 that ``read`` makes of it."""
        hidden = {part for parts in self._parts.values() for part in parts} | set(self._beside)
        out = {name: info for name, info in super().tensors().items() if name not in hidden}
        for module, entry in self.entries.items():
            shape = entry.shape[::-1] if entry.transposed else entry.shape
            out[f"{module}.weight"] = TensorInfo(
                shape=shape, dtype=torch.float32, nbytes=4 * math.prod(shape)
            )
        return out

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The named tensors; quantized weights dequantized to float32 in their original layout."""
        names = list(names)
        coded = {
            name: name.removesuffix(".weight")
            for name in names
            if name.removesuffix(".weight") in self.entries
        }
        out = super().read(name for name in names if name not in coded)
        for name, module in coded.items():
            weight = self.read_qtensor(module).dequantize()
            out[name] = weight.T.contiguous() if self.entries[module].transposed else weight
        return out

    def _stored_names(self, module: str, entry: Entry) -> list[str]:
        more = {}
        if self._codec is compressed_tensors:
            more = {"activation": entry.activation, "packed": f"{module}.weight_packed" in self._infos}
        parts = self._codec.names(module, *entry.stored, **more)
        parts += self._input_names(module, entry)
        there = [f"{module}.{n}" for n in self._codec.optional]
        return self._all_there(parts) + [n for n in there if n in self._infos and n not in parts]

    def _input_names(self, module: str, entry: Entry) -> dict[str, str]:
        """Stored name -> fewbit's name of what is kept of a module's input."""
        other = self._codec.input_names
        if self._codec is compressed_tensors and entry.activation is not None and entry.activation.local:
            other = {"input_scale": compressed_tensors.GLOBAL}
        own = inputs.layout(entry.activation, entry.shape[1])
        return {f"{module}.{other.get(n, n)}": f"{module}.{n}" for n in own}

    def _all_there(self, parts: list[str]) -> list[str]:
        missing = [part for part in parts if part not in self._infos]
        if missing:
            raise InputError(
                f"{self.name} has no tensor {missing[0]}, which its configuration asks for; it is incomplete"
            )
        return parts


def save_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file at once or not at all: to a temporary name beside it, synced, then renamed.

    Raises ``InputError`` when it cannot be written (disk full, no permission); nothing is left behind.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()},
            temporary,
            {"format": "pt", **(metadata or {})},
        )
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise WriteError(
            f"{path} cannot be written ({reason}); free disk space or choose another output folder"
        ) from error


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable (POSIX asks for it; Windows has no such call)."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
