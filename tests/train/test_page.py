"""The loop of docs/training.md runs as it stands there, and HF's Trainer takes a prepared model."""

import re
from pathlib import Path

import torch
from tiny import tiny, tiny_ids

import fewbit
from fewbit.train import LSQ, FakeLinear, prepare

PAGE = Path(__file__).parents[2] / "docs" / "training.md"


def test_the_loop_of_the_page_trains_and_its_checkpoint_loads(folders, tmp_path, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    for stands, here in (('"smollm2"', repr(str(folders / "llama"))), ('"out"', repr(str(tmp_path / "out")))):
        assert code.count(f"({stands})") == 1 + (stands == '"out"')  # the second in a comment
        code = code.replace(stands, here)
    code = code.replace("100, 4000", "4, 256").replace("lr=1e-4", "lr=1e-3")
    names = {}
    exec(compile(code, str(PAGE), "exec"), names)
    losses = [float(v) for v in capsys.readouterr().out.split()]
    assert losses[-1] < losses[0]
    with torch.no_grad():
        ids = names["ids"]
        assert torch.equal(fewbit.load(tmp_path / "out")(ids).logits, names["model"](ids).logits)


def test_the_trainer_of_transformers_moves_weights_and_steps(tmp_path):
    from transformers import Trainer, TrainingArguments

    model = prepare(tiny("llama"), fewbit.recipes.rtn(bits=4, symmetric=True, group_size=32), weight=LSQ())
    layer = model.model.layers[0].mlp.up_proj
    before = layer.weight.detach().clone(), layer.weight_step.detach().clone()
    data = [{"input_ids": row, "labels": row} for row in tiny_ids(4)]
    args = TrainingArguments(
        tmp_path, max_steps=2, use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True
    )
    Trainer(model=model, args=args, train_dataset=data).train()
    assert isinstance(model.model.layers[0].mlp.up_proj, FakeLinear)
    assert not torch.equal(layer.weight, before[0])
    assert not torch.equal(layer.weight_step, before[1])
