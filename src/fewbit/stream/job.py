"""The folder of a run in progress: finished blocks, atomically, and the way from there to a checkpoint.

    OUT.partial/job.json              what this run is; another run's folder is refused
    OUT.partial/block-00007.safetensors   one finished block, rows of the report in its metadata
    OUT.partial/ready/                the checkpoint being put together; renamed to OUT as the last act

Each file is written under a temporary name, synced and renamed, so a kill at any moment leaves whole files
only, and the same command goes on from the last one. Nothing in these files depends on the clock or on where
the run was interrupted: a resumed result is bit for bit that of an uninterrupted one.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from fewbit.errors import InputError, WriteError
from fewbit.io.checkpoint import save_tensors
from fewbit.stream.progress import LayerRow

MANIFEST = "fewbit_manifest.json"
RECIPE = "fewbit_recipe.yaml"
SHARD_BYTES = 1 << 28  # a shard is put together in memory, so this bounds it; a larger block is a shard


class Job:
    """One output folder and its work folder. ``key`` identifies the run: plain data, equal for equal
    results.
    """

    def __init__(self, output: Path, key: dict):
        self.output = output
        self.part = _part(output)
        self.ready = self.part / "ready"
        self.key = key

    def open(self) -> bool:
        """Make or re-enter the work folder. True when the output is there already, finished by an equal run.

        Raises ``InputError`` when the output folder holds something else, or the work folder is another
        run's.
        """
        if self.output.exists() and (not self.output.is_dir() or any(self.output.iterdir())):
            manifest = self.output / MANIFEST
            if manifest.is_file() and _read_json(manifest).get("job") == self.key:
                shutil.rmtree(self.part, ignore_errors=True)
                return True
            raise InputError(
                f"output {self.output} holds something else already; choose another folder with -o or "
                "remove it first"
            )
        note = self.part / "job.json"
        if note.exists():
            before = _read_json(note)
            changed = sorted(k for k in self.key.keys() | before.keys() if self.key.get(k) != before.get(k))
            if changed:
                raise InputError(
                    f"{self.part} holds the finished blocks of another run (different "
                    f"{', '.join(changed)}); run that "
                    "command again, or remove the folder to start anew"
                )
        elif self.part.exists() and any(self.part.iterdir()):
            raise InputError(
                f"{self.part} holds something that is no interrupted run; remove it or choose another -o"
            )
        else:
            make_folder(self.part)
            write_text(note, json.dumps(self.key, indent=1, sort_keys=True))
        for stray in self.part.glob("*.tmp*"):  # a kill in mid-write
            stray.unlink()
        return False

    def _file(self, block: int) -> Path:
        return self.part / f"block-{block:05d}.safetensors"

    def finished(self, block: int) -> bool:
        """Whether this block's file is there (then it is whole)."""
        return self._file(block).exists()

    def store(self, block: int, tensors: dict[str, Tensor], rows: list[LayerRow]) -> None:
        """Write one finished block and its report rows, atomically."""
        save_tensors(self._file(block), tensors, {"rows": json.dumps([r.as_dict() for r in rows])})

    def load(self, block: int) -> tuple[dict[str, Tensor], list[LayerRow]]:
        """A finished block: its tensors as owned memory, and its rows."""
        with safe_open(self._file(block), framework="pt") as f:
            tensors = {n: f.get_tensor(n).clone() for n in f.keys()}  # noqa: SIM118 - not a dict
            rows = json.loads(f.metadata()["rows"])
        return tensors, [LayerRow(**{**r, "notes": tuple(r["notes"])}) for r in rows]

    def assemble(self, blocks: int, outer: dict[str, Tensor]) -> None:
        """Put the blocks' tensors and ``outer`` into shards under ``ready``, with an index where there are
        several.
        """
        shutil.rmtree(self.ready, ignore_errors=True)
        self.ready.mkdir()
        shards: list[list[int]] = [[]]
        size = sum(t.nbytes for t in outer.values())
        for i in range(blocks):
            nbytes = self._file(i).stat().st_size
            if size + nbytes > SHARD_BYTES and (shards[-1] or i):
                shards.append([])
                size = 0
            shards[-1].append(i)
            size += nbytes
        index: dict[str, str] = {}
        total = 0
        for s, members in enumerate(shards):
            tensors = dict(outer) if s == 0 else {}
            for i in members:
                tensors.update(self.load(i)[0])
            name = (
                "model.safetensors"
                if len(shards) == 1
                else f"model-{s + 1:05d}-of-{len(shards):05d}.safetensors"
            )
            save_tensors(self.ready / name, tensors)
            index.update(dict.fromkeys(tensors, name))
            total += sum(t.nbytes for t in tensors.values())
        if len(shards) > 1:
            text = json.dumps(
                {"metadata": {"total_size": total}, "weight_map": index}, indent=2, sort_keys=True
            )
            write_text(self.ready / "model.safetensors.index.json", text)

    def discard(self) -> None:
        """Remove the work folder: nothing in it can be used again."""
        shutil.rmtree(self.part, ignore_errors=True)

    def commit(self) -> None:
        """Make the finished checkpoint appear under its name, and remove the work folder."""
        self.output.parent.mkdir(parents=True, exist_ok=True)
        os.rename(self.ready, self.output)  # onto nothing, or onto an empty folder
        shutil.rmtree(self.part)


def _part(output: Path) -> Path:
    """The work folder beside an output folder."""
    return output.with_name(output.name + ".partial")


def depth_of_interrupted(output: Path) -> str | None:
    """Where an interrupted run into ``output`` suspends its forwards ("linear" or "block"), None without
    one.
    """
    return _read_json(_part(output) / "job.json").get("depth")


def make_folder(path: Path) -> None:
    """The folder, and those above it. Raises ``WriteError``."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WriteError(f"cannot make the folder {path}: {error.strerror}; choose another -o") from None


def write_text(path: Path, text: str) -> None:
    """Write a text file under a temporary name, sync, rename. A full disk is one ``InputError``."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise WriteError(
            f"cannot write {path}: {error.strerror}; free some space or choose another -o"
        ) from None


def _read_json(path: Path) -> dict:
    """A JSON file of ours; a damaged one is an empty dict, which equals no run."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
