"""Files that someone else made: what is checked of them before anything is built from what they say.

A header is believed only as far as the file reaches. Of safetensors the library itself checks that offsets
lie in the file, follow each other without gaps and fit shape and dtype; here names and the count of sides are
held to what sentences and sorting can take. JSON is bounded in length and depth. An index may name files of
its own folder and no others; links are followed, since the hub's cache consists of them.

Neither safetensors nor GGUF compresses, so no small file can ask for much memory by being unpacked, as zip
archives can ("zip bombs"): every tensor lies in the file byte for byte.

Road not taken: a handler around everything that turns any exception into an error of the input. It would
hide our own mistakes, and come too late for what hangs or takes all memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch

from fewbit.errors import InputError
from fewbit.io.base import DTYPES, TensorInfo, first_line

LONGEST_NAME, MOST_SIDES = 256, 8  # of a tensor
LONGEST_JSON, DEEPEST_JSON = 2**27, 40


def read_json(path: Path) -> dict:
    """The object in a JSON file. Raises ``InputError`` for one that is no object, too long or too deep."""
    if path.stat().st_size > LONGEST_JSON:
        raise InputError(f"{path} is longer than {LONGEST_JSON} bytes; get the file again.")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON ({first_line(error)}); get the file again.") from error
    if not isinstance(data, dict) or _depth(data) > DEEPEST_JSON:
        raise InputError(
            f"{path} is no JSON object of at most {DEEPEST_JSON} levels; it is damaged, get the file again."
        )
    return data


def _depth(data: object) -> int:
    """Levels of lists and objects, counted without recursion."""
    levels, below = 0, [data]
    while below:
        inner = [v.values() if isinstance(v, dict) else v for v in below if isinstance(v, dict | list)]
        below = [v for values in inner for v in values]
        levels += 1
    return levels


def check_name(name: str, path: object) -> None:
    """Raise ``InputError`` for a tensor's name that is empty, too long, or not printable ASCII."""
    if not (0 < len(name) <= LONGEST_NAME and name.isascii() and name.isprintable()):
        raise InputError(
            f"{path} holds a tensor named {name!r:.60}, which is no name of 1 to {LONGEST_NAME} printable "
            "ASCII characters; it is damaged, get it again."
        )


def shard_names(index: Path) -> dict[str, str]:
    """Tensor -> file name, as an index says. Raises ``InputError`` for a name that leaves the folder."""
    mapped = read_json(index).get("weight_map")
    if not isinstance(mapped, dict) or not all(isinstance(name, str) for name in mapped.values()):
        raise InputError(f"{index} has no weight_map from tensors to file names; get the file again.")
    for name in set(mapped.values()):
        plain = 0 < len(name) <= LONGEST_NAME and name.isprintable() and not set(name) & set("/\\")
        if not plain or name in (".", ".."):
            raise InputError(
                f"{index} names the shard {name!r:.60}, which is no plain name of a file in its folder; it "
                "is damaged or hostile, get it again."
            )
        if not (index.parent / name).is_file():
            raise InputError(f"{index} names the shard {name}, which is missing; download the model again.")
    return mapped


def open_weights(path: Path):
    """An open safetensors file; its own error becomes one sentence with the file's name."""
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{path} is not a complete safetensors file ({first_line(error)}); it was cut short or "
            "damaged, get it again."
        ) from error


def read_header(path: Path) -> dict[str, TensorInfo]:
    """What the header of a safetensors file says of its tensors. Raises ``InputError`` for unread dtypes."""
    found = {}
    with open_weights(path) as file:
        for name in file.keys():  # noqa: SIM118 (not a dict)
            check_name(name, path)
            view = file.get_slice(name)
            kind, shape = view.get_dtype(), tuple(view.get_shape())
            if kind not in DTYPES:
                raise InputError(f"Tensor {name} in {path} has the dtype {kind}, which is not supported.")
            if len(shape) > MOST_SIDES:
                raise InputError(
                    f"Tensor {name} in {path} has {len(shape)} sides; at most {MOST_SIDES} are read."
                )
            nbytes = DTYPES[kind].itemsize * torch.Size(shape).numel()
            found[name] = TensorInfo(shape=shape, dtype=DTYPES[kind], nbytes=nbytes)
    return found


def check_layers(config: dict, tensors: Iterable, name: str) -> None:
    """Raise ``InputError`` where config.json asks for more layers than there are tensors, at any depth.

    transformers makes lists of that length before it builds anything; up to 1000 are harmless.
    """
    most, below = max(1000, len(list(tensors))), [config]
    while below:
        part = below.pop()
        below += [value for value in part.values() if isinstance(value, dict)]
        for key, value in part.items():
            least = 0 if key == "num_hidden_layers" else -most  # -2: the last layer but one
            if "layer" in key and isinstance(value, int | float) and not least <= value <= most:
                raise InputError(
                    f"The config.json of {name} gives {key} {value!r:.40}, and its file could hold up to "
                    f"{most} layers; config.json and weights do not belong together."
                )
