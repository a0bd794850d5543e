"""Wikipedia in WikiText's form, cut into windows: text for qat_smollm2.py --more.

    git clone https://github.com/chinapedia/wikipedia.abstract.en ONE
    git clone https://github.com/ZhouYii/PatchedDistro TWO
    git clone https://github.com/Vibhas-hs-edu/WikiTasks THREE
    git clone https://github.com/JohanMadsen/02807_Project FOUR
    python benchmarks/wikipedia_windows.py ONE TWO THREE FOUR OUT.npy [--data FOLDER] [--every 1]

The first clone holds 63,000 English articles of 2019, a file each under Page; the others hold files wiki_NN
as WikiExtractor (https://github.com/attardi/wikiextractor) writes them, there since 2014, 2021 and 2018; a
dump that it has read serves as well, in any git repository. The articles are CC BY-SA. Their prose is written
as WikiText writes it (Merity et al. 2016, https://arxiv.org/abs/1609.07843, section 4.3): tokens apart,
headings between equals signs, `@-@`, `@,@` and `@.@` inside of words and numbers. Tables, lists, notes and
what is left of templates go, and so does a title that was there before, and every article that shares 13
words in a row with WikiText-2 test or validation.

Writes windows of 512 token ids of SmolLM2, [w, 512] uint16, and says what was left out.
"""

import argparse
import html
import re
import subprocess
from collections.abc import Callable, Iterator
from functools import cache
from itertools import chain, islice
from multiprocessing import Pool
from pathlib import Path

import numpy as np
from qat_texts import LENGTH, TEST, VALID, say

from fewbit.io.source import open_source
from fewbit.io.text import Join, join, read_text

ROOT = Path(__file__).parent
GRAM = 13  # words in a row that two texts do not share by accident
SHORTEST = 1500  # characters of prose; articles of WikiText are long
LAST = re.compile(
    r"(see also|references?|notes?|external links|further reading|bibliography|sources|footnotes|citations|"
    r"works cited|discography|filmography|gallery|publications)\W*$",
    re.IGNORECASE,
)
NOTE = re.compile(r"\[(\d+|note \d+|[a-z]|citation needed)\]")
EMPTY = re.compile(r"(?<=\()[\s,;]+|\s?\([\s,;]*\)")  # where a template stood in parentheses
VERB = re.compile(r"\b(is|are|was|were|has|had|have|will|did|does|he|she|it|they)\b", re.IGNORECASE)
EXTRACTED = re.compile(r'<doc [^>]*title="(.*?)">\n(.*?)\n</doc>', re.DOTALL)
LEFT_OVER = re.compile(r"[{}|]|formula_\d|\[\[|\]\]|^[+\-*#>]|^\d+\.\s|^\s{3,}|=\s*\"|-{4}|https?:|^\W*$")
ABBREVIATIONS = frozenset(
    (
        "mr", "mrs", "ms", "dr", "st", "no", "vol", "lt", "col", "gen", "sgt", "capt", "maj", "cpl", "prof",
        "rev", "sr", "jr", "vs", "etc", "al", "inc", "co", "ltd", "op", "ca", "cf",
    )
)  # fmt: skip


Parts = Iterator[tuple[int, str]]  # (depth of a heading or 0, what stands there)
Page = tuple[str, str, Callable[[str], Parts]]  # title, text, how it is read


def pages(clone: Path) -> Iterator[Page]:
    """Every article of a clone."""
    for path, text in blobs(clone, re.compile(r"^Page/|(^|/)wiki_\d+$")):
        if path.startswith("Page/"):
            yield Path(path).stem.replace("_", " "), text, markdown
        else:
            for title, body in EXTRACTED.findall(text):
                title = html.unescape(title)
                yield title, html.unescape(body).removeprefix(title), extracted


