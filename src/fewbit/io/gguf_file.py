"""The container of GGUF files: metadata and the places of the tensors, read without the tensors.

The layout (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md), little-endian::

    "GGUF"  version  n_tensors  n_metadata  metadata...  tensor infos...  padding  data

Metadata are typed key-value pairs; a tensor info is a name, its dimensions (innermost first), a type and an
offset. The header is walked once with ``struct`` over a mapping that is closed again. Nothing in it is
believed: every length is held against the file's before it is used.

Road not taken: ``gguf.GGUFReader`` makes several array objects per vocabulary entry (2.3 s for 49,152 tokens,
where this takes 0.1 s) and keeps the file mapped.
"""

import math
import mmap
import struct
from array import array
from dataclasses import dataclass
from pathlib import Path

from fewbit.errors import InputError
from fewbit.io.files import check_name

# Metadata type id -> struct letter, for the types that are one number.
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
MOST_DIMENSIONS = 4  # of ggml


@dataclass(frozen=True, kw_only=True)
class Stored:
    """One tensor in the file: shape as in torch (outermost first), ggml type, place and size in bytes."""

    shape: tuple[int, ...]
    kind: int
    offset: int
    nbytes: int


@dataclass(frozen=True, kw_only=True)
class Container:
    """A GGUF file's header: metadata, tensors by their GGUF name, and its own length in bytes."""

    metadata: dict
    tensors: dict[str, Stored]
    header: int


def read_container(path: Path) -> Container:
    """Parse the header of a GGUF file. Raises ``InputError`` for another kind of file or a damaged one."""
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise InputError(f"{path} is not a GGUF file (it does not begin with GGUF); give another model.")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
            try:
                return _Header(view).parse(path)
            except (struct.error, UnicodeDecodeError, OverflowError, MemoryError, RecursionError) as error:
                raise InputError(
                    f"The header of {path} is cut short or damaged; get the file again."
                ) from error


class _Header:
    """A cursor over the mapped file."""

    def __init__(self, view: mmap.mmap):
        self.view = view
        self.at = 4

    def parse(self, path: Path) -> Container:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        version = self.take("I")
        if version not in (2, 3):
            raise InputError(
                f"{path} is GGUF version {version}; versions 2 and 3 are supported, convert it again."
            )
        n_tensors, n_metadata = self.take("Q"), self.take("Q")
        metadata = {}
        for _ in range(n_metadata):
            key = self.string()
            metadata[key] = self.value(self.take("I"))
        found = []
        for _ in range(n_tensors):
            name = self.string()
            dimensions = self.take("I")
            if not 1 <= dimensions <= MOST_DIMENSIONS:
                raise struct.error(f"{dimensions} dimensions")
            shape = tuple(reversed([self.take("Q") for _ in range(dimensions)]))
            found.append((name, shape, self.take("I"), self.take("Q")))
        align = metadata.get("general.alignment", 32)
        if not isinstance(align, int) or align < 1 or len({name for name, *_ in found}) < n_tensors:
            raise struct.error("alignment or names")
        start = -(-self.at // align) * align
        tensors = {}
        for name, shape, kind, offset in found:
            check_name(name, path)
            if kind not in iter(GGMLQuantizationType):
                raise InputError(
                    f"Tensor {name} in {path} has the unknown type {kind}; update the package gguf."
                )
            block, size = GGML_QUANT_SIZES[kind]
            nbytes = math.prod(shape) // block * size
            if shape[-1] % block or 0 in shape:
                raise InputError(
                    f"Tensor {name} in {path} has shape {list(shape)}, which blocks of {block} do not tile; "
                    "the file is damaged, get it again."
                )
            if start + offset + nbytes > len(self.view):
                raise InputError(
                    f"{path} ends before its tensor {name} does; it was cut short, get the file again."
                )
            tensors[name] = Stored(shape=shape, kind=kind, offset=start + offset, nbytes=nbytes)
        return Container(metadata=metadata, tensors=tensors, header=self.at)

    def take(self, letter: str):
        """One number of the given struct type."""
        (number,) = struct.unpack_from("<" + letter, self.view, self.at)
        self.at += struct.calcsize("<" + letter)
        return number

    def string(self) -> str:
        length = self.take("Q")
        self.at += length
        if self.at > len(self.view):
            raise struct.error("string beyond the end")
        return self.view[self.at - length : self.at].decode("utf-8")

    def value(self, kind: int):
        """A metadata value of type ``kind``; arrays of strings become lists, of numbers ``array``."""
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            kind, count = self.take("I"), self.take("Q")
            if kind == ARRAY:
                raise struct.error("arrays of arrays, which no key has and which take more memory than bytes")
            if kind == STRING:
                return [self.value(kind) for _ in range(count)]
            letter = self._letter(kind).replace("?", "B")
            start, self.at = self.at, self.at + count * struct.calcsize("<" + letter)
            if self.at > len(self.view):
                raise struct.error("array beyond the end")
            return array(letter, self.view[start : self.at])
        return self.take(self._letter(kind))

    def _letter(self, kind: int) -> str:
        if kind not in SCALARS:
            raise struct.error(f"metadata type {kind}")
        return SCALARS[kind]
