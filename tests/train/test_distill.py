"""Distillation: the chunked loss is the plain one, and a student learns from its teacher's own text."""

import pytest
import torch
from tiny import tiny, tiny_ids
from torch import nn

from fewbit.errors import InputError
from fewbit.recipe import rtn
from fewbit.train import LearnedRange, kd_loss, prepare, sample_text


@pytest.mark.parametrize("chunk", [3, 7, 64])
def test_the_chunked_loss_and_its_gradients_are_those_of_all_logits_at_once(chunk):
    g = torch.Generator().manual_seed(0)
    head, other = nn.Linear(16, 50), nn.Linear(16, 50)
    states, target = (torch.randn(2, 7, 16, generator=g) for _ in range(2))
    found = {}
    for way in ("chunked", "plain"):
        h = states.clone().requires_grad_()
        head.zero_grad()
        if way == "chunked":
            loss = kd_loss(h, target, head, other, chunk=chunk)
        else:
            p, q = other(target).log_softmax(-1).detach(), head(h).log_softmax(-1)
            loss = nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1).mean()
        (3 * loss).backward()
        found[way] = [loss.detach(), h.grad, head.weight.grad, head.bias.grad]
    for a, b in zip(found["chunked"], found["plain"], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert other.weight.grad is None


def test_no_more_than_a_chunk_of_logits_exists():
    """The head is asked for so many tokens at a time, and a frozen head has no gradient."""
    head, seen = nn.Linear(8, 20).requires_grad_(False), []
    head.register_forward_hook(lambda m, args, out: seen.append(len(out)))
    h = torch.randn(10, 8).requires_grad_()
    kd_loss(h, torch.randn(10, 8), head, chunk=4).backward()
    assert seen == [4, 4, 4, 4, 2, 2]  # the teacher's and the student's
    assert h.grad.abs().sum() > 0
    assert head.weight.grad is None


def test_equal_states_teach_nothing():
    h = torch.randn(5, 8, requires_grad=True)
    loss = kd_loss(h, h, nn.Linear(8, 20))
    loss.backward()
    assert loss == 0
    assert h.grad.abs().max() < 1e-6
    with pytest.raises(InputError, match="same tokens"):
        kd_loss(h, h[:3], nn.Linear(8, 20))


def test_a_student_learns_from_text_that_its_teacher_wrote():
    """No data: nearer to the teacher than rounding alone, on tokens that neither has seen."""
    teacher = tiny("llama")
    student = prepare(tiny("llama"), rtn(bits=2, group_size=32, symmetric=False), weight=LearnedRange())
    text = sample_text(teacher, 48, 24, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        states = teacher.model(input_ids=text).last_hidden_state
    head, test = teacher.lm_head.requires_grad_(False), tiny_ids(seed=7)

    def loss_of(ids, wanted):
        return kd_loss(student.model(input_ids=ids).last_hidden_state, wanted, head, chunk=100)

    with torch.no_grad():
        held = teacher.model(input_ids=test).last_hidden_state
    before = loss_of(test, held).item()
    optimizer = torch.optim.AdamW(student.model.parameters(), lr=1e-3, weight_decay=0.0)
    for rows in torch.arange(48).view(6, 8).repeat(5, 1):
        optimizer.zero_grad()
        loss_of(text[rows], states[rows]).backward()
        optimizer.step()
    assert loss_of(test, held).item() < 0.6 * before
