"""GGUF files as a source, under the names that Hugging Face checkpoints use.

``read`` dequantizes to float32, every type that ``gguf.quants`` decodes. ``read_qtensor`` gives the codes and
steps as the file has them, for the types that a Format can say (``fewbit.io.gguf_codes``). Files of
architecture llama hold the rows of the q and k projections interleaved, for llama.cpp's rotary kernel;
``unpermute`` puts them back. Experts, fused in the file, are matrices of their own here, each a stretch of
the fused tensor (``fewbit.io.gguf_names``). The configuration and the tokenizer come from the metadata.

Road not taken: transformers' own GGUF loader, over 30 s for a model of 135 million weights (here 3 s), all of
which are in memory together.
"""

import math
from collections.abc import Iterable
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from fewbit.errors import InputError
from fewbit.format.format import Format
from fewbit.format.qtensor import QTensor, value_of
from fewbit.io.base import Source, TensorInfo, check_finite, content_hash, first_line
from fewbit.io.gguf_codes import FORMAT_OF, decode
from fewbit.io.gguf_config import experts_of, read_config
from fewbit.io.gguf_file import Stored, read_container
from fewbit.io.gguf_names import ARCHITECTURES, checkpoint_names
from fewbit.io.native import Entry

ROPE_FACTORS = "rope_freqs.weight"  # Llama 3.1's long-context table, not a parameter of the model


