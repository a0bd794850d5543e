"""SpinQuant through the loop: the learned map ends in the checkpoint, and a kill does not change a bit."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import save_tiny, tiny_ids

import fewbit
from fewbit.errors import InputError
from fewbit.format import FP32, AbsMax, Channel, Format, Token
from fewbit.format.activation import Activation
from fewbit.grid import by_name
from fewbit.io.source import open_source
from fewbit.recipe import Recipe, Rule, from_yaml, named, quarot, spinquant
from fewbit.stream import learning, rotate
from fewbit.stream.data import Calibration
from fewbit.stream.plan import make_plan
from fewbit.stream.progress import Progress
from fewbit.stream.quantize import quantize
from fewbit.transform.rotation import Rotation

SMALL = Calibration(samples=6, seqlen=32)
SPIN = spinquant(steps=3, batch=2, input_clip=1.0)


class Stops(Progress):
    """A person who interrupts once a block is done; keeps what was said."""

    def __init__(self, after):
        self.after, self.said = after, []

    def phase(self, text):
        self.said.append(text)

    def block(self, done, total, resumed):
        if done == self.after:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "llama"
    save_tiny("llama", folder)
    return folder


def files(folder: Path):
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def test_the_recipe_runs_from_a_source_to_a_checkpoint(llama, tmp_path):
    assert from_yaml(SPIN.to_yaml()) == SPIN
    progress = Stops(0)
    result = quantize(llama, SPIN, output=tmp_path / "out", calibration=SMALL, progress=progress)
    assert result.difference < 1e-5
    assert any("192 tokens forward and back" in text for text in result.plan.caveats)
    learning = [text for text in progress.said if text.startswith("learning the rotation")]
    assert [text.split(",")[1].split(":")[0].strip() for text in learning] == [
        f"step {i} of 3" for i in (0, 1, 2, 3)
    ]
    with torch.no_grad():
        assert torch.isfinite(fewbit.load(tmp_path / "out")(tiny_ids()).logits).all()


def test_at_high_precision_the_checkpoint_is_the_same_function_in_every_reader(llama, tmp_path):
    import transformers

    int8 = Format(grid=by_name("int8"), block=Channel(), scale=FP32)
    tokens = Activation(format=Format(grid=by_name("int8"), block=Token(), range=AbsMax(), scale=FP32))
    rule = Rule(weight=int8, input=tokens)
    recipe = Recipe(name="r", rules=(rule,), rotation=Rotation(steps=2, batch=1, online=False))
    result = quantize(llama, recipe, output=tmp_path / "out", calibration=SMALL)
    assert result.difference < 1e-5
    plain = fewbit.load(llama)(tiny_ids()).logits
    mine = fewbit.load(tmp_path / "out")(tiny_ids()).logits
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="float32")
    torch.testing.assert_close(theirs(tiny_ids()).logits, mine, rtol=1e-2, atol=1e-2)
    assert (mine - plain).norm() < 0.05 * plain.norm()


def test_an_interrupted_run_goes_on_with_the_same_matrix_to_the_same_bits(llama, tmp_path, monkeypatch):
    whole = quantize(llama, SPIN, output=tmp_path / "whole", calibration=SMALL)
    assert whole.resumed_blocks == 0
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        quantize(llama, SPIN, output=out, calibration=SMALL, progress=Stops(1))
    matrix = load_file(tmp_path / "out.partial" / "rotation.safetensors")["matrix"]
    assert (matrix.T @ matrix - torch.eye(64)).abs().max() < 1e-5
    with monkeypatch.context() as patch:
        patch.setattr(rotate, "learn_rotation", None)  # it may not be learned again
        assert quantize(llama, SPIN, output=out, calibration=SMALL).resumed_blocks == 1
    assert files(out) == files(tmp_path / "whole")
    assert "rotation.safetensors" not in files(out)


def test_without_steps_it_is_quarot_and_with_steps_it_is_not(llama, tmp_path):
    weights = {}
    for name, recipe in {
        "quarot": quarot(input_clip=1.0),
        "none": spinquant(steps=0, input_clip=1.0),
        "some": SPIN,
    }.items():
        quantize(llama, recipe, output=tmp_path / name, calibration=SMALL)
        weights[name] = load_file(tmp_path / name / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(weights["quarot"], weights["none"])
    assert not torch.equal(weights["quarot"], weights["some"])


@pytest.mark.parametrize(
    ("recipe", "says"),
    [
        (spinquant(input_bits=16), "quantizes none"),
        (named("spinquant", {"steps": "2"}), "two windows"),
    ],
)
def test_what_cannot_be_learned_is_refused_and_nothing_is_left(llama, tmp_path, recipe, says):
    with pytest.raises(InputError, match=says):
        quantize(llama, recipe, output=tmp_path / "out", calibration=Calibration(samples=1, seqlen=32))
    assert not list(tmp_path.iterdir())


def test_the_plan_says_what_learning_takes_and_a_dry_run_refuses_what_a_run_would(llama):
    source = open_source(llama)
    plan = make_plan(source, SPIN, SMALL)[0]
    assert any("192 tokens forward and back" in text for text in plan.caveats)
    assert plan.calibration == SMALL
    plain = make_plan(source, spinquant(steps=0, solver="rtn", input_zero="none"), SMALL)[0]
    assert not any("learning" in text for text in plain.caveats)
    with pytest.raises(InputError, match="quantizes none"):
        make_plan(source, spinquant(input_bits=16), SMALL)


def test_a_model_that_does_not_fit_in_memory_is_refused_before_work(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(learning, "available", lambda device: 100_000)
    with pytest.raises(InputError, match="whole model and the activations of"):
        quantize(llama, SPIN, output=tmp_path / "out", calibration=SMALL)
    assert not list(tmp_path.iterdir())
