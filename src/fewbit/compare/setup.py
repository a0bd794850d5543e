"""What all rows of a comparison share, and how a row is known again.

A row is the same when its recipe, the model, the calibration tokens, the evaluation windows, the questions of
the tasks, the kind of device, the dtype and the versions of the packages that compute are the same. Texts and
questions count by what they say and not by what their files are called. What remains without device, dtype
and versions are the terms: rows that share them may stand in one table.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewbit.errors import InputError
from fewbit.evaluate import Protocol, windows
from fewbit.io.base import content_hash
from fewbit.io.source import open_source
from fewbit.io.text import HELD_OUT, read_text
from fewbit.recipe import Recipe
from fewbit.stream.data import Calibration, sample_tokens, token_hash


@dataclass(frozen=True, kw_only=True)
class Setup:
    """Model, calibration and evaluation of all rows.

    ``data``: the text of evaluation, as `fewbit.io.text.read_text` takes it; ``tasks``, ``task_data``,
    ``limit``, ``batch``: as in `fewbit.evaluate.tasks`; ``dtype``: None for float32 on a CPU and the
    checkpoint's elsewhere.
    """

    model: str
    calibration: Calibration = field(default_factory=Calibration)
    data: str = HELD_OUT
    protocol: Protocol = field(default_factory=Protocol)
    tasks: tuple[str, ...] = ()
    task_data: Path | None = None
    limit: int | None = None
    batch: int = 8
    device: str = "cpu"
    dtype: torch.dtype | None = None


@dataclass(frozen=True, kw_only=True)
class Ready:
    """A setup that has been found sound. ``tokens``: the windows [w, l] of evaluation; ``identity``: plain
    data that is equal for equal setups; ``weights``: of the model's weight files alone, since each version of
    transformers writes another config beside them; ``text``: the name of the evaluation text.
    """

    setup: Setup
    tokens: Tensor
    text: str
    identity: dict[str, Any]
    weights: str

    def key(self, recipe: Recipe | None) -> str:
        """SHA-256 in hex of all that a row depends on; None: the row of the original."""
        said = [self.identity, None if recipe is None else recipe.to_yaml()]
        return _digest(said)

    @property
    def terms(self) -> str:
        """SHA-256 in hex of weights, calibration, evaluation and questions: what rows of several devices and
        versions share that may stand side by side.
        """
        said = {key: self.identity[key] for key in ("calibration", "evaluation", "tasks")}
        return _digest(said | {"weights": self.weights})


def _digest(said: Any) -> str:
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def make_ready(setup: Setup) -> Ready:
    """Read all that rows share. Raises InputError for whatever cannot be worked with."""
    source = open_source(setup.model)
    tokenizer = source.tokenizer()
    text = read_text(setup.data)
    tokens = windows(tokenizer, text, setup.protocol)
    calibration = sample_tokens(setup.calibration, tokenizer)
    identity = {
        "model": source.fingerprint(),
        "calibration": token_hash(calibration),
        "evaluation": [token_hash(tokens), setup.protocol.step, setup.protocol.chunk],
        "tasks": _tasks(setup),
        "device": torch.device(setup.device).type,
        "dtype": str(setup.dtype),
        "versions": _versions(),
    }
    files = getattr(source, "files", None) or [source.path]  # of a folder, or the one GGUF file
    weights = content_hash((path.name, path, 0) for path in files)
    return Ready(setup=setup, tokens=tokens, text=text.name, identity=identity, weights=weights)


def _tasks(setup: Setup) -> dict[str, Any]:
    """What the model is asked, by task."""
    if not setup.tasks:
        if setup.limit is not None or setup.task_data is not None:
            raise InputError(
                "a limit and a folder of questions belong to tasks; name tasks, or leave them out"
            )
        return {}
    from fewbit.evaluate.tasks import LOCAL, open_tasks, read_local

    with open_tasks(setup.tasks, setup.task_data, setup.limit):  # raises whatever is wrong with them
        pass
    own = [name for name in setup.tasks if setup.task_data is not None and name in LOCAL]
    digests = {name: read_local(name, setup.task_data).digest for name in own}
    return {name: digests.get(name, "lm-eval") for name in setup.tasks} | {
        "limit": setup.limit,
        "batch": setup.batch,
    }


def _versions() -> dict[str, str]:
    import transformers

    import fewbit

    return {
        "fewbit": fewbit.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
