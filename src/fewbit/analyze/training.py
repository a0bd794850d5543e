"""How much memory training takes: full mixed precision, QAT, FP8 after FP8-LM, and QLoRA.

Per parameter, in bytes:

    |        | gradient | master | Adam m | Adam v | sum | copy that computes      |
    | bf16   | 4        | 4      | 4      | 4      | 16  | 2 (BF16)                |
    | qat    | 4        | 4      | 4      | 4      | 16  | 2, and 2 fake-quantized |
    | fp8-lm | 1 (FP8)  | 2      | 1      | 2      | 6   | 1 (linears), 2 (others) |
    | qlora  | 2        | -      | 4      | 4      | 10  | 2; of the adapters only |

16 and 6 are the counts of Peng et al. 2023, "FP8-LM", https://arxiv.org/abs/2310.18313: FP32 gradient, master
weight and both moments, against FP8 gradient, FP16 master with a tensor scale, FP8 first and FP16 second
moment. They leave out the copy that the matrix products read; it is counted beside them here. (The other 16
in use, 2 + 2 + 4 + 4 + 4 with 16-bit weights and gradients, has the copy inside.) QAT learns one step per
group, each with its gradient and moments (16 bytes). QLoRA: Dettmers et al. 2023,
https://arxiv.org/abs/2305.14314: NF4 base with double quantization, and BF16 adapters of rank r on every
linear of the blocks.

Activations that autograd keeps, bytes per token and block, after Korthikanti et al. 2022, "Reducing
Activation Recomputation in Large Transformer Models", https://arxiv.org/abs/2205.05198 (eq. 1: 34 h + 5 a s),
taken apart for models of today in 16 bits, without dropout and with an attention that keeps no scores (no a s
term):

    norm       6 w + 4      RMSNorm as transformers writes it: FP32 copy 4, normalised 2, 1/rms 4 per row
               2 w + 8      LayerNorm: input 2; mean and 1/std in FP32
    inputs     2 h          of q, k, v; and again of gate, up
    attention  4 q + 2 k + 2 v + 4 a     q, k, v, output (which is o's input); log-sum-exp in FP32
    MLP        8 f          gate, its activation, up, and their product (down's input); 4 f without a gate

(w: width of the norm; h, q, k, v, f, a: residual stream, queries, keys, values, hidden layer of the MLP,
heads.) Behind the blocks: the last norm and input of the head, and 4 V for the log-probabilities in FP32 (V:
vocabulary); while the loss is computed the logits are there in 16 and 32 bits as well, 6 V. With
checkpointing each block keeps its input, 2 h, and one block at a time is computed again, when what stood
behind the blocks is gone. FP8 halves the inputs that linears keep (q/k/v, gate/up, down); o's is a copy of
its own then (1 q), because attention keeps its output in 16 bits. QAT keeps every linear input a second time,
fake-quantized.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from enum import StrEnum

from fewbit.analyze.anatomy import Anatomy, Widths
from fewbit.analyze.gpus import BF16, FP8, Gpu, holding
from fewbit.analyze.memory import SCHEMES, check_load, weights
from fewbit.errors import InputError


class Inputs(StrEnum):
    """How the linears keep their inputs for the backward pass."""

    PLAIN = "16 bits"
    FAKE = "16 bits, and again fake-quantized"
    FP8 = "FP8"


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way to train. Bytes per trained parameter of gradient, master weight, and the two Adam moments.

    ``linear_copy`` and ``rest_copy``: bytes per parameter of what computes, for linears of the blocks and the
    rest. ``least``: compute capability of the arithmetic.
    """

    name: str
    gradient: int
    master: int
    m: int
    v: int
    linear_copy: int
    rest_copy: int
    inputs: Inputs
    least: tuple[int, int]

    @property
    def state(self) -> int:
        """Bytes per trained parameter: gradient, master weight, moments."""
        return self.gradient + self.master + self.m + self.v


FULL = Method(
    name="full, BF16 mixed, Adam",
    gradient=4,
    master=4,
    m=4,
    v=4,
    linear_copy=2,
    rest_copy=2,
    inputs=Inputs.PLAIN,
    least=BF16,
)
QAT = replace(FULL, name="QAT, W4 g{}, learned steps", linear_copy=4, inputs=Inputs.FAKE)
FP8_LM = Method(
    name="FP8-LM",
    gradient=1,
    master=2,
    m=1,
    v=2,
    linear_copy=1,
    rest_copy=2,
    inputs=Inputs.FP8,
    least=FP8,
)
ADAPTERS = replace(FULL, name="QLoRA, NF4 base, rank {}", gradient=2, master=0)


