"""Damage to an index and its shards: names that leave the folder, links, pipes, what is missing."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from hostile.mutations import WEIGHTS, Mutation, safetensors, text

INDEX = f"{WEIGHTS}.index.json"


def _mapped(value: object, every: bool = False) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        names = list(index["weight_map"])
        for name in names if every else names[:1]:
            index["weight_map"][name] = value
        (folder / INDEX).write_text(json.dumps(index))

    return change


def _shard(folder: Path) -> Path:
    return sorted(folder.glob("model-*.safetensors"))[0]


def _linked(folder: Path, target: str | Path) -> None:
    path = _shard(folder)
    path.unlink()
    path.symlink_to(target)


def _fifo(folder: Path) -> None:
    path = _shard(folder)
    path.unlink()
    os.mkfifo(path)


def _outside(folder: Path) -> None:
    """A shard that is whole, behind a link out of the folder: what the hub's cache is made of."""
    path = _shard(folder)
    other = folder.parent / "elsewhere.safetensors"
    path.rename(other)
    path.symlink_to(other)


def shards() -> Iterator[Mutation]:
    """Damage to an index and its shards."""
    for value in (
        "../../etc/passwd",
        "../elsewhere.safetensors",
        "/etc/passwd",
        "",
        ".",
        "..",
        "a/b",
        "a\\b",
    ):
        yield Mutation(name=f"shard {value!r}", change=_mapped(value))
    for value in (5, None, ["x"], {}, "a\0b", "x" * 5000, "none.safetensors", "config.json", "a\nb"):
        yield Mutation(name=f"shard {value!r:.30}", change=_mapped(value))
    yield Mutation(name="every shard outside", change=_mapped("../../etc/passwd", every=True))
    for content in ("{", "[]", "7", "{}", '{"weight_map": []}', '{"weight_map": {}}', "[" * 100_000):
        yield Mutation(name=f"index {content:.20}", change=text(INDEX, content))
    yield Mutation(name="index no text", change=text(INDEX, b"\xff\xfe"))
    for name, change in {
        "shard missing": lambda folder: _shard(folder).unlink(),
        "shard a folder": lambda folder: (_shard(folder).unlink(), _shard2(folder).mkdir()),
        "shard links to passwd": lambda folder: _linked(folder, "/etc/passwd"),
        "shard links to zeros": lambda folder: _linked(folder, "/dev/zero"),
        "shard links to itself": lambda folder: _linked(folder, _shard(folder).name),
        "shard a pipe": _fifo,
        "shard behind a link": _outside,
        "shards swapped": _swap,
        "no index": lambda folder: (folder / INDEX).unlink(),
    }.items():
        yield Mutation(name=name, change=change)
    first = "model-00001-of-00002.safetensors"
    yield from safetensors(first)


def _shard2(folder: Path) -> Path:
    return folder / "model-00001-of-00002.safetensors"


def _swap(folder: Path) -> None:
    one, two = sorted(folder.glob("model-*.safetensors"))[:2]
    other = one.with_name("other")
    one.rename(other)
    two.rename(one)
    other.rename(two)
