"""bitsandbytes' LLM.int8(), threshold 6. Arguments: job.py."""

from job import Job
from transformers import BitsAndBytesConfig

if __name__ == "__main__":
    job = Job()
    model = job.model(quantization_config=BitsAndBytesConfig(load_in_8bit=True), device_map="cpu")
    model.save_pretrained(job.out)
    job.finish(model)
