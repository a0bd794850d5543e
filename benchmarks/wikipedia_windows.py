"""Wikipedia in WikiText's form, cut into windows: text for qat_smollm2.py --more.

    git clone https://github.com/chinapedia/wikipedia.abstract.en CLONE
    python benchmarks/wikipedia_windows.py CLONE OUT.npy [--data FOLDER] [--every 1]

The clone holds 63,000 English articles of 2019 (CC BY-SA). Their prose is written as WikiText writes it
(Merity et al. 2016, https://arxiv.org/abs/1609.07843, section 4.3): tokens apart, headings between equals
signs, `@-@`, `@,@` and `@.@` inside of words and numbers. Tables, lists, notes and what is left of templates
go, and so does every article that shares 13 words in a row with WikiText-2 test or validation.

Writes windows of 512 token ids of SmolLM2, [w, 512] uint16, and says what was left out.
"""

import argparse
import re
import subprocess
from collections.abc import Iterator
from functools import cache
from itertools import islice
from multiprocessing import Pool
from pathlib import Path

import numpy as np
from qat_texts import LENGTH, TEST, VALID, say

from fewbit.io.source import open_source
from fewbit.io.text import Join, join, read_text

ROOT = Path(__file__).parent
GRAM = 13  # words in a row that two texts do not share by accident
SHORTEST = 600  # characters of prose
LAST = re.compile(
    r"(see also|references?|notes?|external links|further reading|bibliography|sources|footnotes|citations|"
    r"works cited|discography|filmography|gallery|publications)\W*$",
    re.IGNORECASE,
)
NOTE = re.compile(r"\[(\d+|note \d+|[a-z]|citation needed)\]")
LEFT_OVER = re.compile(r"[{}|]|\[\[|\]\]|^[+\-*#>]|^\d+\.\s|^\s{3,}|=\s*\"|-{4}|https?:|^\W*$")
ABBREVIATIONS = frozenset(
    (
        "mr", "mrs", "ms", "dr", "st", "no", "vol", "lt", "col", "gen", "sgt", "capt", "maj", "cpl", "prof",
        "rev", "sr", "jr", "vs", "etc", "al", "inc", "co", "ltd", "op", "ca", "cf",
    )
)  # fmt: skip


def pages(clone: Path) -> Iterator[tuple[str, str]]:
    """Title and text of every article."""
    git = ["git", "-C", str(clone)]
    listed = subprocess.run([*git, "ls-tree", "-r", "-z", "HEAD", "Page"], capture_output=True, check=True)
    entries = [entry.split("\t", 1) for entry in listed.stdout.decode().split("\0") if entry]
    with subprocess.Popen([*git, "cat-file", "--batch"], stdin=-1, stdout=-1) as reader:
        for head, path in entries:
            reader.stdin.write(head.split()[2].encode() + b"\n")
            reader.stdin.flush()
            size = int(reader.stdout.readline().split()[2])
            text = reader.stdout.read(size + 1)[:-1].decode(errors="replace")
            yield Path(path).stem.replace("_", " "), text
        reader.stdin.close()


def prose(title: str, text: str) -> list[tuple[int, str]]:
    """(Depth, line): paragraphs at depth 0, the title at 1, headings below; up to the notes."""
    out = [(1, title)]
    for i, section in enumerate(re.split(r"\n{3,}", text)):
        for j, part in enumerate(section.split("\n\n")):
            line = NOTE.sub("", " ".join(part.split())).replace("_", "")  # italics
            heading = len(line) < 80 and not re.search(r"[.:;,!?\"')\]]$", line)
            if heading and LAST.match(line):
                return ended(out)
            if LEFT_OVER.search(part):
                continue
            if heading:
                depth = 2 if i and not j else 3
                out = [*ended(out, depth), (depth, line)]
            elif len(line) >= 60:
                bold = re.escape(title.upper())  # it became capitals
                out.append((0, re.sub(bold, title, line, count=1) if len(out) == 1 else line))
    return ended(out)


def ended(lines: list[tuple[int, str]], depth: int = 2) -> list[tuple[int, str]]:
    """Without last headings that have no text, at this depth or deeper."""
    while lines[-1][0] >= depth:
        lines = lines[:-1]
    return lines


