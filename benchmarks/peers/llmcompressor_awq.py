"""llm-compressor's AWQ, W4A16 group 64 asymmetric, its defaults otherwise. Arguments: job.py."""

from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from job import Job
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from transformers import AutoTokenizer

if __name__ == "__main__":
    job = Job()
    model = job.model()
    IntermediatesCache.pin_memory = lambda self, batch: None  # raises on a machine without an accelerator
    tokens = job.tokens()
    data = Dataset.from_dict({"input_ids": tokens, "attention_mask": [[1] * len(t) for t in tokens]})
    weights = QuantizationArgs(num_bits=4, type="int", symmetric=False, strategy="group", group_size=64)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    oneshot(
        model=model,
        processor=AutoTokenizer.from_pretrained(job.path),
        dataset=data,
        recipe=[AWQModifier(), QuantizationModifier(config_groups={"group_0": scheme}, ignore=["lm_head"])],
        max_seq_length=len(tokens[0]),
        num_calibration_samples=len(tokens),
    )
    job.finish(model)
    model.save_pretrained(job.out, save_compressed=True)
