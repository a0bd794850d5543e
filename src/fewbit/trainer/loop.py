"""The loop: batches, a loss, an update; everything that a resumed run needs in one dict.

    update   for each micro-batch: loss / micro-batches, backward;   clip;   step, unless the norm is Inf or
             NaN;   histories of delayed scaling move on

Autocast, ``LambdaLR`` and ``AdamW`` are torch's; clipping that knows quantized gradients, and leaving out an
update whose gradient is not finite, are ``fewbit.train.Guard``'s. What is here is their order, a row for each
update, and `state`, from which a run goes on bit for bit: model, optimizer, schedule, the random states of
torch on every device, the rows. The position in the data is the number of the update.

Road not taken: ``transformers.Trainer``. It trains these models as well (see docs/training.md), but a resumed
run of it replays the data, and its checkpoints hold pickles.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fewbit.errors import InputError
from fewbit.train import Guard
from fewbit.trainer.data import Corpus, batches
from fewbit.trainer.settings import Settings
from fewbit.trainer.way import Way

STUCK = 10  # updates in a row without a finite gradient after which a run is given up


class Loop:
    """A run in memory: ``model`` on ``device``, its optimizer, and a row for every update so far.

    A row: step (from 1), loss (mean over the batch before the update, nats per token), rate, norm (of the
    gradient before clipping), skipped, and held (held-out loss after the update) where it was taken.
    """

    def __init__(self, model: nn.Module, way: Way, corpus: Corpus, settings: Settings, device: str = "cpu"):
        self.model, self.way, self.corpus, self.settings = model, way, corpus, settings
        self.device = torch.device(device)
        self.optimizer = way.optimizer_for(model, settings)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, settings.rate)
        names = {p: name for name, p in model.named_parameters()}
        self.guard = Guard(self.optimizer, max_norm=settings.clip, names=names)
        self.rows: list[dict[str, Any]] = []
        self.seconds = 0.0  # in updates, over all sittings
        self._batches: Iterator[Tensor] | None = None

    @property
    def done(self) -> int:
        """Updates so far, skipped ones included."""
        return len(self.rows)

    def update(self) -> dict[str, Any]:
        """One more row. Raises ``InputError`` when the last `STUCK` gradients all were not finite."""
        began = time.perf_counter()
        if self._batches is None:
            self._batches = batches(self.corpus.ids, self.settings, first=self.done)
        self.model.train()
        loss = self._backward(next(self._batches).to(self.device, non_blocking=True))
        rate = self.schedule.get_last_lr()[0]
        step = self.guard.step()
        self.way.move_on(self.model)
        self.optimizer.zero_grad()
        self.schedule.step()
        row = {
            "step": self.done + 1,
            "loss": loss,
            "rate": rate,
            "norm": step.norm,
            "skipped": not step.taken,
        }
        self.rows.append(row)
        self.seconds += time.perf_counter() - began
        if self.settings.looks_after(self.done):
            row["held"] = self.held_out()
        if all(r["skipped"] for r in self.rows[-STUCK:]) and self.done >= STUCK:
            raise InputError(
                f"the gradient was not finite in the last {STUCK} updates up to number {self.done}; lower "
                "--lr, or use wider products"
            )
        return row

    def _backward(self, ids: Tensor) -> float:
        """The mean loss over ids [b, l], its gradient left in the parameters."""
        parts = ids.split(self.settings.micro_batch)
        total = ids.new_zeros((), dtype=torch.float32)
        for part in parts:
            with self._autocast():
                loss = self.model(input_ids=part, labels=part, use_cache=False).loss / len(parts)
            loss.backward()
            total += loss.detach()
        return total.item()

    @torch.no_grad()
    def held_out(self, model: nn.Module | None = None) -> float:
        """Mean loss over the held-out windows, nats per token, computed as the run computes."""
        model = self.model if model is None else model
        model.eval()
        total, count = 0.0, len(self.corpus.held)
        for part in self.corpus.held.split(self.settings.micro_batch):
            part = part.to(self.device)
            with self._autocast():
                total += model(input_ids=part, labels=part, use_cache=False).loss.double() * len(part)
        return float(total) / count

    def _autocast(self) -> torch.autocast:
        on = self.settings.precision == "bf16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=on)

    def state(self) -> dict[str, Any]:
        """Tensors, numbers and text alone: ``torch.load(weights_only=True)`` takes it."""
        cuda = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "guard": self.guard.state_dict(),
            "random": torch.get_rng_state(),
            "random_cuda": cuda,
            "rows": json.dumps(self.rows),
            "seconds": self.seconds,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave, on the same kind of device."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.guard.load_state_dict(state["guard"])
        torch.set_rng_state(state["random"].cpu())
        if state["random_cuda"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["random_cuda"].cpu(), self.device)
        self.rows, self.seconds = json.loads(state["rows"]), state["seconds"]
        self._batches = None
