"""optimum-quanto's qint4 weights; it picks the group sizes itself. Arguments: job.py."""

from job import Job
from optimum.quanto import QuantizedModelForCausalLM, qint4

if __name__ == "__main__":
    job = Job()
    quantized = QuantizedModelForCausalLM.quantize(job.model(), weights=qint4, exclude="lm_head")
    quantized.save_pretrained(job.out)
    job.finish(quantized)
