"""Logits of a checkpoint that a peer saved, through transformers alone. Arguments: job.py."""

from job import Job

if __name__ == "__main__":
    job = Job()
    job.path = job.out
    job.finish(job.model())
