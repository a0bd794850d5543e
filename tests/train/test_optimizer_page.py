"""The code of docs/optimizers.md runs as it stands there."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import fewbit
from fewbit.train import O3, PRODUCTS, gradients
from fewbit.train.products import cast

PAGE = Path(__file__).parents[2] / "docs" / "optimizers.md"
FIRST, STABLE, SCALED = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)


def test_the_loop_trains_saves_and_its_stable_optimizer_measures_rms(folders, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert FIRST.count('"smollm2"') == 1
    code = FIRST.replace('"smollm2"', repr(str(folders / "llama"))).replace("100, 4000", "4, 256")
    names = {"fewbit": fewbit}
    exec(compile(code.replace("lr=1e-4", "lr=1e-2"), str(PAGE), "exec"), names)
    losses = [float(line.split()[0]) for line in capsys.readouterr().out.splitlines()]
    assert losses[-1] < losses[0]
    saved = torch.load("training.pt", weights_only=True)
    names["optimizer"].load_state_dict(saved["optimizer"])
    exec(compile(STABLE, str(PAGE), "exec"), names)
    assert capsys.readouterr().out == "None\n"
    names["model"](input_ids=names["ids"], labels=names["ids"]).loss.backward()
    assert gradients(names["model"])
    names["optimizer"].step()
    assert 0 < max(names["optimizer"].rms.values()) < 1.1


def test_the_loop_with_loss_scaling_trains():
    names = {}
    torch.manual_seed(0)
    exec(compile(SCALED, str(PAGE), "exec"), names)
    assert names["loss"] < 1.2
    assert names["scaler"].get_scale() == 65536
    assert names["warm"].last_epoch == 20


@pytest.mark.parametrize(("name", "exact"), [("rowwise", True), ("tensorwise", False)])
def test_products_whose_steps_are_powers_of_two_round_weights_of_o3_no_further(name, exact):
    torch.manual_seed(0)
    layer = nn.Linear(128, 64)
    O3.optimizer(layer)
    right = PRODUCTS[name]().forward.casts[1]
    q = cast(layer.weight.detach(), right)
    assert torch.equal(q.dequantize()[:64, :128], layer.weight) == exact
