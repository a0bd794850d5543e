"""Scores that outlive the process: one line of JSON for each layer and choice, written when it is known.

    FOLDER/scores.jsonl     {"key": sha256, "layer": name, "choice": words, "weight": t^2, "kl": ..}

The key is made of all that a score depends on: the model's fingerprint, the tokens, the layer, and format,
solver and basis as plain data. So the same command goes on where it was stopped, other formats are added to
those that are there, and a search takes from the folder what a look at the sensitivities has measured. A line
that a kill cut short is dropped; where a key stands twice, the later line adds to the earlier.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from fewbit.errors import InputError, WriteError
from fewbit.format.codec import to_plain
from fewbit.search.errors import Choice

FILE = "scores.jsonl"


class Kept:
    """Scores by layer and choice, in ``folder`` when there is one.

    ``identity``: plain data, equal for equal scores: model, tokens, seed, kind of device. Raises
    ``InputError`` for a file of another kind and ``WriteError`` where no folder can be made.
    """

    def __init__(self, folder: Path | None = None, identity: Mapping[str, object] | None = None):
        self._identity, self._scores = dict(identity or {}), {}
        self._file = None
        if folder is None:
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = folder / FILE
            self._file.touch()
            self._read()
        except OSError as error:
            raise WriteError(
                f"cannot keep scores in {folder}: {error.strerror}; choose another folder"
            ) from None

    def _read(self) -> None:
        data = self._file.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        for line in whole.splitlines():
            try:
                row = json.loads(line)
                self._scores.setdefault(row.pop("key"), {}).update(row)
            except (ValueError, KeyError, AttributeError, TypeError):
                raise InputError(
                    f"{self._file} is not what fewbit sensitivity writes; choose another folder, or remove it"
                ) from None
        if len(whole) < len(data):
            self._file.write_bytes(whole)

    def get(self, layer: str, choice: Choice) -> dict[str, float]:
        """What is known of a layer under a choice: scores by their names."""
        found = self._scores.get(self._key(layer, choice), {})
        return {name: value for name, value in found.items() if name not in ("layer", "choice")}

    def put(self, layer: str, choice: Choice, scores: Mapping[str, float]) -> None:
        """Add scores; they are in the file when this returns."""
        key = self._key(layer, choice)
        row = {"layer": layer, "choice": choice.name, **scores}
        self._scores.setdefault(key, {}).update(row)
        if self._file is not None:
            with self._file.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"key": key, **row}) + "\n")

    def _key(self, layer: str, choice: Choice) -> str:
        said = [self._identity, layer, *(to_plain(x) for x in (choice.format, choice.solver, choice.basis))]
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