@dataclass(frozen=True, kw_only=True)
class Training:
    """Bytes to train a model by one method. Activations are None where they are not modelled.

    state: gradients, master weights, moments; copy: what computes, the frozen base included; extra: learned
    steps of QAT. ``gpus`` hold the total with checkpointing beside their reserve.
    """

    method: str
    per_parameter: int
    trained: int
    state: int
    copy: int
    extra: int
    activations: int | None
    checkpointed: int | None
    total: int | None
    total_checkpointed: int | None
    gpus: tuple[Gpu, ...]


def saved_per_block(w: Widths, inputs: Inputs = Inputs.PLAIN) -> int:
    """Bytes per token that autograd keeps in one block."""
    wide = w.rms + w.layer_norm
    reads = w.hidden * min(2, max(wide, 1))  # one norm for both branches: they share their input
    norms = w.rms * (6 * w.hidden + 4) + w.layer_norm * (2 * w.hidden + 8) + 6 * w.head_norm
    attention = 4 * w.query + 2 * w.key + 2 * w.value + 4 * w.heads
    mlp = (8 if w.gated else 4) * w.ffn
    plain = norms + 2 * reads + attention + mlp
    if inputs is Inputs.FAKE:
        return plain + 2 * (reads + w.query + w.ffn)
    return plain - reads - w.ffn + w.query if inputs is Inputs.FP8 else plain


def saved_behind(model: Anatomy) -> int:
    """Bytes per token that autograd keeps behind the blocks: norm, input of the head, log-probabilities."""
    w = model.widths
    norm = 6 * w.hidden + 4 if w.rms else 2 * w.hidden + 8
    return norm + 2 * w.hidden + 4 * model.vocabulary


def activation_bytes(model: Anatomy, context: int, batch: int, inputs: Inputs) -> tuple[int, int] | None:
    """(kept in full, with every block checkpointed), at their peak; None where they are not modelled.

    In full the peak is at the loss; with checkpointing it is there, or later in the block computed again.
    """
    if model.widths is None:
        return None
    block, tokens = saved_per_block(model.widths, inputs), context * batch
    behind = saved_behind(model) + 6 * model.vocabulary
    checkpointed = model.blocks * 2 * model.widths.hidden + max(block, behind)
    return tokens * (model.blocks * block + behind), tokens * checkpointed


def training(model: Anatomy, context: int, batch: int, rank: int = 64) -> tuple[Training, ...]:
    """One row per method, for ``batch`` sequences of ``context`` tokens; ``rank`` of QLoRA's adapters.

    Raises ``InputError`` for numbers that are not positive.
    """
    check_load(model, context, batch)
    if rank < 1:
        raise InputError(f"adapters of rank {rank} are not possible; give 1 or more")
    quantized = {s.name: weights(model, s) for s in SCHEMES}
    w4, nf4 = quantized["W4A16 g{} symmetric"], quantized["nf4 g{} double quantization"]
    rows = [_full(model, FULL, context, batch), _full(model, FP8_LM, context, batch)]
    if w4.nbytes is not None:
        groups = sum(math.prod(w4.format.block.scale_shape(shape)) for shape in model.linears)
        qat = replace(QAT, name=QAT.name.format(w4.format.block.size))
        rows.insert(1, _full(model, qat, context, batch, extra=16 * groups))
    if nf4.nbytes is not None:
        adapters = sum(rank * sum(shape) for shape in model.linears)
        method = replace(ADAPTERS, name=ADAPTERS.name.format(rank))
        largest = 2 * max(math.prod(shape) for shape in model.linears)  # decoded while it computes
        base = nf4.nbytes + largest + 2 * adapters
        rows.append(_row(model, method, context, batch, trained=adapters, copy=base, extra=0))
    return tuple(rows)


def _full(model: Anatomy, method: Method, context: int, batch: int, extra: int = 0) -> Training:
    copy = method.linear_copy * model.linear_parameters + method.rest_copy * model.rest
    return _row(model, method, context, batch, trained=model.parameters, copy=copy, extra=extra)


def _row(
    model: Anatomy, method: Method, context: int, batch: int, *, trained: int, copy: int, extra: int
) -> Training:
    both = activation_bytes(model, context, batch, method.inputs)
    full, checkpointed = both or (None, None)
    fixed = trained * method.state + copy + extra
    total = None if checkpointed is None else fixed + checkpointed
    return Training(
        method=method.name,
        per_parameter=method.state,
        trained=trained,
        state=trained * method.state,
        copy=copy,
        extra=extra,
        activations=full,
        checkpointed=checkpointed,
        total=None if full is None else fixed + full,
        total_checkpointed=total,
        gpus=() if total is None else holding(total, method.least),
    )
