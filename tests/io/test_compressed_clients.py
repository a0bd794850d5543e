"""compressed-tensors files of mixed formats in plain transformers."""

import subprocess
import sys

import torch
from quantized import int_format, save_quantized
from tiny import tiny_ids

from fewbit.format import (
    BF16,
    FP16,
    FP32,
    Block2d,
    Channel,
    Format,
    PerTensor,
)
from fewbit.io import compressed_tensors as ct

from .compressed import E4M3

READER = """
import sys, torch
from transformers import AutoModelForCausalLM
ids = torch.load(sys.argv[1])
for folder in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        torch.save((model(ids).logits, model.dtype), folder + "/logits.pt")
assert "fewbit" not in sys.modules
"""


def mixed(name: str) -> Format:
    """Another scheme for each projection, dense odd widths among them; all symmetric (see ``caveats``)."""
    kinds = {
        "q_proj": int_format(3, scale=FP16),
        "k_proj": int_format(5, block=Channel(), scale=FP16),
        "v_proj": int_format(8, block=Channel(), scale=FP16),
        "o_proj": Format(grid=E4M3, block=Channel(), scale=FP16),
        "gate_proj": Format(grid=E4M3, block=PerTensor(), scale=FP32),
        "up_proj": Format(grid=E4M3, block=Block2d(32, 32), scale=FP32),
        "down_proj": int_format(1, scale=FP32),
    }
    return kinds[name.rpartition(".")[2]]


def test_a_tiny_llama_loads_in_plain_transformers_with_our_values(tmp_path):
    cases = {
        "symmetric": (int_format(4, scale=FP16), torch.float32),
        "asymmetric": (int_format(3, block=Channel(), asymmetric=True), torch.float32),
        "bf16": (int_format(4, asymmetric=True, scale=BF16), torch.bfloat16),
        "fp8": (Format(grid=E4M3, block=Channel(), scale=BF16), torch.bfloat16),
        "mixed": (mixed, torch.float32),
    }
    ids, want = tiny_ids(), {}
    for name, (formats, dtype) in cases.items():
        model = save_quantized("llama", tmp_path / name, formats, layout=ct, dtype=dtype)
        with torch.no_grad():
            want[name] = model(ids).logits
    torch.save(ids, tmp_path / "ids.pt")
    folders = [str(tmp_path / name) for name in cases]
    done = subprocess.run(
        [sys.executable, "-c", READER, str(tmp_path / "ids.pt"), *folders], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for name, (_, dtype) in cases.items():
        got, used = torch.load(tmp_path / name / "logits.pt")
        assert used == dtype
        assert torch.equal(got, want[name]), f"{name}: {(got - want[name]).abs().max()}"
