"""HQQ, 4 bit, group 64 along the input, its defaults otherwise. Arguments: job.py."""

import torch
from hqq.core.quantize import BaseQuantizeConfig
from hqq.models.hf.base import AutoHQQHFModel
from job import Job

if __name__ == "__main__":
    job = Job()
    model = job.model()
    config = BaseQuantizeConfig(nbits=4, group_size=64, axis=1)
    AutoHQQHFModel.quantize_model(model, quant_config=config, compute_dtype=torch.float32, device="cpu")
    AutoHQQHFModel.save_quantized(model, job.out)
    job.finish(model)
