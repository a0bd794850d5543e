"""A peer's script: python SCRIPT.py MODEL TOKENS.json OUT THREADS [TEST.json LOGITS.npy].

Load MODEL in float32, quantize its linear layers with the peer's own API, save into OUT. With TEST.json
(windows of token ids) the quantized model's logits [windows, tokens, vocabulary] go into LOGITS.npy as
float32, for the same evaluation as everybody's: a run for quality, which nobody times.
"""

import json
import sys

import torch
from transformers import AutoModelForCausalLM


class Job:
    """The arguments; one thread set."""

    def __init__(self):
        self.path, self.tokens_path, self.out, threads, *self.test = sys.argv[1:]
        torch.set_num_threads(int(threads))
        torch.set_grad_enabled(False)

    def model(self, **settings):
        """The float model, or whatever transformers makes of it under ``settings``."""
        return AutoModelForCausalLM.from_pretrained(self.path, dtype=torch.float32, **settings).eval()

    def tokens(self) -> list[list[int]]:
        """Calibration windows."""
        with open(self.tokens_path) as f:
            return json.load(f)

    def finish(self, model) -> None:
        """Write the logits, where they are asked for."""
        if not self.test:
            return
        import numpy as np

        with open(self.test[0]) as f:
            windows = json.load(f)
        rows = [model(input_ids=torch.tensor([ids])).logits[0].float().numpy() for ids in windows]
        np.save(self.test[1], np.stack(rows))
