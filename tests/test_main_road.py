"""The main job on the packaged real model, as a user does it, and its result in plain transformers."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

FEWBIT = str(Path(sys.executable).with_name("fewbit"))
PLAIN = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder = sys.argv[1]
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(folder)
ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
text = tokenizer.decode(model.generate(ids, max_new_tokens=8, do_sample=False)[0])
assert "fewbit" not in sys.modules
print(text)
"""


def run(*words):
    """Standard output of a command that must succeed."""
    done = subprocess.run([*map(str, words)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_quantize_evaluate_and_serve_smollm2(tmp_path):
    out = tmp_path / "w4a16"
    settings = ("--bits", 4, "--group-size", 64, "--samples", 16, "--seqlen", 256)
    made = json.loads(run(FEWBIT, "quantize", "smollm2", "-r", "gptq", *settings, "-o", out, "--json"))
    assert made["checkpoint"] == "compressed-tensors"
    assert made["bits_per_weight"] == 4.25
    assert made["reload_difference"] == 0
    assert made["size_bytes"] < 114e6
    assert len(made["layers"]) == 210
    assert made["mean_error"] < 0.006

    measured = json.loads(run(FEWBIT, "eval", out, "--against", "smollm2", "--windows", 3, "--json"))
    assert measured["bits_per_weight"] == 4.25
    assert measured["kl"] < 0.35
    assert measured["top1"] > 0.6

    assert "Paris" in run(sys.executable, "-c", PLAIN, out)
