"""Damage to checkpoints, by name: what cut downloads, broken disks and ill will leave behind.

A mutation changes the folder of a checkpoint (or a GGUF file) in place. All are deterministic. ``values``
marks those after which a reader may find other numbers in tensors of the same shapes, since nothing in the
file says what they were.
"""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

HUGE, HUGER = 10**9, 2**63
WEIGHTS = "model.safetensors"


@dataclass(frozen=True, kw_only=True)
class Mutation:
    """``change`` the checkpoint at a path; ``values``: other numbers may come out, in the same shapes."""

    name: str
    change: Callable[[Path], object]
    values: bool = False


# -- files of bytes --


def patch(file: str, at: int, new: bytes) -> Callable[[Path], None]:
    """Overwrite bytes."""

    def change(folder: Path) -> None:
        data = bytearray((folder / file).read_bytes())
        data[at : at + len(new)] = new
        (folder / file).write_bytes(data)

    return change


def cut(file: str, keep: Callable[[int, int], int]) -> Callable[[Path], None]:
    """Keep the first ``keep(length, length of the header)`` bytes."""

    def change(folder: Path) -> None:
        data = (folder / file).read_bytes()
        (folder / file).write_bytes(data[: keep(len(data), 8 + int.from_bytes(data[:8], "little"))])

    return change


def flip(file: str, seed: int, inside: bool) -> Callable[[Path], None]:
    """Flip a bit of the header (``inside``) or 20 bits of the data."""

    def change(folder: Path) -> None:
        rng, data = random.Random(seed), bytearray((folder / file).read_bytes())
        header = 8 + int.from_bytes(data[:8], "little")
        for _ in range(1 if inside else 20):
            at = rng.randrange(8, header) if inside else rng.randrange(header, len(data))
            data[at] ^= 1 << rng.randrange(8)
        (folder / file).write_bytes(data)

    return change


def weights(edit: Callable[[dict, bytes], dict | None], file: str = WEIGHTS) -> Callable[[Path], None]:
    """Edit the parsed header of a safetensors file; the data stays."""

    def change(folder: Path) -> None:
        data = (folder / file).read_bytes()
        end = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:end])
        header = edit(header) or header
        raw = header if isinstance(header, bytes) else json.dumps(header).encode()
        (folder / file).write_bytes(len(raw).to_bytes(8, "little") + raw + data[end:])

    return change


def said(*keys: str | int, value: object) -> Callable[[Path], None]:
    """Set what config.json says under a path of keys."""

    def change(folder: Path) -> None:
        path = folder / "config.json"
        config = at = json.loads(path.read_text())
        for key in keys[:-1]:
            at = at[key]
        at[keys[-1]] = value
        path.write_text(json.dumps(config))

    return change


def text(file: str, content: str | bytes) -> Callable[[Path], None]:
    """Replace a file."""
    raw = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / file).write_bytes(raw)


