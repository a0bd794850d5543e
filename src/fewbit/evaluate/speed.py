"""How fast a model reads and writes, and how large it is on disk.

*Prefill* reads the whole prompt in one forward: bound by arithmetic. *Decode* writes one token per forward
through the key/value cache: bound by the bytes of weights that each token must fetch, which is what few
bits save. They differ by an order of magnitude, so one number for both would say nothing.

Times are wall times of greedy decoding at batch 1 after a warm-up; an end-of-text token does not stop the
clock. The road not taken is ``model.generate``: its per-token checks and processors are 5-20 % of a small
model's time.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fewbit.errors import InputError

INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Tokens per wall second, and what was timed."""

    prefill: float
    decode: float
    prompt_tokens: int
    new_tokens: int


def tokens_per_second(model: Any, tokenizer: Any, prompt: str, new_tokens: int = 32) -> Speed:
    """Time ``prompt`` through ``model`` and ``new_tokens`` decoding steps after it.

    ``model``: a causal language model of transformers with a key/value cache. Raises InputError for an empty
    prompt, ``new_tokens`` below 1 and a model without a cache.
    """
    if new_tokens < 1:
        raise InputError(f"new_tokens is {new_tokens}: expected at least 1 token to time")
    device = next(model.parameters()).device
    ids = torch.tensor([tokenizer(prompt)["input_ids"]], dtype=torch.int64, device=device)
    if ids.numel() == 0:
        raise InputError(f"the prompt {prompt!r} has no tokens: give some text to read")
    with torch.no_grad():
        model(input_ids=ids)  # the first forward pays for allocation and compilation
        start = _now(device)
        out = model(input_ids=ids, use_cache=True)
        read = _now(device)
        if getattr(out, "past_key_values", None) is None:
            raise InputError(f"{type(model).__name__} keeps no key/value cache: decoding cannot be timed")
        for _ in range(new_tokens):
            token = out.logits[:, -1:].argmax(dim=-1)
            out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
        written = _now(device)
    n = ids.shape[1]
    return Speed(
        prefill=n / (read - start),
        decode=new_tokens / (written - read),
        prompt_tokens=n,
        new_tokens=new_tokens,
    )


def size_bytes(checkpoint: str | Path) -> int:
    """Bytes of the weight files of a checkpoint: a folder, or one file such as a GGUF.

    In a folder: the shards that its index names, or else ``model.safetensors``, or else all
    ``*.safetensors``, or else all ``*.gguf``; so a second copy of the weights in another layout is not
    counted. Raises InputError when there are none.
    """
    path = Path(checkpoint)
    if path.is_file():
        return path.stat().st_size
    files: list[Path] = []
    if (path / INDEX).is_file():
        files = [path / name for name in _shards(path / INDEX)]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise InputError(f"{path} lacks {missing[0]}, which its {INDEX} names: fetch or write it again")
    for pattern in ("model.safetensors", "*.safetensors", "*.gguf"):
        files = files or sorted(path.glob(pattern))
    if not files:
        raise InputError(
            f"{path} holds no weight files: expected a folder with *.safetensors or *.gguf in it"
        )
    return sum(file.stat().st_size for file in files)


def _shards(index: Path) -> list[str]:
    try:
        return sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{index} is no index of shards: expected JSON with a weight_map") from None


def _now(device: torch.device) -> float:
    """Wall clock after all work queued on ``device`` is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
