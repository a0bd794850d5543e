"""What a model weighs on disk: bytes of its weight files, and stored bits per weight."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fewbit.io.source import Source


def size_bytes(source: Source) -> int:
    """Bytes of the files that hold the weights of ``source``."""
    files = getattr(source, "files", None) or [source.path]
    return sum(file.stat().st_size for file in files)


def parameters(source: Source) -> int:
    """Elements of all tensors of ``source``, as they were before quantization."""
    return sum(math.prod(info.shape) for info in source.tensors().values())


def bits_per_weight(source: Source) -> float:
    """Mean stored bits of a weight.

    Of a quantized checkpoint over its quantized weights, scales and zeros counted; of a plain model or GGUF
    file over all its matrices, as they are stored.
    """
    if hasattr(source, "formats"):
        return source.bits_per_weight
    container = getattr(
        source, "container", None
    )  # of a GGUF file, whose tensors() speaks of what read() returns
    infos = (source.tensors() if container is None else container.tensors).values()
    matrices = [info for info in infos if len(info.shape) >= 2]
    elements = sum(math.prod(info.shape) for info in matrices)
    return 8 * sum(info.nbytes for info in matrices) / max(elements, 1)
