"""Text and targets of qat_smollm2.py: what is read, what the model writes, its states on every token."""

import argparse
import copy
import time
from pathlib import Path

import torch

from fewbit.io.text import Join, Text, join, read_text, token_ids
from fewbit.train import sample_text

TEXTS = (
    "calib_c4_en_train_first1000.jsonl", "calib_wikipedia_extract.txt", "calib_sotu_2009_2016.txt",
    "calib_book_pride_and_prejudice.txt", "calib_book_war_of_the_worlds.txt", "calib_book_white_fang.txt",
)  # fmt: skip
VALID, TEST = "wikitext2_raw_valid.txt", "wikitext2_raw_test.txt"
LENGTH, BEGINNING = 512, 48  # tokens of a window, and of what the model goes on from
START = time.perf_counter()


def say(line: str) -> None:
    print(f"[{time.perf_counter() - START:6.1f} s] {line}", flush=True)


def read(path: Path) -> str:
    """The text of a file, markup of Wikipedia's extractor apart."""
    text = join(read_text(path), Join.SOLID)
    return "\n".join(line for line in text.splitlines() if not line.startswith(("<doc ", "</doc>")))


def cut(tokenizer, text: str) -> torch.Tensor:
    ids = token_ids(tokenizer, join(Text(name="", documents=(text,)), Join.SOLID))
    return ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)


def texts(args: argparse.Namespace, tokenizer) -> tuple[torch.Tensor, torch.Tensor]:
    """Windows that teach, and windows that do not [w, l]."""
    valid = cut(tokenizer, read(args.data / VALID))
    if args.smoke:
        return valid[:4, :32], valid[-args.batch :, :32]
    parts = [cut(tokenizer, read(args.data / name)) for name in TEXTS]
    taught = torch.cat([*parts, valid[: -args.batch]])
    own = args.out / "sampled.pt"
    if own.exists() and not args.sample:
        written = torch.load(own).long()
        say(f"{written.numel():,} tokens that the model wrote, {taught.numel():,} others")
        taught = written if args.own_only else torch.cat([taught, written])
    return taught, valid[-args.batch :]


def write(args: argparse.Namespace, model, taught: torch.Tensor) -> None:
    """OUT/sampled.pt: what the model goes on to write from random places of the texts; OUT/states.pt:
    its states on all of them.
    """
    writer = copy.deepcopy(model).to(args.device, torch.bfloat16)
    generator = torch.Generator(args.device).manual_seed(args.seed)
    own, length = [], taught.shape[1]
    begin = min(BEGINNING, length // 4)
    while not own or (time.perf_counter() - START < 60 * args.minutes and not args.smoke):
        rows = torch.randint(len(taught), (args.rows,), generator=generator, device=args.device).cpu()
        shift = torch.randint(length - begin, (args.rows, 1), generator=generator, device=args.device).cpu()
        prompts = taught[rows[:, None], shift + torch.arange(begin)]
        own.append(sample_text(writer, args.rows, length, prompts=prompts, generator=generator).int().cpu())
        say(f"{sum(o.numel() for o in own):,} tokens written")
    torch.save(torch.cat(own), args.out / "sampled.pt")
    tokens = torch.cat([taught, torch.cat(own).long()])
    torch.save({"tokens": tokens, "states": states(model, tokens, args).cpu()}, args.out / "states.pt")
    say(f"the states of {tokens.numel():,} tokens are kept")


def targets(model, tokens: torch.Tensor, args: argparse.Namespace) -> torch.Tensor:
    """`states`, from OUT/states.pt where it holds those of ``tokens``."""
    kept = args.out / "states.pt"
    if kept.exists():
        found = torch.load(kept, mmap=True)
        if torch.equal(found["tokens"], tokens):
            return found["states"].to(args.device)
    return states(model, tokens, args)


@torch.no_grad()
def states(model, tokens: torch.Tensor, args: argparse.Namespace) -> torch.Tensor:
    """Last hidden states of the float model, which its head reads: [w, l, d] bfloat16, on the device."""
    out = torch.empty(*tokens.shape, model.config.hidden_size, dtype=torch.bfloat16, device=args.device)
    for i in range(0, len(tokens), args.batch):
        out[i : i + args.batch] = hidden(model, tokens[i : i + args.batch], args)
    return out


def hidden(model, tokens: torch.Tensor, args: argparse.Namespace) -> torch.Tensor:
    with torch.autocast(args.device.split(":")[0], torch.bfloat16):
        return model.model(input_ids=tokens.to(args.device), use_cache=False).last_hidden_state