def tensor(
    pick: str, replace: Callable, file: str = WEIGHTS, values: bool = False, rename: str | None = None
) -> Callable[[Path], None]:
    """Replace the first tensor whose name ends so (None: leave it out), and write the file anew."""

    def change(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        found = load_file(folder / file)
        name = next(n for n in sorted(found) if n.endswith(pick))
        new = replace(found.pop(name))
        if new is not None:
            found[rename or name] = new.contiguous()
        save_file(found, folder / file, {"format": "pt"})

    return change


def _first(header: dict) -> dict:
    return header[next(n for n in sorted(header) if n != "__metadata__")]


def _second(header: dict) -> dict:
    return header[sorted(n for n in header if n != "__metadata__")[1]]


def _set(key: str, value: object) -> Callable[[dict], None]:
    def edit(header: dict) -> None:
        own = value(_first(header)) if callable(value) else value
        _first(header)[key] = own

    return edit


def _rename(new: str) -> Callable[[dict], None]:
    def edit(header: dict) -> None:
        header[new] = header.pop(next(n for n in sorted(header) if n != "__metadata__"))

    return edit


def _overlap(header: dict) -> None:
    first, second = _first(header), _second(header)
    second.update(first)


def _drop(header: dict) -> None:
    del header[next(n for n in sorted(header) if n != "__metadata__")]


_SAME_SIZE = {
    "F32": "I32",
    "I32": "F32",
    "U8": "I8",
    "I8": "U8",
    "F16": "I16",
    "BF16": "I16",
    "F8_E4M3": "I8",
}


def safetensors(file: str = WEIGHTS) -> Iterator[Mutation]:
    """Damage to the file of the weights."""
    own = lambda **kw: Mutation(**kw)  # noqa: E731
    for length in (0, 1, 2**31, HUGER, 2**64 - 1):
        yield own(name=f"header length {length}", change=patch(file, 0, struct.pack("<Q", length)))
    for name, keep in {
        "empty": lambda n, h: 0,
        "4 bytes": lambda n, h: 4,
        "8 bytes": lambda n, h: 8,
        "half a header": lambda n, h: h // 2,
        "header alone": lambda n, h: h,
        "half the data": lambda n, h: (n + h) // 2,
        "one byte short": lambda n, h: n - 1,
    }.items():
        yield own(name=f"cut: {name}", change=cut(file, keep))
    for seed in range(8):
        yield own(name=f"bit {seed} of the header", change=flip(file, seed, True), values=True)
    for seed in range(2):
        yield own(name=f"bits {seed} of the data", change=flip(file, seed, False), values=True)
    span = lambda info: info["data_offsets"]  # noqa: E731
    for name, key, value in (
        ("negative offset", "data_offsets", lambda i: [-8, span(i)[1]]),
        ("offset past the end", "data_offsets", lambda i: [span(i)[0], HUGER]),
        ("offsets reversed", "data_offsets", lambda i: span(i)[::-1]),
        ("offset one short", "data_offsets", lambda i: [span(i)[0], span(i)[1] - 1]),
        ("offsets are words", "data_offsets", "x"),
        ("shape 0", "shape", [0]),
        ("shape negative", "shape", [-1, -1]),
        ("shape overflows to 0", "shape", [2**32, 2**32]),
        ("shape overflows", "shape", [HUGER, 4]),
        ("shape is a number", "shape", 5),
        ("shape nested", "shape", [[1]]),
        ("shape flat", "shape", lambda i: [_product(i["shape"])]),
        ("shape of 2000 sides", "shape", lambda i: [*i["shape"], *[1] * 2000]),
        ("dtype of the same size", "dtype", lambda i: _SAME_SIZE[i["dtype"]]),
        ("dtype unknown", "dtype", "X99"),
        ("dtype wide", "dtype", "F64"),
        ("dtype a number", "dtype", 5),
    ):
        yield own(name=name, change=weights(_set(key, value), file))
    for name, edit in (
        ("overlapping", _overlap),
        ("a hole", _drop),
        ("nameless", _rename("")),
        ("name of a megabyte", _rename("a" * 2**20)),
        ("name of two lines", _rename("model\nlayers")),
        ("name of digits that are none", _rename("model.layers.²")),
        ("name of many digits", _rename("model.layers." + "9" * 5000)),
        ("header a list", lambda header: b"[]"),
        ("header deep", lambda header: b"[" * 100_000),
        ("header empty", lambda header: b"{}"),
        ("metadata a list", lambda header: header.update(__metadata__=[1])),
    ):
        yield own(name=name, change=weights(edit, file))


def _product(shape: list[int]) -> int:
    n = 1
    for side in shape:
        n *= side
    return n


def configuration() -> Iterator[Mutation]:
    """Damage to config.json, its description of the model."""
    for name, content in {
        "config no JSON": "{",
        "config empty": "",
        "config a list": "[]",
        "config a number": "7",
        "config bytes": b"\xff\xfe\x00",
        "config deep": "[" * 100_000,
        "config deep objects": '{"a":' * 5000 + "1" + "}" * 5000,
        "config a long number": '{"hidden_size": ' + "9" * 10_000 + "}",
    }.items():
        yield Mutation(name=name, change=text("config.json", content))
    yield Mutation(name="config missing", change=lambda folder: (folder / "config.json").unlink())
    for key, values in {
        "hidden_size": (HUGE, HUGER, 0, -1, "x", None, 1e300),
        "num_hidden_layers": (HUGE, 0, -1, "x"),
        "vocab_size": (10**12, -5),
        "num_attention_heads": (0, 3, HUGE),
        "num_key_value_heads": (0, HUGE),
        "head_dim": (0, HUGE),
        "intermediate_size": (HUGE, [1]),
        "max_position_embeddings": (10**18, "x"),
        "rope_parameters": ("x", {"rope_type": "x"}, {"rope_type": "yarn", "factor": 0}),
        "hidden_act": ("x", 5),
        "architectures": ("abc", [5], ["set_seed"], ["Trainer"], {}, ["AutoModel"]),
        "model_type": ("x", 5, ["llama"], "gpt2"),
        "_attn_implementation": ("nobody/kernels",),
        "dtype": ("x", 5),
        "rms_norm_eps": ("x",),
        "pad_token_id": (HUGE, -7, "x"),
        "layer_types": ("x", ["x"] * 10),
        "auto_map": ({"AutoModel": "x.py--X"}, 5),
        "quantization_config": ("x", [1], 5, {"quant_method": 5}),
    }.items():
        for value in values:
            shown = f"{value!r:.30}"
            yield Mutation(name=f"{key} = {shown}", change=said(key, value=value))
    yield Mutation(name="unknown method", change=said("quantization_config", value={"quant_method": "x"}))


def companions() -> Iterator[Mutation]:
    """Damage to what goes along."""
    for name, content in {"no JSON": "{", "a list": "[]", "deep": "[" * 100_000}.items():
        for file in ("generation_config.json", "tokenizer.json"):
            yield Mutation(name=f"{file} {name}", change=text(file, content))
    generated = json.dumps({"max_new_tokens": -1, "temperature": "x", "num_beams": [1], "eos_token_id": {}})
    yield Mutation(name="generation_config wrong", change=text("generation_config.json", generated))
