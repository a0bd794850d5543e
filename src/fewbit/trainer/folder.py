"""The folder of a run: its last checkpoint while it runs, and the model when it has ended.

    OUT.partial/job.json     what this run is; another run's folder is refused
    OUT.partial/state.pt     the last checkpoint of the run
    OUT.partial/ready/       the finished model being put together
    OUT/                     appears by one rename: the model, training.json, losses.jsonl, curve.html

Each file is written under a temporary name, synced and renamed, so a kill at any moment leaves whole files
only. ``state.pt`` holds tensors, numbers and text, and is read with ``weights_only=True``.

Road not taken: checkpoints that pile up, one every n updates. The last one is what resuming needs, and
optimizer states are three times the size of the model.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from fewbit.errors import InputError, WriteError
from fewbit.stream.job import make_folder, write_text

REPORT, ROWS, CURVE = "training.json", "losses.jsonl", "curve.html"


class Folder:
    """The folder ``output`` and its work folder; ``key``: plain data that tells this run from others."""

    def __init__(self, output: Path, key: dict[str, Any]):
        self.output, self.key = output, key
        self.part = output.with_name(output.name + ".partial")
        self.ready = self.part / "ready"
        self._note, self._state = self.part / "job.json", self.part / "state.pt"

    def check(self, resume: bool) -> bool:
        """Whether the output is there already, finished by an equal run; writes nothing.

        Raises ``InputError`` when the output holds something else, when another run's work is in the way,
        when a run would be started over without ``resume``, and when there is nothing to resume.
        """
        if self.output.exists() and (not self.output.is_dir() or any(self.output.iterdir())):
            if resume and _read(self.output / REPORT).get("job") == self.key:
                return True
            raise InputError(
                f"output {self.output} holds something else already; choose another folder with -o or remove "
                "it first"
            )
        before = _read(self._note)
        if self._note.exists() and not resume:
            raise InputError(
                f"{self.part} holds a run that was interrupted; give --resume to go on with it, or remove "
                "the folder to start anew"
            )
        if self._note.exists():
            changed = sorted(k for k in self.key.keys() | before.keys() if self.key.get(k) != before.get(k))
            if changed:
                raise InputError(
                    f"{self.part} holds another run (different {', '.join(changed)}); resume it with the "
                    "options that it was started with, or remove the folder to start anew"
                )
        elif self.part.exists() and any(self.part.iterdir()):
            raise InputError(
                f"{self.part} holds something that is no interrupted run; remove it or choose another -o"
            )
        elif resume:
            raise InputError(f"{self.part} holds no run to resume; leave --resume out to start one")
        return False

    def open(self) -> dict[str, Any] | None:
        """Make or re-enter the work folder; the state of the last checkpoint, or None before the first."""
        make_folder(self.part)
        if not self._note.exists():
            write_text(self._note, json.dumps(self.key, indent=1, sort_keys=True))
        for stray in self.part.glob("*.tmp"):  # a kill in mid-write
            stray.unlink()
        if not self._state.exists():
            return None
        try:
            return torch.load(self._state, map_location="cpu", weights_only=True)
        except Exception as error:  # zip, pickle and storage errors of many kinds
            reason = str(error).strip().splitlines()[0][:100] if str(error).strip() else type(error).__name__
            raise InputError(
                f"{self._state} cannot be read ({reason}); remove {self.part} to start anew"
            ) from None

    def save(self, state: dict[str, Any]) -> None:
        """Put a checkpoint in the place of the last one."""
        temporary = self._state.with_suffix(".tmp")
        try:
            with temporary.open("wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self._state)
        except (OSError, RuntimeError) as error:  # torch's zip writer turns a full disk into a RuntimeError
            temporary.unlink(missing_ok=True)
            reason = getattr(error, "strerror", None) or str(error).splitlines()[0][:100]
            raise WriteError(
                f"cannot write {self._state}: {reason}; free some space and give the same command with "
                "--resume"
            ) from None

    def fresh(self) -> Path:
        """An empty folder for the finished model."""
        shutil.rmtree(self.ready, ignore_errors=True)
        self.ready.mkdir()
        return self.ready

    def commit(self) -> None:
        """Make the finished model appear under its name, and remove the work folder."""
        os.rename(self.ready, self.output)  # onto nothing, or onto an empty folder
        shutil.rmtree(self.part)


def _read(path: Path) -> dict[str, Any]:
    """A JSON file of ours; a damaged or missing one is an empty dict, which equals no run."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
