"""Tasks over files: JSON lines in a folder, checked row by row, beside an lm-eval task as YAML.

A task file is lm-eval's own YAML (``doc_to_text`` and its kin are Jinja templates over the fields of a row).
Under ``metadata`` it says what the file of its rows is called, which fields a row has, and, where the labels
are in a file of their own, what that one is called. Rows are checked against the fields before anything runs,
and only these fields go on.

The road not taken: lm-eval's ``!function`` hooks, Python beside the YAML. Templates say it all, and a task
file that is data can come from anybody.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fewbit.errors import InputError

FILES = Path(__file__).parent / "files"
LOCAL = tuple(sorted(path.stem for path in FILES.glob("*.yaml")))
_KINDS = {"string": str, "integer": int, "boolean": bool}


@dataclass(frozen=True, kw_only=True)
class Local:
    """A task and its rows. ``config``: lm-eval's, without data; ``lines``: of the rows, in the file."""

    name: str
    config: dict[str, Any]
    file: str
    lines: tuple[int, ...]
    rows: tuple[dict[str, Any], ...]

    @property
    def digest(self) -> str:
        """SHA-256 in hex of what is asked: the templates and the rows."""
        said = json.dumps([self.config, self.rows], sort_keys=True)
        return hashlib.sha256(said.encode()).hexdigest()


def read_local(name: str, folder: str | Path) -> Local:
    """The task ``name`` (one of `LOCAL`) over its file in ``folder``.

    Raises InputError for a folder without that file or with several, for labels that are not one to a row,
    and for a row that is no JSON object with the task's fields.
    """
    config = yaml.safe_load((FILES / f"{name}.yaml").read_text(encoding="utf-8"))
    says = config["metadata"]
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder}; name with --task-data the one that holds the tasks")
    path = _one(name, folder, says["rows"])
    numbered = [(n, line) for n, line in enumerate(_lines(path), 1) if line.strip()]
    rows = [_row(path, n, line, says["fields"]) for n, line in numbered]
    if not rows:
        raise InputError(f"{path} is empty; it should hold the questions of {name}, one JSON object per line")
    if "labels" in says:
        labels = _labels(_one(name, folder, says["labels"]), len(rows))
        rows = [row | {"label": label} for row, label in zip(rows, labels, strict=True)]
    return Local(
        name=name,
        config=config,
        file=str(path),
        lines=tuple(n for n, _ in numbered),
        rows=tuple(rows),
    )


def _one(name: str, folder: Path, pattern: str) -> Path:
    """The file in ``folder`` that a pattern names."""
    found = sorted(folder.glob(pattern))
    if len(found) == 1:
        return found[0]
    if not found:
        raise InputError(f"{folder} has no file {pattern}, which holds the task {name}; put it there")
    names = ", ".join(path.name for path in found)
    raise InputError(f"{folder} has several files for the task {name} ({names}); leave one there")


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise InputError(f"{path} cannot be read ({reason}); get the file again") from None


def _row(path: Path, number: int, line: str, fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of a row."""
    where = f"line {number} of {path}"
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{where} is not JSON ({error.msg}); mend it or leave it out") from None
    if not isinstance(row, dict):
        raise InputError(f"{where} is no JSON object; expected the fields {', '.join(fields)}")
    for field, schema in fields.items():
        if field not in row or not _fits(row[field], schema):
            got = f"holds {json.dumps(row[field])[:60]}" if field in row else "is missing"
            raise InputError(f"{where}: the field {field!r} {got}; expected {json.dumps(schema)}")
    return {field: row[field] for field in fields}


def _fits(value: Any, schema: Any) -> bool:
    """Whether a value of JSON has the shape that a task file asks for."""
    if isinstance(schema, list):
        return isinstance(value, list) and all(_fits(item, schema[0]) for item in value)
    if isinstance(schema, dict):
        return isinstance(value, dict) and all(k in value and _fits(value[k], s) for k, s in schema.items())
    return type(value) is _KINDS[schema]


def _labels(path: Path, rows: int) -> list[int]:
    """A whole number per line, as many as there are rows."""
    found = [line.strip() for line in _lines(path) if line.strip()]
    if len(found) != rows:
        raise InputError(f"{path} holds {len(found)} labels for {rows} rows; the two files do not belong")
    for n, label in enumerate(found, 1):
        if not label.isdecimal():
            raise InputError(f"label {n} of {path} is {label[:20]!r}; expected a whole number such as 0 or 1")
    return [int(label) for label in found]
