"""llama.cpp in a process of its own (benchmarks/llamacpp_client.py), and greedy tokens of ours beside it."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

CLIENT = Path(__file__).parents[1] / "benchmarks" / "llamacpp_client.py"

needs_llama_cpp = pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None, reason="needs llama.cpp: pip install llama-cpp-python"
)


def llama_cpp(path, **question):
    command = [sys.executable, CLIENT, path, "--unpack"]
    done = subprocess.run(command, input=json.dumps(question), capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def greedy(model, prompt, count):
    ids = torch.tensor([prompt])
    with torch.no_grad():
        for _ in range(count):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    return ids[0, len(prompt) :].tolist()
