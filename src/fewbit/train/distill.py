"""Distillation: a model teaches its quantized copy what it expects of every next token.

    L = mean over tokens t of  KL(p_t || q_t),   p = softmax(teacher), q = softmax(student), whole vocabulary
    dL/d(student's logits) = (q - p) / tokens

LLM-QAT, Liu et al. 2023, https://arxiv.org/abs/2305.17888: cross-entropy against the teacher's distribution
(section 2.2, eq. 3), whose gradient is that of KL. Text that the teacher wrote: `writing.py`.

Logits of a batch are larger than everything else in it: 16,384 tokens of a vocabulary of 49,152 are 3.2 GB in
float32, and the loss would hold several such. So `kd_loss` takes the last hidden states, computes logits
some tokens at a time, and has the gradient before it lets them go: nothing is kept, nothing computed twice.

Shapes: n tokens, d hidden size, v vocabulary.

Road not taken: the sampled token as a hard label. It says one word where the teacher says how likely each of
them is.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fewbit.errors import InputError

Divergence = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def forward_kl(teacher: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [n, v] of both, any float dtype -> sum over n of KL(p || q) in nats, its gradient [n, v].

    float32 inside; the gradient is in the student's dtype.
    """
    p, q = teacher.float().log_softmax(-1), student.float().log_softmax(-1)
    share = p.exp()
    return (share * (p - q)).sum(), (q.exp() - share).to(student.dtype)


def kd_loss(
    student: Tensor,
    teacher: Tensor,
    head: nn.Module,
    teacher_head: nn.Module | None = None,
    *,
    chunk: int = 2048,
    divergence: Divergence = forward_kl,
) -> Tensor:
    """Mean divergence over tokens, from last hidden states [..., d], those that the heads read; a scalar.

    head: from the student's states to logits, trained as well where its parameters require gradients;
    teacher_head: the teacher's, the same one where None. chunk: tokens whose logits exist at a time.
    divergence: from logits (teacher's, student's) to the sum over tokens and its gradient;
    ``torch.compile(forward_kl)`` saves most of its time on a GPU. Raises ``InputError`` where the two do not
    hold the same tokens.
    """
    if student.shape[:-1] != teacher.shape[:-1] or not student.numel():
        raise InputError(
            f"hidden states {list(student.shape)} of the student and {list(teacher.shape)} of the teacher "
            "are not of the same tokens; give both models the same windows"
        )
    trained = [p for p in head.parameters() if p.requires_grad]
    run = _Run(head, head if teacher_head is None else teacher_head, trained, chunk, divergence)
    rows = student.reshape(-1, student.shape[-1]), teacher.detach().reshape(-1, teacher.shape[-1])
    return _Chunked.apply(run, *rows, *trained)


class _Run:
    """The sum over chunks, with its gradients."""

    def __init__(self, head, teacher_head, trained, chunk, divergence):
        self.head, self.teacher_head, self.trained = head, teacher_head, trained
        self.chunk, self.divergence = chunk, divergence

    def __call__(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Mean divergence; gradients of the student's states [n, d] and of the head's parameters."""
        total, n = student.new_zeros((), dtype=torch.float32), len(student)
        states, rest = [], [torch.zeros_like(p) for p in self.trained]
        for own, other in zip(student.split(self.chunk), teacher.split(self.chunk), strict=True):
            with torch.no_grad():
                target = self.teacher_head(other)
            with torch.enable_grad():
                own = own.detach().requires_grad_()
                logits = self.head(own)
            part, grad = self.divergence(target, logits.detach())
            total += part
            first, *others = torch.autograd.grad(logits, [own, *self.trained], grad / n)
            states.append(first)
            for held, found in zip(rest, others, strict=True):
                held += found
        return total / n, [torch.cat(states), *rest]


class _Chunked(torch.autograd.Function):
    """The loss, whose gradients are known when it is."""

    @staticmethod
    def forward(ctx, run, student, teacher, *trained):
        loss, grads = run(student, teacher)
        ctx.save_for_backward(*grads)
        return loss

    @staticmethod
    def backward(ctx, grad):
        states, *rest = (grad * g for g in ctx.saved_tensors)
        return None, states, None, *rest
