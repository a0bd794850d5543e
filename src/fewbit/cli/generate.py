"""``fewbit generate``: see that a checkpoint still speaks."""

from __future__ import annotations

import sys
import time
from typing import Annotated, Any

import typer

from fewbit.cli import options
from fewbit.cli.kv import KV
from fewbit.cli.options import Checkpoint, Device, Dtype, DtypeName, Json, Verbose
from fewbit.errors import InputError


def generate(
    checkpoint: Checkpoint,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="The text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Stop after so many tokens.")] = 64,
    temperature: Annotated[
        float,
        typer.Option(
            metavar="T", min=0.0, help="0 always takes the likeliest token; 1 draws as the model says."
        ),
    ] = 0.0,
    seed: Annotated[int, typer.Option(metavar="S", min=0, help="Decides the draws.")] = 0,
    chat: Annotated[
        bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")
    ] = False,
    kv: KV = None,
    device: Device = None,
    dtype: Dtype = DtypeName.AUTO,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Continue PROMPT with a checkpoint, or with any MODEL.

    The text goes to standard output, the speed to standard error.
    """
    options.prepare(verbose)
    import torch

    from fewbit.cli.kv import cache_of, kv_of
    from fewbit.cli.show import print_json
    from fewbit.io.load import load
    from fewbit.io.source import open_source

    where = options.device_name(device)
    source = open_source(checkpoint)
    kv = kv_of(kv, source)
    tokenizer = source.tokenizer()
    ids = _prompt_ids(tokenizer, prompt, chat, checkpoint)
    model = load(checkpoint, where, options.dtype_of(dtype))
    options.imported()
    _check(model, checkpoint, len(ids), max_new_tokens)
    cache = None if kv is None else cache_of(kv, model, tokenizer)()
    given = torch.tensor([ids], device=where)
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())), torch.inference_mode():
        torch.manual_seed(seed)
        start = time.perf_counter()
        out = model.generate(
            input_ids=given,
            attention_mask=torch.ones_like(given),
            past_key_values=cache,
            generation_config=_config(model, tokenizer, max_new_tokens, temperature),
        )[0].tolist()
        seconds = time.perf_counter() - start
    before = tokenizer.decode(ids, skip_special_tokens=True)
    text = tokenizer.decode(out, skip_special_tokens=True)[len(before) :]
    new = len(out) - len(ids)
    if as_json:
        print_json(
            {
                "checkpoint": checkpoint,
                "prompt": prompt,
                "text": text,
                "prompt_tokens": len(ids),
                "new_tokens": new,
                "seconds": seconds,
                "tokens_per_second": new / seconds,
                "device": where,
                "kv": kv,
                "cache_bytes": None if cache is None else cache.nbytes,
            }
        )
        return
    print(text.lstrip() if chat else prompt + text)
    sys.stdout.flush()
    options.note(f"{new} tokens in {seconds:.1f} s, {new / seconds:.1f} tokens/s on {where}")
    if cache is not None:
        options.note(f"KV cache {kv}: {cache.nbytes:,} bytes after {cache.get_seq_length()} tokens")


def _prompt_ids(tokenizer: Any, prompt: str, chat: bool, name: str) -> list[int]:
    """Token ids of the prompt as the model expects it."""
    if chat:
        if not tokenizer.chat_template:
            raise InputError(f"{name} has no chat template; leave --chat out")
        message = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        return tokenizer(text, add_special_tokens=False)["input_ids"]
    ids = tokenizer(prompt)["input_ids"]
    if not ids:
        raise InputError("the prompt is empty; give some text to continue")
    return ids


def _check(model: Any, name: str, given: int, new: int) -> None:
    """Raise ``InputError`` for a model that cannot continue this text."""
    if not model.can_generate():
        raise InputError(f"{name} is a {type(model).__name__}, which does not generate text")
    positions = getattr(model.config, "max_position_embeddings", None)
    if isinstance(positions, int) and given + new > positions:
        raise InputError(
            f"{given} tokens of prompt and {new} new ones exceed the {positions} positions of {name}; ask "
            "for fewer with --max-new-tokens"
        )


def _config(model: Any, tokenizer: Any, new: int, temperature: float) -> Any:
    """Greedy, or plain sampling: the model's own top-p and penalties would hide what quantization did."""
    from transformers import GenerationConfig

    own = getattr(model, "generation_config", None)
    end = getattr(own, "eos_token_id", None)
    end = tokenizer.eos_token_id if end is None else end
    pad = tokenizer.pad_token_id
    if pad is None:
        pad = end[0] if isinstance(end, list) else end
    draw = (
        {"do_sample": True, "temperature": temperature, "top_k": 0}
        if temperature > 0
        else {"do_sample": False}
    )
    return GenerationConfig(max_new_tokens=new, eos_token_id=end, pad_token_id=pad, **draw)