def unpermute(w: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama.cpp's row order of a q or k projection.

    ``w`` is ``[heads * head_dim, ...]``. The file holds each head's rows as (0, d/2, 1, d/2 + 1, ...), which
    pairs the two members of a rotation; Hugging Face keeps the two halves apart.
    """
    half = w.shape[0] // heads // 2
    return w.reshape(heads, half, 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


class GgufSource(Source):
    """A GGUF file. Tensors carry Hugging Face names and ``read`` gives them dequantized, float32."""

    def __init__(self, path: Path, name: str):
        """Read the header. Raises ``InputError`` for an architecture or tensor that is not supported."""
        self.name = name
        self.path = path
        self.container = read_container(path)
        self.architecture = str(self.container.metadata.get("general.architecture", "none"))
        if self.architecture not in ARCHITECTURES:
            raise InputError(
                f"{name} is a GGUF of architecture {self.architecture!r:.60}; supported are "
                f"{', '.join(ARCHITECTURES)}; give the safetensors checkpoint of this model instead."
            )
        experts = experts_of(self.container.metadata)
        self._stored: dict[str, Stored] = {}
        for gguf_name, stored in self.container.tensors.items():
            if gguf_name != ROPE_FACTORS:
                self._stored |= checkpoint_names(gguf_name, stored, self.architecture, experts, name)

    def config(self):
        """See :class:`Source`."""
        return self._config

    @cached_property
    def _config(self):
        factors = self.container.tensors.get(ROPE_FACTORS)
        shapes = {name: stored.shape for name, stored in self._stored.items()}
        with self._believed("configuration"):
            table = None if factors is None else self._decode(factors)
            return read_config(self.container.metadata, shapes, table, self.name)

    @contextmanager
    def _believed(self, part: str):
        """What other libraries say of metadata that they cannot work with, in words of ours."""
        try:
            yield
        except InputError:
            raise
        except Exception as error:
            raise InputError(
                f"{self.name} has metadata from which no {part} can be built ({first_line(error)}); the file "
                "is damaged, get it again."
            ) from error

    def tokenizer(self):
        """See :class:`Source`. Built from the file's own tokens and merges."""
        from fewbit.io.gguf_tokenizer import build_tokenizer

        with self._believed("tokenizer"):
            return build_tokenizer(self.container.metadata, self.name)

    def tensors(self) -> dict[str, TensorInfo]:
        """See :class:`Source`. Sizes are those of the float32 tensors that ``read`` returns."""
        return {
            name: TensorInfo(shape=s.shape, dtype=torch.float32, nbytes=4 * torch.Size(s.shape).numel())
            for name, s in self._stored.items()
        }

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """See :class:`Source`. Everything is dequantized to float32."""
        result = {}
        for name in names:
            w = self._in_order(name, self._decode(self._stored[name]))
            result[name] = torch.from_numpy(np.ascontiguousarray(w))
        return result

    @cached_property
    def entries(self) -> dict[str, Entry]:
        """Format and shape of every weight whose codes can be read, by the module's name."""
        return {
            name.removesuffix(".weight"): Entry(format=FORMAT_OF[kind], shape=stored.shape)
            for name, stored in self._stored.items()
            if (kind := _kind(stored)) in FORMAT_OF and len(stored.shape) == 2
        }

    @property
    def formats(self) -> dict[str, Format]:
        """Format of every weight whose codes can be read, by the module's name."""
        return {module: entry.format for module, entry in self.entries.items()}

    @property
    def bits_per_weight(self) -> float:
        """Mean stored bits of all matrices."""
        stored = [s for s in self._stored.values() if len(s.shape) > 1]
        return 8 * sum(s.nbytes for s in stored) / max(1, sum(math.prod(s.shape) for s in stored))

    def read_qtensor(self, module: str) -> QTensor:
        """The weight [out, in] of ``module`` code for code. KeyError where ``entries`` does not list it.

        Raises ``InputError`` for steps that are NaN or infinite.
        """
        if module not in self.entries:
            raise KeyError(module)
        name = f"{module}.weight"
        stored = self._stored[name]
        rows = self._in_order(name, self._bytes(stored).reshape(stored.shape[0], -1))
        q = decode(_kind(stored), rows, stored.shape)
        for part in (q.scale, q.zero):
            if part is not None:
                check_finite(name, value_of(part))
        return q

    def _in_order(self, name: str, w: np.ndarray) -> np.ndarray:
        """Rows of values or of bytes as Hugging Face has them."""
        if self.architecture != "llama" or not (".q_proj." in name or ".k_proj." in name):
            return w
        config = self.config()
        heads = config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads
        if heads < 1 or w.shape[0] % (2 * heads):
            raise InputError(
                f"{self.name} says that {name} has {heads} heads, which do not divide its {w.shape[0]} rows; "
                "the file is damaged, get it again."
            )
        return unpermute(w, heads)

    def _bytes(self, stored: Stored) -> np.ndarray:
        return np.fromfile(self.path, dtype=np.uint8, count=stored.nbytes, offset=stored.offset)

    def _decode(self, stored: Stored) -> np.ndarray:
        """The tensor's float32 values, ``[*stored.shape]``, as owned memory."""
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        raw = self._bytes(stored)
        if stored.kind == GGMLQuantizationType.F32:
            return raw.view(np.float32).reshape(stored.shape)
        if stored.kind == GGMLQuantizationType.F16:
            return raw.view(np.float16).astype(np.float32).reshape(stored.shape)
        rows = raw.reshape(*stored.shape[:-1], -1)
        try:
            return dequantize(rows, GGMLQuantizationType(stored.kind)).reshape(stored.shape)
        except NotImplementedError as error:
            kind = _kind(stored)
            raise InputError(
                f"{self.name} holds tensors of type {kind}, which the package gguf does not decode; give "
                "another file of this model"
            ) from error

    @property
    def dtype(self) -> torch.dtype:
        """bfloat16: the file's own float tensors are few, and what they came from was bfloat16 or wider."""
        return torch.bfloat16

    def companions(self, folder: Path) -> list[str]:
        """See :class:`Source`. All files are made from the metadata."""
        from transformers import GenerationConfig

        config = self.config()
        (folder / "config.json").write_text(config.to_json_string(use_diff=True), encoding="utf-8")
        ids = {role: getattr(config, role) for role in ("bos_token_id", "eos_token_id", "pad_token_id")}
        GenerationConfig(**ids).save_pretrained(folder)
        saved = self.tokenizer().save_pretrained(folder)
        names = {Path(file).name for file in saved if file and Path(file).is_file()}
        return ["config.json", "generation_config.json", *sorted(names)]

    def fingerprint(self) -> str:
        """See :class:`Source`."""
        return content_hash([(self.path.name, self.path, self.container.header)])


def _kind(stored: Stored) -> str:
    """The name of a tensor's ggml type."""
    from gguf import GGMLQuantizationType

    return GGMLQuantizationType(stored.kind).name
