"""From training to what engines read: Trainer in, compressed-tensors, GPTQ and GGUF files out."""

from dataclasses import replace

import pytest
import torch
from tiny import tiny, tiny_ids, tiny_tokenizer

import fewbit
from fewbit.format import FP16, Divisor, Format, Group, MinMax, Zero
from fewbit.grid import Int
from fewbit.io.attached import make_saveable
from fewbit.io.gguf_write import write
from fewbit.io.source import open_source
from fewbit.recipe import Recipe, Rule
from fewbit.stream.export import export
from fewbit.train import LSQ, LearnedRange, convert, prepare

IDS = {"input_ids": tiny_ids()}
SYMMETRIC = Format(grid=Int(4), block=Group(32), divisor=Divisor.FULL, scale=FP16)
AFFINE = Format(grid=Int(4), block=Group(32), range=MinMax(), zero=Zero.INTEGER, scale=FP16)

QAT = Recipe(name="qat", rules=(Rule(weight=AFFINE),))


def trained(folder, fmt, quant):
    """A checkpoint of a tiny Llama after three updates, and its logits."""
    model = prepare(tiny("llama"), Recipe(name="qat", rules=(Rule(weight=fmt),)), weight=quant)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(3):
        model(**IDS, labels=IDS["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        logits = make_saveable(convert(model))(**IDS).logits
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return logits


@pytest.mark.parametrize(
    ("target", "fmt", "quant"),
    [
        ("compressed-tensors", SYMMETRIC, LSQ()),
        ("compressed-tensors", AFFINE, LearnedRange()),
        ("gptq", AFFINE, LearnedRange()),
        ("awq", AFFINE, LearnedRange()),
        ("gguf", replace(SYMMETRIC, divisor=Divisor.SIGNED), LSQ()),
    ],
)
def test_what_was_trained_is_exported_code_for_code(tmp_path, target, fmt, quant):
    want = trained(tmp_path / "qat", fmt, quant)
    out = tmp_path / ("model.gguf" if target == "gguf" else "out")
    if target == "gguf":
        write(open_source(tmp_path / "qat"), out)
    else:
        assert not export(tmp_path / "qat", target, out).requantized
    with torch.no_grad():
        got = fewbit.load(out)(**IDS).logits
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5 if target != "gguf" else 1e-2)


def test_hf_trainer_trains_a_prepared_model_as_any_other(tmp_path):
    from transformers import Trainer, TrainingArguments

    prepared = lambda: prepare(tiny("llama").train(), QAT, weight=LearnedRange())  # noqa: E731
    model = prepared()
    steps = {n: p.detach().clone() for n, p in model.named_parameters() if n.endswith("weight_step")}
    rows = [{"input_ids": row, "labels": row} for row in IDS["input_ids"]] * 8
    args = TrainingArguments(
        output_dir=str(tmp_path / "run"), max_steps=12, learning_rate=3e-3, per_device_train_batch_size=2,
        logging_steps=1, save_steps=6, report_to=[], use_cpu=True, seed=0, weight_decay=0.0,
    )  # fmt: skip
    trainer = Trainer(model=model, args=args, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.3
    assert all(not torch.equal(p, dict(model.named_parameters())[n]) for n, p in steps.items())
    # its checkpoint holds trained steps as well, so that a run is taken up again
    other = prepared()
    again = Trainer(model=other, args=args, train_dataset=rows)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-6"))
    for (name, a), (_, b) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, msg=name)
    make_saveable(convert(model.eval())).save_pretrained(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(fewbit.load(tmp_path / "out")(**IDS).logits, model(**IDS).logits)
