"""Distillation without data: a model teaches its quantized copy on text that it wrote itself.

    L = mean over tokens t of  KL(p_t || q_t),   p = softmax(teacher), q = softmax(student), whole vocabulary
    dL/d(student's logits) = (q - p) / tokens

LLM-QAT, Liu et al. 2023, https://arxiv.org/abs/2305.17888: cross-entropy against the teacher's distribution
(section 2.2, eq. 3), whose gradient is that of KL; text sampled from the teacher from a random first token,
the next 3 to 5 by its largest probability, the rest at random (section 2.1, hybrid sampling).

Logits of a batch are larger than everything else in it: 16,384 tokens of a vocabulary of 49,152 are 3.2 GB in
float32, and the loss would hold several such. So `kd_loss` takes the last hidden states, computes logits
some tokens at a time, and has the gradient before it lets them go: nothing is kept, nothing computed twice.

Shapes: n tokens, d hidden size, v vocabulary.

Road not taken: the sampled token as a hard label. It says one word where the teacher says how likely each of
them is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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


@torch.no_grad()
def sample_text(
    model: Any,
    count: int,
    length: int,
    *,
    generator: torch.Generator | None = None,
    prompts: Tensor | None = None,
    greedy: tuple[int, int] = (3, 5),
    temperature: float = 1.0,
    ends: tuple[int, ...] = (),
) -> Tensor:
    """Text that a transformers causal language model writes: token ids [count, length] int64.

    A text begins with a random token of the vocabulary; the next 3 to 5 (``greedy``, drawn per text) are the
    likeliest, the others sampled at ``temperature``. After one of the tokens ``ends`` the row goes on with a
    new text. prompts: beginnings [count, p] that all rows go on from by sampling, in the place of the first
    token. generator: on the model's device. All rows run as one batch with a cache of keys and values: choose
    ``count`` by memory. Raises ``InputError`` for lengths that leave nothing to write.
    """
    begun = 1 if prompts is None else prompts.shape[1]
    if count < 1 or length <= begun:
        raise InputError(
            f"{count} texts of {length} tokens leave nothing to write after the first {begun}; ask for more"
        )
    device, vocabulary = next(model.parameters()).device, model.config.get_text_config().vocab_size
    options = {"device": device, "generator": generator}
    fresh = lambda: torch.randint(vocabulary, (count,), **options)  # noqa: E731
    drawn = lambda: torch.randint(greedy[0], greedy[1] + 1, (count,), **options)  # noqa: E731
    ids = torch.empty(count, length, dtype=torch.int64, device=device)
    ids[:, :begun] = fresh()[:, None] if prompts is None else prompts.to(device)
    top = drawn() if prompts is None else torch.zeros(count, dtype=torch.int64, device=device)
    stops = torch.tensor(ends, dtype=torch.int64, device=device)
    cache, new = None, ids[:, :begun]
    for at in range(begun, length):
        out = model(input_ids=new, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache, logits = out.past_key_values, out.logits[:, -1].float() / temperature
        # the largest of p / e, e exponential, is a draw from p
        noise = torch.empty_like(logits).exponential_(generator=generator)
        token = torch.where(top > 0, logits.argmax(-1), (logits.softmax(-1) / noise).argmax(-1))
        ended = torch.isin(new[:, -1], stops)
        token, top = torch.where(ended, fresh(), token), torch.where(ended, drawn(), (top - 1).clamp(min=0))
        ids[:, at] = token
        new = token[:, None]
    return ids
