"""bitsandbytes' NF4, blocks of 64, double quantization. Arguments: job.py."""

import torch
from job import Job
from transformers import BitsAndBytesConfig

if __name__ == "__main__":
    job = Job()
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = job.model(quantization_config=config, device_map="cpu")
    model.save_pretrained(job.out)
    job.finish(model)
