"""Text in: a file, JSON lines, a hub data set by name, or the text that every CPython carries.

A text is read once into *documents*, the units its source has: the lines of a text file (each keeps its
newline), the rows of JSON lines or of a hub data set. How they are joined again decides perplexity, so it is
a parameter and is reported with every figure. On WikiText-2 raw test the GPT-2 tokenizer gives 287,644 tokens
for ``rows``, the protocol of published figures, 283,287 for ``solid`` and 286,221 for the plain file.

The road not taken: reading any hub data set whole. ``c4`` has 300 GB, a calibration needs 100 KB; rows are
streamed, and the name of the text says when the reading stopped at the limit.
"""

import io
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewbit.errors import InputError

JSON_LINES = (".jsonl", ".ndjson", ".jsonlines", ".json-lines", ".json")
PLAIN = (".txt", ".md", ".text", ".raw", ".rst", ".csv", ".tsv", ".gz", ".zip", ".parquet")
HUB_CHARACTERS = 20_000_000  # of text that is read from one hub data set
EMBEDDED = "embedded"  # the default of calibration
HELD_OUT = "embedded:eval"  # the default of evaluation
PAGE_CHARACTERS, HOLD_OUT_EVERY = 16_000, 8
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?(:[^:]*){0,2}")


class Join(Enum):
    """How documents become one text again; a blank document holds white space alone.

    ``ROWS``: joined by "\\n\\n", blank documents as empty rows: the published WikiText protocol.
    ``SOLID``: blank documents dropped, the rest one after another, each on a line of its own.
    """

    ROWS = "rows"
    SOLID = "solid"


@dataclass(frozen=True)
class Text:
    """Documents as they were read, and the name that reports give them. At least one is not blank."""

    name: str
    documents: tuple[str, ...]

    def __post_init__(self) -> None:
        if not any(document.strip() for document in self.documents):
            raise InputError(
                f"{self.name} holds no text: give a text with at least one line that is not blank"
            )


def read_text(spec: str | Path | None = None) -> Text:
    """The text that ``spec`` names.

    ``None`` or ``embedded``: the default, seven eighths of the language topics of ``pydoc`` (370,000
    characters of English in CPython 3.11 when each paragraph counts once; other versions differ a little,
    so the name tells the version). ``embedded:eval``: the other eighth, which shares no paragraph with it.
    A path: UTF-8 text; ``.jsonl`` and its kin give one document per line, from the field ``text`` or else the
    only field that holds a string. CRLF line ends are read as LF.
    Otherwise ``name[:config][:split]`` of a hub data set (split ``train`` unless told), such as
    ``Salesforce/wikitext:wikitext-2-raw-v1:test``; needs the ``datasets`` package.

    Raises InputError for what does not exist, is no file, is empty, or cannot be decoded.
    """
    if spec is None or spec in (EMBEDDED, HELD_OUT):
        return _embedded(spec or EMBEDDED)
    if not str(spec).strip():
        raise InputError(
            "the name of the text is empty: give a file, a hub data set, or None for the default"
        )
    path = Path(spec).expanduser()
    try:
        kind = "folder" if path.is_dir() else "file" if path.exists() else "nothing"
    except OSError as error:
        raise InputError(f"the text {str(spec)[:80]!r} cannot be looked up: {error.strerror}") from None
    if kind == "folder":
        raise InputError(f"{spec} is a folder: name one text file (.txt, .md, .jsonl) in it")
    if kind == "file":
        return _file(str(spec), path)
    if isinstance(spec, Path) or path.suffix.lower() in JSON_LINES + PLAIN or not _HUB_NAME.fullmatch(spec):
        raise InputError(f"there is no text file {spec}: check the path")
    return _hub(spec)


def join(text: Text, how: Join) -> str:
    """One string out of the documents of ``text``; see `Join`."""
    match how:
        case Join.ROWS:
            return "\n\n".join(document if document.strip() else "" for document in text.documents)
        case Join.SOLID:
            solid = [document for document in text.documents if document.strip()]
            ended = [document if document.endswith("\n") else document + "\n" for document in solid[:-1]]
            return "".join(ended + solid[-1:])
    raise InputError(f"documents cannot be joined by {how!r}: pass Join.ROWS or Join.SOLID")


def token_ids(tokenizer: Any, text: str) -> Tensor:
    """Token ids [n] int64 of ``text`` as it stands: no special token is added in front, behind or between."""
    # verbose=False: a text longer than the model's context is what we came for, not a mistake to warn about.
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)