def spaced(line: str) -> str:
    """Tokens apart."""
    line = re.sub(r"(?<=\w)-(?=\w)", " @-@ ", line)
    line = re.sub(r"(?<=\d),(?=\d{3})", " @,@ ", line)
    line = re.sub(r"(?<=\d)\.(?=\d)", " @.@ ", line)
    line = re.sub(r"[“”„]|''", '"', line).replace("’", "'").replace("‘", "'")
    line = re.sub(r"([,;:!?()\[\]\"/–—%$£€]|\.\.\.)(?!@)", r" \1 ", line)
    line = re.sub(r"(?<=\w)'(?=(s|re|ve|ll|d|m|t)\b)", " '", line)
    line = re.sub(r"(?<=[^s\W])'(?=\s)|(?<=s)'(?=\s)", " ' ", line)
    line = re.sub(r"(\w+)\.(?=\s|$)", full_stop, line)
    return " ".join(line.split())


def full_stop(found: re.Match) -> str:
    word, after = found[1], found.string[found.end() : found.end() + 3]
    kept = (len(word) == 1 and word.isupper()) or word.lower() in ABBREVIATIONS
    return found[0] if kept and after.strip() else word + " ."


def wikitext(lines: list[tuple[int, str]]) -> str:
    marks = [" ".join("=" * depth) for depth, _ in lines]
    return "".join(
        f" {mark} {spaced(line)} {mark} \n" if mark else f" {spaced(line)} \n"
        for mark, (_, line) in zip(marks, lines, strict=True)
    )


def grams(text: str) -> Iterator[int]:
    words = re.findall(r"[a-z0-9]+", text.lower())
    for i in range(len(words) - GRAM + 1):
        yield hash(tuple(words[i : i + GRAM]))


@cache
def held_back(folder: Path) -> frozenset[int]:
    return frozenset(g for name in (TEST, VALID) for g in grams(join(read_text(folder / name), Join.SOLID)))


@cache
def tokenizer():
    return open_source("smollm2").tokenizer()


def encoded(folder: Path, part: tuple[tuple[str, str], ...]) -> tuple[np.ndarray, dict[str, int]]:
    """Token ids of some articles, one after another; what became of them."""
    texts, counts = [], {"articles": len(part), "short": 0, "of the evaluation": 0}
    for title, text in part:
        lines = prose(title, text)
        if sum(len(line) for depth, line in lines if depth == 0) < SHORTEST:
            counts["short"] += 1
            continue
        written = wikitext(lines)
        if not held_back(folder).isdisjoint(grams(written)):
            counts["of the evaluation"] += 1
            continue
        texts.append(written)
    ids = tokenizer()(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
    return np.concatenate([np.array(i, np.uint16) for i in ids] or [np.empty(0, np.uint16)]), counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("clone", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", type=Path, default=ROOT.parent.parent / "shared" / "data")
    parser.add_argument("--every", type=int, default=1, help="of so many articles, one")
    args = parser.parse_args()
    if subprocess.run(
        ["git", "-C", args.clone, "cat-file", "-e", "HEAD:Page"], capture_output=True
    ).returncode:
        parser.error(
            f"{args.clone} is no clone with articles under Page; the first lines of this file name it"
        )
    if args.out.suffix != ".npy":
        parser.error(f"{args.out}: windows are written as NumPy writes them; give a name that ends in .npy")
    chosen = (page for i, page in enumerate(pages(args.clone)) if i % args.every == 0)
    counts: dict[str, int] = {}
    parts = []
    with Pool() as pool:
        parts_of = iter(lambda: tuple(islice(chosen, 200)), ())
        work = ((args.data, part) for part in parts_of)
        for ids, found in pool.imap_unordered(_encoded, work):
            parts.append(ids)
            counts = {key: counts.get(key, 0) + n for key, n in found.items()}
            if len(parts) % 20 == 0:
                say(f"{counts}, {sum(map(len, parts)):,} tokens")
    flat = np.concatenate(parts)
    windows = flat[: len(flat) // LENGTH * LENGTH].reshape(-1, LENGTH)
    partial = args.out.with_suffix(".partial.npy")
    np.save(partial, windows)
    partial.rename(args.out)
    say(f"{counts}; {windows.size:,} tokens in {args.out}")


def _encoded(work):
    return encoded(*work)


if __name__ == "__main__":
    main()
