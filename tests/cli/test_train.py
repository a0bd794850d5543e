"""``fewbit train``, as somebody types it."""

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import fewbit as library
from fewbit.train import OPTIMIZERS, PRODUCTS

WORDS = "the cat sat on the mat, a dog ran to the town, and rain fell on the way home"
QUICK = ("--steps", "4", "--batch", "2", "--length", "32")


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "words.txt"
    path.write_text("".join(f"{i} {WORDS[i % 40 :]}\n" for i in range(300)))
    return path


def test_pretraining_says_what_came_out_and_a_second_run_stands_beside_it(fewbit, text, tmp_path):
    first = fewbit("train", "tiny-llama", "--data", text, "-o", "bf16", *QUICK)
    assert first.code == 0, first.err
    for said in ("tiny-llama, BF16", "nats per token held out; before training 5.4", "bytes a parameter"):
        assert said in first.out
    assert "8.0 bytes a parameter" in first.out
    assert "--products rowwise, another -o and --beside bf16" in first.out
    assert 'fewbit generate bf16 "The king"' in first.out
    assert "update 1/4  loss" in first.err
    assert "left" in first.err
    words = ("--products", "rowwise", "--level", "O3", "--beside", "bf16")
    second = fewbit("train", "tiny-llama", "--data", text, "--out", "fp8", *QUICK, *words)
    assert second.code == 0, second.err
    assert "% from" in second.out
    assert "5.1 bytes a parameter" in second.out
    assert "<figure>" in (tmp_path / "fp8" / "curve.html").read_text()
    said = fewbit("generate", "fp8", "the cat", "--max-new-tokens", "3")
    assert said.code == 0, said.err


def test_json_is_one_object_and_the_same_command_has_nothing_left_to_do(fewbit, text):
    words = ("train", "tiny-llama", "--data", text, "-o", "out", *QUICK, "--json")
    found = fewbit(*words).json
    assert len(found["losses"]) == 4
    assert found["losses"][-1] < found["losses"][0]
    assert found["output"] == "out"
    again = fewbit(*words, "--resume")
    assert again.json["finished_before"]
    assert again.json["losses"] == found["losses"]
    refused = fewbit(*words)
    assert refused.code == 2
    assert "holds something else already" in refused.err


def test_quantization_aware_training_writes_a_checkpoint_that_loads_and_exports(fewbit, llama, text):
    words = ("-r", "rtn", "--bits", "4", "--group-size", "32", "--set", "input=int8", "--quant", "learned")
    ran = fewbit("train", llama, "--data", text, "-o", "w4a8", *QUICK, *words)
    assert ran.code == 0, ran.err
    assert "rounded before training" in ran.out
    assert "fewbit export w4a8 --to compressed-tensors" in ran.out
    layer = library.load("w4a8").model.layers[0].mlp.up_proj
    assert layer.format.grid.name == "int4"
    assert layer.activation.format.grid.name == "int8"
    assert fewbit("eval", "w4a8", "--data", text, "--window", "32", "--windows", "2").code == 0
    done = fewbit("export", "w4a8", "--to", "compressed-tensors", "-o", "vllm")
    assert done.code == 0, done.err


def test_quest_brings_its_own_grid(fewbit, llama, text):
    ran = fewbit("train", llama, "--data", text, "-o", "w2a2", *QUICK, "--quant", "quest", "--bits", "2")
    assert ran.code == 0, ran.err
    layer = library.load("w2a2").model.layers[0].mlp.up_proj
    assert layer.format.grid.bits == layer.activation.format.grid.bits == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "Missing argument 'MODEL'"),
        (("tiny-llama",), "Missing option '--data'"),
        (("tiny-llama", "--data", "nothing.txt", "-o", "x"), "there is no text file nothing.txt"),
        (("tiny-llama", "--data", "{text}", "-o", "x", "--products", "rowise"), "did you mean rowwise"),
        (("tiny-llama", "--data", "{text}", "-o", "x", "--steps", "0"), "--steps is 0"),
        (("tiny-llama", "--data", "{text}", "-o", "x", "--steps", "many"), "Invalid value for '--steps'"),
        (("tiny-llama", "--data", "{text}", "-o", "x", "--length", "1024"), "more than the 512 positions"),
        (("tiny-llama", "--data", "{text}", "-o", "x", "-r", "rtn"), "give both"),
        (("tiny-llama", "--data", "{text}", "-o", "x", "-r", "awq", "--quant", "lsq"), "has transforms"),
        (("tiny-llama", "--data", "{text}", "-o", "x", "--quant", "quest", "--bits", "9"), "1 to 8 bits"),
        (("tiny-llama", "--data", "{text}", "-o", "x", "--resume"), "holds no run to resume"),
        (("tiny-llama", "--data", "{text}", "-o", "x", "--beside", "."), "is no finished run"),
        (("tiny-llama", "--data", "{text}", "-o", "x", "--device", "tpu"), "device 'tpu'"),
        (("nowhere/model.gguf", "--data", "{text}", "-o", "x"), "There is no model"),
    ],
)
def test_wrong_arguments_are_one_sentence_and_leave_nothing_behind(fewbit, text, tmp_path, words, said):
    ran = fewbit("train", *(w.replace("{text}", str(text)) for w in words))
    assert ran.code == 2
    assert ran.out == ""
    assert said in ran.err
    assert ran.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_help_shows_every_road_with_an_example(fewbit):
    said = " ".join(fewbit("train", "--help").out.split())
    for words in ("--products rowwise", "--quant lsq", "fewbit train smollm2", "--beside out/bf16"):
        assert words in said


def test_a_killed_run_goes_on_to_the_same_bits(fewbit, text, tmp_path):
    """A process of its own, ended by SIGKILL; then the same command with --resume."""

    def words(out):
        how = ("--steps", "24", "--batch", "2", "--length", "32", "--save-every", "1")
        return ("train", "tiny-llama", "--data", str(text), "-o", out, *how)

    command = [sys.executable, "-m", "fewbit.cli.main", *words("cut")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    state = tmp_path / "cut.partial" / "state.pt"
    while not state.exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    resumed = fewbit(*words("cut"), "--resume")
    assert resumed.code == 0, resumed.err
    assert "going on after update" in resumed.err
    assert fewbit(*words("whole")).code == 0
    for name in ("model.safetensors", "losses.jsonl"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_the_page_names_no_option_that_is_not_there(fewbit):
    page = Path(__file__).parents[2] / "docs" / "train-command.md"
    text, known = page.read_text(), fewbit("train", "--help").out
    for option in set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)):
        assert option in known, option
    for name in re.findall(r"`([a-z][a-z0-9-]+)`", text.split("Without any of them")[0].split("| part |")[1]):
        assert name in {*PRODUCTS, *OPTIMIZERS, "lsq", "learned", "ste", "quest"}, name
