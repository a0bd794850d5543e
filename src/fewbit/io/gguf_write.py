"""A model as one GGUF file that llama.cpp and its relatives run: weights as they are, metadata, tokenizer.

    from fewbit.io.gguf_write import write
    write(open_source("OUT"), "out.gguf")

Quantized weights go over code for code into the ggml type that holds their format exactly
(``fewbit.io.gguf_codes``), or the model is refused with the reason. Matrices that are kept in float stay in
their dtype, vectors become float32, as llama.cpp wants them. The rows of q and k of architecture llama are
put in the order of llama.cpp's rotary kernel. Tensors go to the file one by one, so memory is one tensor; the
file stands under another name until it is complete.

Container: ``fewbit.io.gguf_file``. Names of tensors: ``fewbit.io.gguf``. Metadata: ``fewbit.io.gguf_meta``
and ``fewbit.io.gguf_vocab``.

Road not taken: to let llama.cpp's converter write float16 and its ``llama-quantize`` round that. Both round
again; what a solver chose would be lost.
"""

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fewbit.errors import InputError, WriteError
from fewbit.format import Format
from fewbit.io.base import Source, check_finite
from fewbit.io.gguf_codes import FORMAT_OF, encode, floats, holds, settled
from fewbit.io.gguf_meta import ARCHITECTURES, model_metadata, rope_factors
from fewbit.io.gguf_names import gguf_name, is_router
from fewbit.io.gguf_vocab import tokenizer_metadata
from fewbit.io.kv import LEFT_BEHIND
from fewbit.io.skeleton import build_skeleton, parameter_map

__all__ = ["Written", "check", "holds", "write"]

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# general.file_type, which readers show to people: by the type of most weights
FILE_TYPES = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10, "Q3_K": 12,
    "Q4_K": 14, "Q5_K": 16, "Q6_K": 18, "BF16": 32, "MXFP4": 38,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Written:
    """What went into a file: ggml type by the model's tensor name; which of them were rounded; stored tensors
    that the model does not use and the file does not hold; what the source says and a GGUF cannot; bytes.
    """

    kinds: dict[str, str]
    rounded: tuple[str, ...]
    left_out: tuple[str, ...]
    caveats: tuple[str, ...]
    nbytes: int

    def __str__(self) -> str:
        counts = Counter(self.kinds.values()).most_common()
        return ", ".join(f"{count} tensors {kind}" for kind, count in counts)


def check(source: Source) -> None:
    """Raise ``InputError`` with the reason when ``write`` would refuse ``source``, as far as headers tell."""
    _check(source, _names(source)[0])


def write(source: Source, path: str | Path, *, embeddings: str | None = None) -> Written:
    """Write ``source``, quantized or not, as the GGUF file ``path``.

    embeddings: the ggml type ("q8_0", ...) to round embedding and head to where they are float; None keeps
    them as they are. Raises ``InputError`` for what a GGUF cannot hold as it is and ``WriteError`` where the
    file cannot be written; nothing is left behind then.
    """
    from gguf import GGMLQuantizationType, GGUFWriter

    path, ends = Path(path), _ends(embeddings)
    mapping, unused = _names(source)
    _check(source, mapping)
    vocabulary = tokenizer_metadata(
        source.tokenizer(), source.tensors()[mapping[EMBEDDING]].shape[0], source.name
    )
    jobs = [_Job(source=source, name=name, stored=stored, ends=ends) for name, stored in mapping.items()]
    kinds = {job.name: job.kind() for job in jobs}
    tensors = _tensors(jobs, kinds)
    weights = Counter()
    for job in jobs:
        weights[kinds[job.name]] += int(np.prod(job.shape))
    config = source.config()
    metadata = model_metadata(config, source.name) | vocabulary
    metadata |= {
        "general.file_type": FILE_TYPES[max(weights, key=weights.get)],
        "general.quantization_version": 2,
    }

    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    writer = GGUFWriter(temporary, metadata.pop("general.architecture"))
    for key, value in metadata.items():
        _add(writer, key, value)
    factors = rope_factors(config)
    for name, parts in tensors.items():
        kind, many = GGMLQuantizationType[kinds[parts[0].name]], (len(parts),) * (parts[0].expert is not None)
        shape = (*many, *_in_bytes(parts[0].shape, kind))
        writer.add_tensor_info(name, shape, np.dtype(np.uint8), int(np.prod(shape)), kind)
    for name, table in factors.items():
        writer.add_tensor_info(name, table.shape, table.dtype, table.nbytes)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for parts in tensors.values():
            encoded = [job.encode()[1] for job in parts]
            writer.write_tensor_data(encoded[0] if len(encoded) == 1 else np.concatenate(encoded))
        for table in factors.values():
            writer.write_tensor_data(table)
        writer.flush()
        os.fsync(writer.fout[0].fileno())
        writer.close()
        temporary.replace(path)
    except OSError as error:
        raise WriteError(
            f"{path} cannot be written ({error.strerror}); free disk space or choose another place"
        ) from error
    finally:
        if writer.fout:
            writer.close()
        temporary.unlink(missing_ok=True)
    rounded = tuple(job.name for job in jobs if job.rounds)
    mind = () if getattr(source, "kv", None) is None else (LEFT_BEHIND,)
    return Written(kinds=kinds, rounded=rounded, left_out=unused, caveats=mind, nbytes=path.stat().st_size)


