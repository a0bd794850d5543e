"""An encoder with quantizers at its sums and outputs: rounded, calibrated, written, and read back.

    token table and weights are rounded -> sentences run -> every site gets its steps -> file -> loaded again

Encoders are small, so the whole model is in memory at once, in float32 on a CPU; the plan says how much that
takes. The road not taken: the loop over suspended blocks. Sites are calibrated after the last weight is
rounded, so every block would have to be read again, and the embedding sum lies outside of all blocks.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from fewbit.errors import InputError
from fewbit.format import Stats
from fewbit.io import native
from fewbit.io.load import load
from fewbit.io.skeleton import materialize
from fewbit.io.source import check_finite
from fewbit.nn.sites import place
from fewbit.solve import SolverWarning
from fewbit.stream.blocks import set_weight, weight_of
from fewbit.stream.choose import error
from fewbit.stream.planned import Plan, PlannedLayer
from fewbit.stream.progress import LayerRow, Progress
from fewbit.stream.sites import calibrate
from fewbit.stream.verify import compare
from fewbit.stream.weights import Rounded, tensor

Batch = Mapping[str, Tensor]


class Encoder:
    """One run. ``rows``: what ``round`` reports; ``tensors``: all that the file will hold."""

    def __init__(self, plan: Plan, model: nn.Module, mapping: dict[str, str], progress: Progress):
        """``model``: a skeleton, which this fills."""
        self.plan, self.model, self.mapping, self.progress = plan, model, mapping, progress
        self.rows: list[LayerRow] = []
        self.tensors: dict[str, Tensor] = {}

    @torch.no_grad()
    def run(self, sentences: Sequence[Batch]) -> None:
        """Round, calibrate, and keep what the model then answers to the first sentences."""
        plan, device = self.plan, self.plan.device
        dtype = torch.float32 if device == "cpu" else plan.source.dtype
        coded = {f"{layer.module}.weight" for layer in plan.layers}
        stored = Rounded(plan.source)
        plain = [n for n in self.mapping if n not in coded]
        materialize(self.model, coded, plan.source, self.mapping, device, dtype)
        materialize(self.model, plain, stored, self.mapping, device, dtype)
        for name in self.mapping:
            check_finite(self.mapping[name], tensor(self.model, name))
        self.tensors |= stored.read(sorted({self.mapping[n] for n in plain}))
        self._round()
        sentences = [{k: v.to(device) for k, v in batch.items()} for batch in sentences]
        if sentences:
            self.progress.phase(f"calibrating {len(plan.sites)} tensors")
        quantizers = calibrate(self.model, plan.sites, sentences)
        place(self.model, quantizers)
        for site in plan.sites:
            found = quantizers[site.place.site].named_buffers()
            self.tensors |= {f"{site.entry.name}.{n}": b.to("cpu") for n, b in found}
        self.witness = sentences[0] if sentences else {"input_ids": self._some_ids()}
        self.expected = self._answer(self.model)
        self.model.to("meta")  # what reads the file needs the memory

    def check(self, folder) -> float:
        """Load the checkpoint as a user would; the largest difference of its answer, relative.

        Raises ``InputError`` when it is not that of the run.
        """
        with torch.no_grad():
            return compare(folder, self._answer(load(folder, self.plan.device)), self.expected)

    def _round(self) -> None:
        """Quantize the weights in place, block by block, the token table first."""
        layers = sorted(self.plan.layers, key=lambda layer: layer.block)
        last = max(layer.block for layer in layers) + 1
        for at, layer in enumerate(layers):
            self._solve(layer)
            ends = at + 1 == len(layers) or layers[at + 1].block != layer.block
            if ends and layer.block >= 0:
                self.progress.block(layer.block + 1, last, False)
        self.rows.sort(key=lambda row: row.layer)

    def _solve(self, layer: PlannedLayer) -> None:
        start, module = time.perf_counter(), self.model.get_submodule(layer.module)
        w = weight_of(module).detach().float()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", SolverWarning)
            q = layer.rule.solver(w, Stats(), layer.format)
        row = LayerRow(
            layer=layer.name,
            format=layer.text,
            solver=type(layer.rule.solver).__name__.lower(),
            bits_per_weight=layer.bits_per_weight,
            error=error(w, q.dequantize(), None),
            tokens=0,
            notes=tuple(str(c.message) for c in caught if issubclass(c.category, SolverWarning)),
        )
        if not math.isfinite(row.error):
            raise InputError(f"layer {layer.name} became NaN in quantization; check its weights")
        set_weight(module, q.dequantize())
        self.tensors |= native.to_dict(layer.name, q.to("cpu"))
        self.rows.append(row)
        self.progress.layer(row, time.perf_counter() - start)

    def _some_ids(self) -> Tensor:
        """A few token ids, for a run without sentences."""
        vocabulary = self.model.get_input_embeddings().num_embeddings
        return (torch.arange(1, 33, device=self.plan.device) * 7919 % vocabulary)[None]

    def _answer(self, model: nn.Module) -> Tensor:
        """Last hidden states or logits for the witness, float32 on the CPU; zero where it is padded."""
        out = model(**self.witness)[0].float().cpu()
        mask = self.witness.get("attention_mask")
        if mask is None or mask.shape != out.shape[:2]:
            return out
        return out * mask.cpu()[..., None]
