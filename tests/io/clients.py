"""Checkpoints read by the code of those who will use them, in a process of its own without fewbit.

    python clients.py SCRIPT JOBS     JOBS: JSON, a list of [folder, ids file, logits file, layout]

SCRIPT is what `fewbit export` runs (``fewbit.stream.client.SCRIPT``). Two things are added to it that
transformers leaves out: a ``transform_config`` is run by compressed-tensors' own function, and a GGUF file is
named to ``from_pretrained``. What transformers lacks a package for is decoded by the formulas of
``layouts.py`` into a float model.
"""

import json
import sys
from pathlib import Path


def transformed(model, folder: Path):
    """The model with the maps of its configuration, their matrices from the file."""
    import torch
    from compressed_tensors.transform import TransformConfig, apply_transform_config
    from safetensors.torch import load_file

    config = json.loads((folder / "config.json").read_text()).get("quantization_config", {})
    if "transform_config" not in config:
        return model
    apply_transform_config(model, TransformConfig.model_validate(config["transform_config"]))
    stored = {n.split(".")[-2]: t for n, t in load_file(folder / "model.safetensors").items() if "_seed" in n}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.split(".")[-2] in stored:
                parameter.copy_(stored[name.split(".")[-2]])
    return model


def main(script: str, jobs: str) -> None:
    """Run the script for every job."""
    import transformers

    cls = transformers.LlamaForCausalLM
    plain = cls.from_pretrained.__func__

    def from_pretrained(own, folder, **keywords):
        file = next(Path(folder).glob("*.gguf"), None)
        more = {} if file is None else {"gguf_file": file.name}
        return transformed(plain(own, folder, **keywords, **more), Path(folder))

    cls.from_pretrained = classmethod(from_pretrained)
    for job in json.loads(jobs):
        sys.argv = ["-c", *job]
        exec(script, {})


if __name__ == "__main__":
    main(*sys.argv[1:3])