def _embedded(part: str) -> Text:
    from platform import python_version

    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise InputError(
            "this Python lacks pydoc_data.topics, the embedded default text: name a text file instead"
        ) from None
    # Topics quote each other at length, indented here and not there: a paragraph counts where it is first,
    # or it would be on both sides.
    unique: dict[str, str] = {}
    for name in sorted(topics):
        for paragraph in topics[name].split("\n\n"):
            unique.setdefault(" ".join(paragraph.split()), paragraph.strip("\n"))
    unique.pop("", None)
    pages, characters = [[]], 0
    for paragraph in unique.values():
        if characters >= PAGE_CHARACTERS:
            pages.append([])
            characters = 0
        pages[-1].append(paragraph + "\n")
        characters += len(pages[-1][-1])
    held = HOLD_OUT_EVERY // 2
    chosen = [page for i, page in enumerate(pages) if (i % HOLD_OUT_EVERY == held) == (part == HELD_OUT)]
    lines = io.StringIO("\n".join(paragraph for page in chosen for paragraph in page))
    return Text(f"{part} (pydoc_data.topics of CPython {python_version()})", tuple(lines))


def _file(name: str, path: Path) -> Text:
    try:
        text = path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise InputError(
            f"{name} is not UTF-8 text: byte 0x{byte:02x} at offset {error.start} cannot be decoded; "
            "convert it to UTF-8 or unpack it first"
        ) from None
    except OSError as error:
        raise InputError(f"{name} cannot be read: {error.strerror}") from None
    # StringIO splits at "\n" alone, as the bytes say; str.splitlines would also split at U+2028 or form feed.
    lines = tuple(io.StringIO(text))
    return Text(name, _json_lines(name, lines) if path.suffix.lower() in JSON_LINES else lines)


def _json_lines(name: str, lines: tuple[str, ...]) -> tuple[str, ...]:
    documents, field = [], None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(
                f"line {number} of {name} is not JSON ({error.msg}): JSON lines hold one object per line"
            ) from None
        if not isinstance(row, dict):
            raise InputError(
                f"line {number} of {name} is no JSON object but a {type(row).__name__}: expected one object "
                "per line, with a field 'text'"
            )
        field = field or _text_field(row, f"line {number} of {name}")
        documents.append(_document(row, field, f"line {number} of {name}"))
    return tuple(documents)


def _text_field(row: Mapping[str, Any], where: str) -> str:
    """The field ``text``, or the only one that holds a string."""
    strings = [key for key, value in row.items() if isinstance(value, str)]
    if "text" in row:
        return "text"
    if len(strings) == 1:
        return strings[0]
    raise InputError(
        f"{where} has the fields {_names(row)}: expected a field 'text', or exactly one that holds a string; "
        "rename the right one to 'text'"
    )


def _names(row: Mapping[str, Any]) -> str:
    return ", ".join(row) or "(none)"


def _document(row: Mapping[str, Any], field: str, where: str) -> str:
    value = row.get(field)
    if not isinstance(value, str):
        got = f"has a {type(value).__name__} in it" if field in row else f"has the fields {_names(row)}"
        raise InputError(f"{where} {got}: expected a string in the field {field!r}, as in the row before")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InputError(
            f"{where} holds half a surrogate pair, which is no character: mend the \\ud... escape"
        ) from None
    return value


def _hub(spec: str) -> Text:
    name, config, split = [*spec.split(":"), "", ""][:3]
    try:
        import datasets
    except ImportError:
        raise InputError(
            f"{spec!r} is no file here, and reading it as a hub data set needs the datasets package: "
            "pip install 'fewbit[eval]'"
        ) from None
    documents, field, characters = [], None, 0
    try:
        for number, row in enumerate(
            datasets.load_dataset(name, config or None, split=split or "train", streaming=True), start=1
        ):
            field = field or _text_field(row, f"row {number} of {spec}")
            documents.append(_document(row, field, f"row {number} of {spec}"))
            characters += len(documents[-1])
            if characters >= HUB_CHARACTERS:
                return Text(f"{spec} (its first {number} rows)", tuple(documents))
    except InputError:
        raise
    except Exception as error:  # whatever the network, the hub, or a file format came up with
        reason = (str(error).strip().splitlines() or ["no reason given"])[0]
        raise InputError(
            f"the hub data set {spec!r} cannot be read ({type(error).__name__}: {reason}): "
            "check the connection and name[:config][:split], or name a text file"
        ) from None
    return Text(spec, tuple(documents))