@dataclass(frozen=True, kw_only=True)
class _Job:
    """One tensor on its way: its name in the model and in the source, and what float ends are rounded to."""

    source: Source
    name: str
    stored: str
    ends: Format | None

    @property
    def entry(self):
        """The quantized module's entry, or None."""
        entries = getattr(self.source, "entries", {})
        return entries.get(self.stored.removesuffix(".weight")) if self.stored.endswith(".weight") else None

    @property
    def expert(self) -> int | None:
        """Which expert's part of a fused tensor it is."""
        return gguf_name(self.name)[1]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.tensors()[self.stored].shape

    @property
    def rounds(self) -> bool:
        """True for a float embedding or head that the caller wants rounded."""
        return self.ends is not None and self.entry is None and self.name in (EMBEDDING, HEAD)

    def kind(self) -> str:
        """The ggml type, without the tensor's numbers where they do not matter."""
        if len(self.shape) == 1 or is_router(self.name):
            return "F32"
        known = None
        if self.entry is not None or self.rounds:
            known = settled(self.entry.format if self.entry is not None else self.ends)
        return self.encode()[0] if known is None else known

    def encode(self) -> tuple[str, np.ndarray]:
        """The ggml type and the bytes, rows in llama.cpp's order."""
        if self.entry is not None:
            kind, raw = encode(self.source.read_qtensor(self.stored.removesuffix(".weight")), self.stored)
        else:
            (w,) = self.source.read([self.stored]).values()
            check_finite(self.stored, w)
            if w.ndim == 1 or is_router(self.name):
                kind, raw = floats(w.float())
            elif self.rounds:
                kind, raw = encode(self.ends.quantize(w), self.stored)
            else:
                kind, raw = floats(w, self.stored)
        heads = self._interleaved()
        if heads:
            rows = raw.reshape(self.shape[0], -1)
            # of each head the rows 0, d/2, 1, d/2 + 1 ...: the two members of a rotation side by side
            raw = rows.reshape(heads, 2, -1, rows.shape[1]).swapaxes(1, 2).reshape(raw.shape)
        return kind, np.ascontiguousarray(raw)

    def _interleaved(self) -> int:
        """How many heads' rows change their order: of q and k in architecture llama, else 0."""
        config = self.source.config()
        if ARCHITECTURES[config.model_type] != "llama":
            return 0
        counts = {".q_proj.": config.num_attention_heads, ".k_proj.": config.num_key_value_heads}
        return next((count for part, count in counts.items() if part in self.name), 0)


def _names(source: Source) -> tuple[dict[str, str], tuple[str, ...]]:
    """Parameter of the model -> stored tensor, a tied head left out; and what the model does not use."""
    model_metadata(source.config(), source.name)  # refuses other architectures before a model is built
    model = build_skeleton(source)
    mapping, unused = parameter_map(source, model)
    if mapping.get(HEAD) == mapping[EMBEDDING]:
        del mapping[HEAD]
    return mapping, unused


def _check(source: Source, mapping: dict[str, str]) -> None:
    llama = ARCHITECTURES[source.config().model_type] == "llama"
    for name in mapping:
        gguf_name(name)
        if (
            not llama
            and name.endswith(".bias")
            and not name.endswith(("q_proj.bias", "k_proj.bias", "v_proj.bias"))
        ):
            raise InputError(
                f"{source.name} has a bias {name}, for which llama.cpp's {source.config().model_type} has no "
                "place; use a recipe that adds none, or export to another format"
            )
    if getattr(source, "sites", ()):
        raise InputError(
            f"{source.name} quantizes sums and outputs of layers, and a GGUF holds weights alone"
        )
    for module, entry in getattr(source, "entries", {}).items():
        reason = _refused(entry) or holds(entry.format)
        if reason is not None:
            raise InputError(f"{module} cannot go into a GGUF as it is: {reason}")


def _refused(entry) -> str | None:
    """Why a GGUF cannot say what goes with a quantized weight, or None."""
    for part, what in (
        ("activation", "its input is quantized too, and llama.cpp rounds inputs in its own way"),
        ("online", "its input goes through a map at run time"),
        ("output", "its output goes through a map at run time"),
        ("apart", "some of its columns are kept apart in float"),
        ("ordered", "its columns were sorted before their groups were cut"),
        ("transposed", "it is stored transposed"),
    ):
        if getattr(entry, part, None):
            return what
    return None


def _tensors(jobs: list[_Job], kinds: dict[str, str]) -> dict[str, list[_Job]]:
    """Name of each tensor of the file -> what it holds: one job, or those of all experts in their order."""
    tensors: dict[str, list[_Job]] = {}
    for job in jobs:
        tensors.setdefault(gguf_name(job.name)[0], []).append(job)
    for name, parts in tensors.items():
        parts.sort(key=lambda job: job.expert or 0)
        other = next((job for job in parts if kinds[job.name] != kinds[parts[0].name]), None)
        if other is not None:
            raise InputError(
                f"{parts[0].name} goes into type {kinds[parts[0].name]} and {other.name} into "
                f"{kinds[other.name]}, and a GGUF holds all experts of a block in one tensor ({name}); give "
                "them one format, symmetric or one of ggml's (format=q4_1)"
            )
    return tensors


def _ends(name: str | None) -> Format | None:
    if name is None:
        return None
    found = FORMAT_OF.get(name.upper())
    if found is None:
        known = ", ".join(kind.lower() for kind in FORMAT_OF)
        raise InputError(f"there is no ggml type {name!r} to round embeddings to; choose one of {known}")
    return found


def _in_bytes(shape: tuple[int, ...], kind) -> tuple[int, ...]:
    from gguf import GGML_QUANT_SIZES

    block, size = GGML_QUANT_SIZES[kind]
    return (*shape[:-1], shape[-1] // block * size)


def _add(writer, key: str, value) -> None:
    """One metadata entry, in the type that readers expect for it."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)
