"""A checkpoint's tensors, written shard by shard: memory holds one shard.

Each shard is written under a temporary name, synced and renamed (``save_tensors``). How many there are is
known at the end: then they take the names that readers expect, and more than one get an index.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from torch import Tensor

from fewbit.errors import InputError
from fewbit.io.checkpoint import save_tensors
from fewbit.stream.job import write_text

UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def size_of(text: str) -> int:
    """Bytes of "5GB", "200MB", "1.5GiB". Raises ``InputError`` for anything else, and below 1 MB."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text.lower())
    unit = UNITS.get("" if found is None else found[2])
    nbytes = 0 if found is None or unit is None else int(float(found[1]) * unit)
    if nbytes < 10**6:
        raise InputError(f"shard size {text!r} is no size of 1MB or more; give one such as 5GB or 500MB")
    return nbytes


class Shards:
    """Files of at most ``limit`` bytes in ``folder``; a larger tensor is a shard of its own."""

    def __init__(self, folder: Path, limit: int):
        self.folder, self.limit = folder, limit
        self._waiting: dict[str, Tensor] = {}
        self._written: list[list[str]] = []
        self._size = self.total = 0

    def add(self, tensors: dict[str, Tensor]) -> None:
        """Tensors that belong together: they are never divided."""
        nbytes = sum(t.nbytes for t in tensors.values())
        if self._waiting and self._size + nbytes > self.limit:
            self._flush()
        self._waiting |= tensors
        self._size += nbytes
        self.total += nbytes

    def _flush(self) -> None:
        save_tensors(self._part(len(self._written)), self._waiting)
        self._written.append(list(self._waiting))
        self._waiting, self._size = {}, 0

    def _part(self, i: int) -> Path:
        return self.folder / f"part-{i:05d}.safetensors"

    def finish(self) -> int:
        """Write what waits, give all their names, and the index where there are several; how many."""
        if self._waiting:
            self._flush()
        n = len(self._written)
        names = [f"model-{i + 1:05d}-of-{n:05d}.safetensors" for i in range(n)]
        names = names if n > 1 else ["model.safetensors"]
        for i, name in enumerate(names):
            self._part(i).rename(self.folder / name)
        if n > 1:
            index = {t: name for name, held in zip(names, self._written, strict=True) for t in held}
            text = {"metadata": {"total_size": self.total}, "weight_map": index}
            write_text(
                self.folder / "model.safetensors.index.json", json.dumps(text, indent=2, sort_keys=True)
            )
        return n
