"""Damage to a GGUF: its counts, lengths, types and places, and metadata that its tensors contradict."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

from hostile.mutations import HUGER, Mutation


def _string(words: str) -> bytes:
    return struct.pack("<Q", len(words)) + words.encode()


def _replaced(old: bytes, new: bytes) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        data = path.read_bytes()
        at = data.index(old)
        path.write_bytes(data[:at] + new + data[at + len(new) :])

    return change


def _poked(at: int, new: bytes) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        data = path.read_bytes()
        path.write_bytes(data[:at] + new + data[at + len(new) :])

    return change


def _info(name: str, at: int, new: bytes) -> Callable[[Path], None]:
    """Overwrite what a tensor info says ``at`` bytes after its name."""

    def change(path: Path) -> None:
        data = path.read_bytes()
        start = data.index(_string(name)) + len(_string(name)) + at
        path.write_bytes(data[:start] + new + data[start + len(new) :])

    return change


def _entry(key: str, new: bytes) -> Callable[[Path], None]:
    """Overwrite type and value of a metadata entry."""
    return _info(key, 0, new)


def _random(seed: int, count: int, span: int) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        rng, data = random.Random(seed), bytearray(path.read_bytes())
        for _ in range(count):
            data[rng.randrange(4, span)] ^= 1 << rng.randrange(8)
        path.write_bytes(data)

    return change


def _kept(share: float) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


def _whole(data: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(data)


def gguf() -> Iterator[Mutation]:
    """GGUF."""
    head = lambda tensors, entries: b"GGUF" + struct.pack("<IQQ", 3, tensors, entries)  # noqa: E731
    for share in (0, 1e-5, 1e-4, 0.001, 0.01, 0.1, 0.5, 0.9, 0.999):
        yield Mutation(name=f"cut to {share}", change=_kept(share))
    for seed in range(12):
        yield Mutation(name=f"bit {seed} of the header", change=_random(seed, 1, 3000), values=True)
    for seed in range(4):
        yield Mutation(name=f"bits {seed}", change=_random(seed, 30, 60_000), values=True)
    for what, at in (("tensors", 8), ("entries", 16)):
        for count in (HUGER, 2**64 - 1, 0, 10**6):
            yield Mutation(name=f"{what} {count}", change=_poked(at, struct.pack("<Q", count)))
    yield Mutation(name="version 0", change=_poked(4, bytes(4)))
    yield Mutation(name="key of 2^60 bytes", change=_poked(24, struct.pack("<Q", 2**60)))
    key = head(0, 1) + _string("k")
    for name, data in {
        "magic alone": b"GGUF",
        "arrays in arrays": key + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 50_000,
        "array of empty arrays": key + struct.pack("<IIQ", 9, 9, 20_000) + struct.pack("<IQ", 4, 0) * 20_000,
        "array of 2^62": key + struct.pack("<IIQ", 9, 0, 2**62),
        "strings 2^60": key + struct.pack("<IIQ", 9, 8, 2**60),
        "type unknown": key + struct.pack("<IQ", 77, 1),
        "array type unknown": key + struct.pack("<IIQ", 9, 77, 1),
        "5 dimensions": head(1, 0) + _string("a") + struct.pack("<I5QIQ", 5, *[1] * 5, 0, 0) + bytes(99),
    }.items():
        yield Mutation(name=name, change=_whole(data))
    row = "blk.0.ffn_up.weight"
    for name, at, new in (
        ("dims 2^32 x 2^32", 4, struct.pack("<QQ", 2**32, 2**32)),
        ("dims 2^63 x 2", 4, struct.pack("<QQ", HUGER, 2)),
        ("dims 0", 4, struct.pack("<QQ", 0, 64)),
        ("dims swapped", 4, struct.pack("<QQ", 128, 64)),
        ("dims smaller", 4, struct.pack("<QQ", 32, 64)),
        ("type 99", 20, struct.pack("<I", 99)),
        ("type of ints", 20, struct.pack("<I", 26)),
        ("type of half the bits", 20, struct.pack("<I", 2)),
        ("offset past the end", 24, struct.pack("<Q", HUGER)),
        ("offset overflows", 24, struct.pack("<Q", 2**64 - 1)),
        ("offset of another", 24, struct.pack("<Q", 0)),
    ):
        yield Mutation(
            name=name, change=_info(row, at, new), values=name.startswith(("offset of", "type of"))
        )
    number = lambda n: struct.pack("<II", 4, n)  # noqa: E731
    for key, values in {
        "llama.block_count": (2**31, 0, 1),
        "llama.embedding_length": (2**30, 0, 63),
        "llama.attention.head_count": (0, 3, 2**31),
        "llama.attention.head_count_kv": (0, 3, 2**31),
        "llama.attention.key_length": (0, 2**28),
        "llama.rope.dimension_count": (0, 2**28),
        "llama.feed_forward_length": (2**31, 0),
        "llama.context_length": (2**31, 0),
        "general.architecture": (5,),
        "tokenizer.ggml.bos_token_id": (2**31,),
    }.items():
        for value in values:
            yield Mutation(name=f"{key} = {value}", change=_entry(key, number(value)), values="type" in key)
    for value in (0x7FC00000, 0x7F800000, 0xFF800000):
        new = struct.pack("<II", 6, value)
        yield Mutation(name=f"eps {value:x}", change=_entry("llama.attention.layer_norm_rms_epsilon", new))
        yield Mutation(name=f"theta {value:x}", change=_entry("llama.rope.freq_base", new))
    yield Mutation(name="name of two lines", change=_replaced(b"blk.0.ffn_up", b"blk.0\nffn_up"))
    yield Mutation(name="name no UTF-8", change=_replaced(b"blk.0.ffn_up", b"blk.0.ffn_\xff\xff"))
    yield Mutation(name="name twice", change=_replaced(b"blk.0.ffn_up", b"blk.1.ffn_up"))


def links() -> Iterator[Mutation]:
    """A GGUF that is none."""
    yield Mutation(name="no GGUF", change=_whole(b"PK\x03\x04" + bytes(100)))
    yield Mutation(name="a pickle", change=_whole(b"\x80\x02cos\nsystem\n" + bytes(100)))
