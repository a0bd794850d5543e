"""kill -9 at moments chosen at random, then the same command: the files are those of an undisturbed run."""

import random
import signal
import subprocess
import sys
import time

import torch
from tiny import tiny_tokenizer

KILLS = 5


def command(model, out):
    code = "from fewbit.cli.main import run; run()"
    settings = ["--bits", "4", "--group-size", "32", "--samples", "48", "--seqlen", "120"]
    return [sys.executable, "-c", code, "quantize", str(model), "-r", "gptq", *settings, "-o", str(out)]


def test_five_kills_leave_the_same_files(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = tiny_tokenizer()
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=10,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(tokenizer),
        max_position_embeddings=128,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run(command(tmp_path / "model", tmp_path / "whole"), check=True, **quiet)

    moments = random.Random(7)
    part, seen = tmp_path / "out.partial", []
    for _ in range(KILLS):
        child = subprocess.Popen(command(tmp_path / "model", tmp_path / "out"), **quiet)
        finished = len(list(part.glob("block-*.safetensors")))
        # from the first write of this run (its note, or its next block) a random while on
        while child.poll() is None:
            blocks = len(list(part.glob("block-*.safetensors")))
            if blocks > finished or (not finished and (part / "job.json").exists()):
                break
            time.sleep(0.002)
        time.sleep(moments.uniform(0, 0.25))
        assert child.poll() is None, "the run ended before it could be killed: make the model slower"
        child.send_signal(signal.SIGKILL)
        child.wait()
        assert not (tmp_path / "out").exists()
        seen.append(len(list(part.glob("block-*.safetensors"))))
    assert seen == sorted(seen)
    subprocess.run(command(tmp_path / "model", tmp_path / "out"), check=True, **quiet)
    files = lambda folder: {p.name: p.read_bytes() for p in folder.iterdir()}  # noqa: E731
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert not part.exists()
