"""The training loop behind ``fewbit train``: text in, a run that can be resumed, a checkpoint out."""
