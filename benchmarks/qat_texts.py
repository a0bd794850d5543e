"""Text and targets of qat_smollm2.py: what is read, what the model writes, its states on every token."""

import argparse
import copy
import os
import time
from pathlib import Path

import numpy as np
import torch

from fewbit.io.text import Join, Text, join, read_text, token_ids
from fewbit.train import sample_text

TEXTS = (
    "calib_c4_en_train_first1000.jsonl", "calib_wikipedia_extract.txt", "calib_sotu_2009_2016.txt",
    "calib_book_pride_and_prejudice.txt", "calib_book_war_of_the_worlds.txt", "calib_book_white_fang.txt",
)  # fmt: skip
VALID, TEST = "wikitext2_raw_valid.txt", "wikitext2_raw_test.txt"
LENGTH, BEGINNING = 512, 192  # tokens of a window, and of what the model goes on from
TEMPERATURES = 1.0, 1.2
START = time.perf_counter()
RANK, WORLD = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))  # torchrun's


def say(line: str) -> None:
    if RANK == 0:
        print(f"[{time.perf_counter() - START:6.1f} s] {line}", flush=True)


def read(path: Path) -> str:
    """The text of a file, markup of Wikipedia's extractor apart."""
    text = join(read_text(path), Join.SOLID)
    return "\n".join(line for line in text.splitlines() if not line.startswith(("<doc ", "</doc>")))


def cut(tokenizer, text: str) -> torch.Tensor:
    ids = token_ids(tokenizer, join(Text(name="", documents=(text,)), Join.SOLID))
    return ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)


def windows_of(path: Path) -> torch.Tensor:
    found = np.load(path)
    if found.ndim != 2 or found.shape[1] != LENGTH or found.dtype.kind not in "ui":
        raise SystemExit(f"{path} holds {found.dtype} {list(found.shape)}, not windows of {LENGTH} token ids")
    return torch.from_numpy(found.astype(np.int64))


def read_texts(args: argparse.Namespace, tokenizer) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Windows [w, l] of all texts, of WikiText-2 validation, and those of it that teach nothing."""
    valid = cut(tokenizer, read(args.data / VALID))
    if args.smoke:
        return valid[:2, :32], valid[2:4, :32], valid[-args.batch :, :32]
    parts = [cut(tokenizer, read(args.data / name)) for name in TEXTS]
    for path in args.more:
        parts.append(windows_of(path) if path.suffix == ".npy" else cut(tokenizer, read(path)))
    return torch.cat(parts), valid[: -args.batch], valid[-args.batch :]


def texts(args: argparse.Namespace, tokenizer) -> tuple[torch.Tensor, torch.Tensor]:
    """Windows that teach, what the model wrote among them, and windows that do not [w, l]."""
    other, valid, held = read_texts(args, tokenizer)
    taught = torch.cat([other, valid])
    own = [] if args.smoke else sorted(args.out.glob("sampled-*.pt"))
    if own:
        written = torch.cat([torch.load(path).long() for path in own])
        say(f"{written.numel():,} tokens that the model wrote, {taught.numel():,} others")
        taught = written if args.own_only else torch.cat([taught, written])
    return taught, held


def write(args: argparse.Namespace, model, tokenizer) -> None:
    """OUT/sampled-SEED.pt: what the model goes on to write from random places of the texts, half of it from
    WikiText-2 validation; every other batch at a higher temperature: real text is less expected than a
    model's own.
    """
    sources = [windows.flatten() for windows in read_texts(args, tokenizer)[:2]]
    length = 32 if args.smoke else LENGTH
    writer = copy.deepcopy(model).to(args.device, torch.bfloat16)
    generator = torch.Generator(args.device).manual_seed(args.seed)
    places = torch.Generator().manual_seed(args.seed)
    own, begin = [], min(BEGINNING, length // 2)
    begun = time.perf_counter()
    while not own or (time.perf_counter() - START < 60 * args.minutes and not args.smoke):
        flat = sources[len(own) // 2 % 2]
        first = torch.randint(len(flat) - begin, (args.rows, 1), generator=places)
        how = {"prompts": flat[first + torch.arange(begin)], "temperature": TEMPERATURES[len(own) % 2]}
        own.append(sample_text(writer, args.rows, length, generator=generator, **how).int().cpu())
        tokens = sum(o.numel() for o in own)
        say(f"{tokens:,} tokens written, {tokens / (time.perf_counter() - begun):,.0f} a second")
    torch.save(torch.cat(own), args.out / f"sampled-{args.seed}.pt")


@torch.no_grad()
def states(model, tokens: torch.Tensor, args: argparse.Namespace) -> torch.Tensor:
    """Last hidden states of the float model, which its head reads: [w, l, d] bfloat16, on the device."""
    out = torch.empty(*tokens.shape, model.config.hidden_size, dtype=torch.bfloat16, device=args.device)
    compiled = [] if args.eager or len(tokens) <= args.batch else list(model.model.layers)
    for block in compiled:
        block.compile(fullgraph=True)
    for i in range(0, len(tokens), args.batch):
        i = max(0, min(i, len(tokens) - args.batch))  # the last rows again, for one shape alone
        out[i : i + args.batch] = hidden(model, tokens[i : i + args.batch], args)
    eager(compiled)
    return out


def eager(blocks: list) -> None:
    """Without torch.compile from now on."""
    for block in blocks:
        block._compiled_call_impl = None


def hidden(model, tokens: torch.Tensor, args: argparse.Namespace) -> torch.Tensor:
    with torch.autocast(args.device.split(":")[0], torch.bfloat16):
        return model.model(input_ids=tokens.to(args.device), use_cache=False).last_hidden_state
