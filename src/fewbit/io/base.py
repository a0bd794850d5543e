"""What a model at rest has to answer, whatever it is stored in: the abstract ``Source``."""

import ctypes
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from fewbit.errors import InputError

DTYPES = {  # as safetensors names them
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """What a header says of one tensor, in the form in which ``Source.read`` returns it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    nbytes: int


@dataclass(frozen=True, kw_only=True)
class Cut:
    """A part of a stored tensor under a name of its own: ``take`` of entry ``index`` on its first axis."""

    stored: str
    index: int
    take: Callable[[torch.Tensor], torch.Tensor]


class Source(ABC):
    """A model at rest. ``name`` is what the user typed; tensor names are those of the checkpoint."""

    name: str

    @abstractmethod
    def config(self):
        """The transformers ``PretrainedConfig`` (one object, built once: copy it before changing it)."""

    @abstractmethod
    def tokenizer(self):
        """The fast tokenizer. Raises ``InputError`` when the model comes without one."""

    @abstractmethod
    def tensors(self) -> dict[str, TensorInfo]:
        """Stored name -> shape, dtype, bytes. Reads headers only."""

    @abstractmethod
    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """The named tensors in owned CPU memory, dtypes as ``tensors()`` says. KeyError on unknown names."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """The dtype of tensors that an output checkpoint keeps unquantized."""

    def kept_dtype(self, name: str) -> torch.dtype:
        """The dtype in which an output checkpoint keeps the floating tensor ``name`` unquantized."""
        return self.dtype

    def present(self, cuts: Mapping[str, Cut]) -> None:
        """From here on show these parts of stored tensors, by their names, instead of the tensors."""
        whole = next(iter(cuts.values())).stored
        raise InputError(
            f"{self.name} stores all experts as one tensor ({whole}), which is cut in safetensors only; give "
            "the model as a folder of safetensors"
        )

    @abstractmethod
    def companions(self, folder: Path) -> list[str]:
        """Write config.json (no ``quantization_config``), generation config, tokenizer and chat template.

        Returns the names of the files written. Licence and README stay behind: they speak of the original.
        """

    @abstractmethod
    def fingerprint(self) -> str:
        """Hex SHA-256 over file names, sizes, headers and a sample of the content. No dates, no folders."""

    def release(self) -> None:
        """Give memory that ``read`` no longer needs back to the system; call it once per block.

        No file stays mapped after a ``read``. What remains is memory that was freed and that glibc keeps; in
        aligned pieces of many sizes it grows from block to block, up to the size of the file.
        """
        _trim_heap()


@cache
def _malloc_trim():
    """glibc's ``malloc_trim``, or None where the C library has none."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # musl and macOS lack the function, Windows the CDLL(None)
        return None


def _trim_heap() -> None:
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


def check_finite(name: str, tensor: torch.Tensor) -> None:
    """Raise ``InputError`` with the name and the count when ``tensor`` holds NaN or infinite values."""
    if not tensor.is_floating_point():
        return
    if torch.isfinite(tensor.sum(dtype=torch.float32)):  # the sum tells at a fifth of the price
        return
    bad = tensor.numel() - int(torch.isfinite(tensor.float()).sum())
    if bad:
        raise InputError(
            f"Tensor {name} holds {bad} values out of {tensor.numel()} that are NaN or infinite; "
            "the checkpoint is damaged, get it again."
        )


def content_hash(parts: Iterable[tuple[str, Path, int]]) -> str:
    """SHA-256 over (name, path, header bytes) of files: name, size, header, and 16 samples of 4 KiB."""
    digest = hashlib.sha256()
    for name, path, header in parts:
        size = path.stat().st_size
        digest.update(f"{name}\0{size}\0".encode())
        with path.open("rb") as file:
            digest.update(file.read(header))
            for i in range(16):
                file.seek(header + (size - header) * i // 16)
                digest.update(file.read(4096))
    return digest.hexdigest()


def first_line(error: Exception) -> str:
    """What another library said, as part of a sentence of ours."""
    said = next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")
    return said if len(said) <= 160 else f"{said[:160]}..."
