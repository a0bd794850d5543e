"""lm-eval, asked in one call: tasks in, scores with the outcome of every question out.

Questions are put without a chat template and with as many examples in front as the task says itself, nearly
always none. A multiple choice is answered by the likeliest choice (``acc``), or the likeliest per byte
(``acc_norm``); the standard error of a share p of n questions is sqrt(p (1 - p) / (n - 1)).

Several requests go through the model together, the shorter ones filled up behind, which a causal model does
not see; inputs that are quantized by one step for the whole tensor do.
"""

from __future__ import annotations

import difflib
import json
import logging
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fewbit.errors import InputError
from fewbit.evaluate.forward import masked
from fewbit.evaluate.tasks.local import LOCAL, Local, read_local

BATCH = 8


@dataclass(frozen=True, kw_only=True)
class Score:
    """One metric of one task. ``error``: its standard error, where questions are right or wrong;
    ``outcomes``: a character for each question in the order of the task, "1" for right, None for metrics that
    are no share.
    """

    task: str
    metric: str
    value: float
    error: float | None
    questions: int
    outcomes: str | None

    @property
    def key(self) -> str:
        """The task and the metric."""
        return f"{self.task} {self.metric}"

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a model said to all tasks. ``cut``: requests that were longer than the model's context and lost
    their beginning.
    """

    scores: tuple[Score, ...]
    cut: int


@contextmanager
def open_tasks(
    names: Sequence[str], folder: str | Path | None = None, limit: int | None = None
) -> Iterator[Mapping[str, Any]]:
    """lm-eval's tasks by name, ready to be asked, as long as the context lasts.

    With ``folder``, the names in `LOCAL` are read from its files; all others are lm-eval's own, a group
    standing for its tasks. The first ``limit`` questions of each are checked. Raises InputError when
    lm-eval is not installed, for an unknown name, and for data that are missing, broken or out of reach.
    """
    if limit is not None and limit < 1:
        raise InputError(f"the limit is {limit} questions of a task; expected at least 1")
    if not names or len(set(names)) < len(names):
        raise InputError(f"the tasks are {', '.join(names) or 'none'}; name each once, such as piqa,copa")
    local = {name: read_local(name, folder) for name in names if folder is not None and name in LOCAL}
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise InputError("tasks are asked by the lm-eval package; pip install 'fewbit[tasks]'") from None
    others = [name for name in names if name not in local]
    with tempfile.TemporaryDirectory(prefix="fewbit-tasks-") as work, _quiet():
        manager, tasks = TaskManager(include_defaults=bool(others)), {}
        for name in names:
            tasks |= _local(local[name], Path(work), limit) if name in local else _hub(manager, name)
        yield tasks


def answer(
    model: Any,
    tokenizer: Any,
    tasks: Mapping[str, Any],
    *,
    limit: int | None = None,
    batch: int = BATCH,
    progress: Callable[[int, int], None] | None = None,
) -> Asked:
    """Ask a causal language model in evaluation mode the first ``limit`` questions (None: all) of ``tasks``.

    ``batch`` requests go through it together; ``progress(done, total)`` counts them. Raises InputError for a
    model that predicts no next token.
    """
    if batch < 1:
        raise InputError(f"{batch} requests cannot go through the model together; expected at least 1")
    if masked(model) or model.config.is_encoder_decoder or model.get_output_embeddings() is None:
        raise InputError(f"{type(model).__name__} predicts no next token, so it cannot be asked tasks")
    from lm_eval.evaluator import evaluate

    for task in tasks.values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=1234)
    with _quiet():
        lm = _language_model()(model, tokenizer, batch, progress)
        found = evaluate(lm, {"tasks": dict(tasks)}, limit=limit, bootstrap_iters=0)
    results, samples = found["results"], found["samples"]
    scores = (s for name, task in tasks.items() for s in _scores(task, name, results[name], samples[name]))
    return Asked(scores=tuple(scores), cut=lm.cut)


def _local(task: Local, work: Path, limit: int | None) -> dict[str, Any]:
    """A task over rows of ours."""
    from lm_eval.api.task import ConfigurableTask

    data = work / f"{task.name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in task.rows), encoding="utf-8")
    kwargs = {"data_files": {"test": str(data)}, "cache_dir": str(work / "arrow")}
    made = None
    for line, row in list(zip(task.lines, task.rows, strict=True))[:limit]:
        try:
            made = made or ConfigurableTask(config={**task.config, "dataset_kwargs": kwargs})
            _check(made, row)
        except Exception as error:  # whatever a template makes of a row
            reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            raise InputError(
                f"line {line} of {task.file} is no question of {task.name} ({reason.rstrip(': ')}); mend it "
                "or leave it out"
            ) from None
    return {task.name: made}


def _check(task: Any, row: dict[str, Any]) -> None:
    """Raise what the templates raise, and IndexError for an answer that is no choice."""
    task.doc_to_text(row)
    target = task.doc_to_target(row)
    if task.OUTPUT_TYPE == "multiple_choice":
        choices = task.doc_to_choice(row)
        if type(target) is not int or not 0 <= target < len(choices):
            raise IndexError(f"the answer is {target!r} of {len(choices)} choices")


def _hub(manager: Any, name: str) -> dict[str, Any]:
    """lm-eval's own tasks of that name."""
    if name not in manager.task_index:
        near = difflib.get_close_matches(name, {*LOCAL, *manager.all_tasks}, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "`lm-eval ls tasks` lists its own"
        raise InputError(f"there is no task {name!r}; {hint}")
    try:
        return manager.load([name])["tasks"]
    except Exception as error:  # the hub, the network, a data set that is gone
        reason = (str(error).strip().splitlines() or ["no reason given"])[0]
        here = f", or name with --task-data a folder that holds {name}" if name in LOCAL else ""
        raise InputError(
            f"the task {name} of lm-eval cannot be loaded ({type(error).__name__}: {reason[:160]}); check "
            f"the connection{here}"
        ) from None


def _scores(task: Any, name: str, results: dict[str, Any], samples: list[dict[str, Any]]) -> Iterator[Score]:
    """All metrics of a task, in the order in which it lists them."""
    listed = [metric["metric"] for metric in task.config.metric_list or ()]
    place = {metric: i for i, metric in enumerate(listed)}
    for key, value in sorted(results.items(), key=lambda r: place.get(r[0].partition(",")[0], len(place))):
        metric, comma, filtered = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        each = [s.get(metric) for s in samples if s["filter"] == filtered]
        outcomes = None
        if each and all(isinstance(x, int | float) and x in (0, 1) for x in each):
            outcomes = "".join(str(int(x)) for x in each)
        n = len(each)
        error = math.sqrt(value * (1 - value) / (n - 1)) if outcomes and n > 1 else None
        yield Score(
            task=name,
            metric=metric if filtered == "none" else f"{metric} ({filtered})",
            value=float(value),
            error=error,
            questions=n,
            outcomes=outcomes,
        )


def _language_model() -> type:
    """lm-eval's transformers model, told to count what it does."""
    try:
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise InputError(f"lm-eval cannot run models here ({error}); pip install 'fewbit[tasks]'") from None

    class Counted(HFLM):
        def __init__(self, model: Any, tokenizer: Any, batch: int, progress: Any):
            super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch)
            self.cut, self._done, self._total, self._progress = 0, 0, 0, progress

        def _loglikelihood_tokens(self, requests: Any, *args: Any, **kwargs: Any) -> Any:
            self.cut += sum(len(c) + len(t) > self.max_length + 1 for _, c, t in requests)
            self._done, self._total = 0, len(requests)
            found = super()._loglikelihood_tokens(requests, *args, **kwargs)
            self._tell(self._total)  # requests that share all but the last token ran as one
            return found

        def _model_call(self, inps: Any, *args: Any, **kwargs: Any) -> Any:
            out = super()._model_call(inps, *args, **kwargs)
            self._tell(self._done + len(inps))
            return out

        def _tell(self, done: int) -> None:
            for n in range(self._done + 1, min(done, self._total) + 1):
                if self._progress is not None:
                    self._progress(n, self._total)
            self._done = done

    return Counted


@contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval says what it does in dozens of lines; what a user must know is said by us."""
    from tqdm import tqdm

    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets")]
    before, bar = [logger.level for logger in loggers], tqdm.__init__
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    # Not all of lm-eval's bars can be turned off by arguments.
    tqdm.__init__ = lambda self, *args, **kwargs: bar(self, *args, **(kwargs | {"disable": True}))
    try:
        yield
    finally:
        tqdm.__init__ = bar
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
