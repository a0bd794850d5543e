"""The same road on a CUDA device."""

import pytest
import torch
from tiny import save_tiny

import fewbit
from fewbit.io.source import open_source
from fewbit.recipe import gptq
from fewbit.stream.data import Calibration
from fewbit.stream.verify import stream_logits

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
FEW = Calibration(samples=6, seqlen=48)
IDS = torch.randint(0, 200, (2, 32), generator=torch.Generator().manual_seed(1))


@needs_cuda
@pytest.mark.parametrize("arch", ["llama", "gemma3", "gpt2", "bert"])
def test_quantizing_on_cuda_gives_the_cpu_model(arch, tmp_path):
    save_tiny(arch, tmp_path / "model")
    for device in ("cpu", "cuda"):
        result = fewbit.quantize(
            tmp_path / "model",
            gptq(bits=8, group_size=32),
            output=tmp_path / device,
            calibration=FEW,
            device=device,
        )
        assert result.difference < 1e-5
    on_cpu, on_cuda = (stream_logits(open_source(tmp_path / d), IDS) for d in ("cpu", "cuda"))
    assert (on_cpu - on_cuda).norm() < 0.02 * on_cpu.norm()
    with torch.no_grad():
        logits = fewbit.load(tmp_path / "cuda", device="cuda", dtype=torch.float32)(IDS.cuda()).logits.cpu()
    assert (logits - on_cuda).norm() < 1e-3 * on_cuda.norm()
