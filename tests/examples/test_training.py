"""The training scripts of examples/ run, are interrupted and go on to the same bits, on a tiny model."""

import os
import runpy
import sys
from pathlib import Path

import pytest
import torch

import fewbit
from fewbit.nn import QLinear

EXAMPLES = Path(__file__).parents[2] / "examples"
SHORT = 80  # lines: something to copy


@pytest.fixture
def script(monkeypatch, tmp_path, capsys):
    """Run an example in an empty folder; its output."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("the cat sat on the mat, a dog ran to the town\n" * 300)

    def run(name: str, *words: object) -> str:
        monkeypatch.setattr(sys, "argv", [name, "--data", "text.txt", *map(str, words)])
        capsys.readouterr()
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    return run


def interrupted(script, monkeypatch, name: str, *words: object) -> tuple[str, str]:
    """(uninterrupted output, output of the second half): the first half ends with its checkpoint on disk."""
    whole = script(name, *words, "--out", "whole")
    replace, seen = os.replace, []

    def stop(source, target):
        replace(source, target)
        seen.append(target)
        if len(seen) == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", stop)
        with pytest.raises(KeyboardInterrupt):
            script(name, *words, "--out", "cut")
    rest = script(name, *words, "--out", "cut")
    for file in ("model.safetensors", "config.json"):
        assert Path("cut", file).read_bytes() == Path("whole", file).read_bytes()
    return whole, rest


@pytest.mark.slow
def test_pretraining_goes_on_to_the_same_bits(script, monkeypatch):
    words = ("--steps", 21, "--batch", 1, "--products", "nvfp4")  # rounds stochastically
    whole, rest = interrupted(script, monkeypatch, "pretrain_small_llama", *words)
    assert whole.count("held out") == 2
    assert rest.count("held out") == 1
    first, last = (float(line.split()[-1]) for line in whole.splitlines() if "held out" in line)
    assert last <= first < 3.5
    assert fewbit.load("whole")(torch.arange(8)[None]).logits.shape == (1, 8, 256)


@pytest.mark.parametrize("name", ["finetune_smollm2", "qat_smollm2_w4a8", "qat_smollm2_w2a16"])
def test_training_a_given_model_goes_on_to_the_same_bits(name, folders, script, monkeypatch):
    words = ("--model", folders / "llama", "--steps", 12)
    whole, rest = interrupted(script, monkeypatch, name, *words)
    assert rest.splitlines()[-1].replace("cut", "whole") == whole.splitlines()[-1]
    quantized = sum(isinstance(m, QLinear) for m in fewbit.load("whole").modules())
    assert quantized == (0 if name.startswith("finetune") else 14)


@pytest.mark.parametrize("path", sorted([*EXAMPLES.glob("*smol*.py"), *EXAMPLES.glob("pretrain*.py")]))
def test_an_example_is_short_enough_to_copy(path):
    assert len(path.read_text().splitlines()) < SHORT
