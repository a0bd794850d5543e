"""Tasks: how many questions a model answers, and which answers its bits have turned.

lm-eval (Gao et al., "The Language Model Evaluation Harness", https://github.com/EleutherAI/lm-evaluation-harness)
asks the questions, so a figure is what other people's figures are. It brings hundreds of tasks by name, whose
data come from the hub; the tasks under ``files/`` ask the same of JSON lines in a folder, without a network.

    with open_tasks(["piqa", "copa"], folder) as tasks:
        before = answer(original, tokenizer, tasks)
        after = answer(model, tokenizer, tasks)
    paired(after[0], before[0])     # answers lost and gained, and whether that is chance

The road not taken: log likelihoods of our own over the same rows. It is shorter, and no figure of it could be
held against a published one.
"""

from fewbit.evaluate.tasks.harness import Asked, Score, answer, open_tasks
from fewbit.evaluate.tasks.local import LOCAL, Local, read_local
from fewbit.evaluate.tasks.paired import Paired, beside, paired

__all__ = [
    "LOCAL",
    "Asked",
    "Local",
    "Paired",
    "Score",
    "answer",
    "beside",
    "open_tasks",
    "paired",
    "read_local",
]
