"""One of llm-compressor's schemes that need no data, rounded to nearest: the last argument names it.

FP8_DYNAMIC, NVFP4A16 or MXFP4. Arguments before it: job.py.
"""

import sys

from job import Job
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier

if __name__ == "__main__":
    scheme = sys.argv.pop()
    job = Job()
    model = job.model()
    recipe = QuantizationModifier(targets=["Linear"], scheme=scheme, ignore=["lm_head"])
    oneshot(model=model, recipe=recipe)
    job.finish(model)  # before saving, which packs the weights; nothing happens here in a timed run
    model.save_pretrained(job.out, save_compressed=True)
