"""The command line: names a recipe, a model and an output; prints the plan, the progress and the figures.

Nothing is computed here. Answers go to standard output, everything else (plan of a run, progress, the one
sentence of an error) to standard error, so that ``fewbit ... --json | jq`` and ``fewbit generate ... > text``
work. Modules that commands need for their work (torch, transformers) are imported inside them, so that
``fewbit --help`` answers at once.
"""