def blobs(clone: Path, wanted: re.Pattern) -> Iterator[tuple[str, str]]:
    """Path and text of every file of HEAD whose path is wanted, without checking anything out."""
    git = ["git", "-C", str(clone)]
    listed = subprocess.run([*git, "ls-tree", "-r", "-z", "HEAD"], capture_output=True, check=True)
    entries = [entry.split("\t", 1) for entry in listed.stdout.decode(errors="replace").split("\0") if entry]
    with subprocess.Popen([*git, "cat-file", "--batch"], stdin=-1, stdout=-1) as reader:
        for head, path in entries:
            if wanted.search(path):
                reader.stdin.write(head.split()[2].encode() + b"\n")
                reader.stdin.flush()
                size = int(reader.stdout.readline().split()[2])
                yield path, reader.stdout.read(size + 1)[:-1].decode(errors="replace")
        reader.stdin.close()


def markdown(text: str) -> Parts:
    """Sections lie two empty lines apart, and a heading does not end like a sentence."""
    for i, section in enumerate(re.split(r"\n{3,}", text)):
        for j, part in enumerate(section.split("\n\n")):
            line = cleaned(part)
            heading = len(line) < 80 and not re.search(r"[.:;,!?\"')\]]$", line)
            yield (2 if i and not j else 3) if heading else 0, part


def extracted(text: str) -> Parts:
    """A paragraph a line; a heading is short, without a verb, and ends in the only full stop."""
    for part in text.split("\n"):
        heading = len(part) < 60 and part.endswith(".") and part.count(".") == 1 and not VERB.search(part)
        yield (2, part[:-1]) if heading else (0, part)


def cleaned(part: str) -> str:
    return EMPTY.sub("", NOTE.sub("", " ".join(part.split())).replace("_", ""))  # italics


def prose(title: str, parts: Parts) -> list[tuple[int, str]]:
    """(Depth, line): paragraphs at depth 0, the title at 1, headings below; up to the notes."""
    out = [(1, title)]
    for depth, part in parts:
        line = cleaned(part)
        if depth and LAST.match(line):
            return ended(out)
        if LEFT_OVER.search(part):
            continue
        if depth:
            out = [*ended(out, depth), (depth, line)]
        elif len(line) >= 60:
            bold = re.escape(title.upper())  # it became capitals
            out.append((0, re.sub(bold, lambda _: title, line, count=1) if len(out) == 1 else line))
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


def encoded(folder: Path, part: tuple[Page, ...]) -> tuple[np.ndarray, dict[str, int]]:
    """Token ids of some articles, one after another; what became of them."""
    texts, counts = [], {"articles": len(part), "short": 0, "of the evaluation": 0}
    for title, text, parts in part:
        lines = prose(title, parts(text))
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
    parser.add_argument("clones", type=Path, nargs="+", metavar="CLONE")
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", type=Path, default=ROOT.parent.parent / "shared" / "data")
    parser.add_argument("--every", type=int, default=1, help="of so many articles, one")
    args = parser.parse_args()
    if args.out.suffix != ".npy":
        parser.error(f"{args.out}: windows are written as NumPy writes them; give a name that ends in .npy")
    for clone in args.clones:
        if next(readable(clone), None) is None:
            parser.error(
                f"{clone} is no clone with articles (under Page, or in files wiki_NN of WikiExtractor); the "
                "first lines of this file name some"
            )
    chosen = unseen(chain.from_iterable(map(pages, args.clones)), args.every)
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


def readable(clone: Path) -> Iterator[Page]:
    try:
        yield from pages(clone)
    except subprocess.CalledProcessError:
        return


def unseen(found: Iterator[Page], every: int) -> Iterator[Page]:
    """Of every so many articles one, of a title the first."""
    titles: set[str] = set()
    for i, page in enumerate(found):
        title = "".join(filter(str.isalnum, page[0].lower()))
        if i % every == 0 and title not in titles:
            titles.add(title)
            yield page


def _encoded(work):
    return encoded(*work)


if __name__ == "__main__":
    main()
