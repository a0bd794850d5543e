"""A tokenizer as GGUF metadata: the way back of ``fewbit.io.gguf_tokenizer``.

A GGUF names the rule that cuts a text before the merges, where tokenizer.json spells it out. So the rule is
found by trial: for each name that is known, the tokenizer is built again from the metadata as a reader will
build it, and must cut and encode a text of traps (digits, contractions, runs of spaces and newlines, accents
in two spellings, several scripts, every special token) as the original does. A tokenizer that no rule
reproduces is refused.

Road not taken: llama.cpp's converter recognises tokenizers by a hash of what they make of a text, from a list
of models that must be kept up.
"""

import json

from fewbit.errors import InputError
from fewbit.io.gguf_tokenizer import (
    CONTROL,
    UNKNOWN,
    USER_DEFINED,
    build_tokenizer,
    merges_from_scores,
)

NORMAL, UNUSED, BYTE = 1, 5, 6  # token types of the file, beside those of the reader
RULES = ("gpt-2", "smollm", "qwen2", "llama-bpe")
TRAPS = (
    "Hello the things, 1234567 x86 3.14 ünï u\u0308 I'LL we've don't\r\n\n\n new   text\t\t tail  ",
    " leading, and \u00a0 odd spaces; ABC_def::ghi(jkl)[0] = 'mno' -> {pqr}! \U0001f600\u200d",
    "日本語 текст العربية ١٢٣ Ⅷ x² naïve nai\u0308ve",
)


def tokenizer_metadata(tokenizer, rows: int, name: str) -> dict:
    """Metadata keys and values of a fast tokenizer for an embedding of ``rows`` rows.

    Raises ``InputError`` for a tokenizer that a GGUF cannot describe; ``name`` is the model's.
    """
    core = json.loads(tokenizer.backend_tokenizer.to_str())
    model = core["model"]
    if model.get("type") != "BPE":
        raise InputError(
            f"the tokenizer of {name} is {model.get('type')}; a GGUF is written with byte-level BPE or "
            "SentencePiece's, export the model to another format"
        )
    tokens, types = _tokens(tokenizer, model, rows, name)
    data = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    data |= _special(tokenizer)
    if isinstance(tokenizer.chat_template, str):
        data["tokenizer.chat_template"] = tokenizer.chat_template
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ", 1)) for m in model["merges"]]
    for more in _kinds(tokens, merges, bool(model.get("byte_fallback"))):
        if _same(tokenizer, data | more, name):
            return data | more
    raise InputError(
        f"the tokenizer of {name} cuts its text by none of the rules that a GGUF can name here "
        f"({', '.join(RULES)}, SentencePiece); export it to another format"
    )


def _kinds(tokens: list[str], merges: list[tuple[str, str]], sentencepiece: bool):
    """What is tried beside the tokens: each rule of byte-level BPE, or SentencePiece's scores."""
    if not sentencepiece:
        joined = [" ".join(merge) for merge in merges]
        for rule in RULES:
            own = {
                "tokenizer.ggml.model": "gpt2",
                "tokenizer.ggml.pre": rule,
                "tokenizer.ggml.merges": joined,
            }
            yield own | {"tokenizer.ggml.add_space_prefix": False}
        return
    rank: dict[str, int] = {}
    for i, (left, right) in enumerate(merges):
        rank.setdefault(left + right, i)
    scores = [-float(rank.get(token, len(merges))) for token in tokens]
    if [m for m in merges_from_scores(tokens, scores) if m[0] + m[1] in rank] == merges:
        for space in (True, False):
            yield {
                "tokenizer.ggml.model": "llama",
                "tokenizer.ggml.pre": "default",
                "tokenizer.ggml.scores": scores,
                "tokenizer.ggml.add_space_prefix": space,
            }


def _tokens(tokenizer, model: dict, rows: int, name: str) -> tuple[list[str], list[int]]:
    """Tokens and their types by id; rows of the embedding without a token are filled up as unused."""
    vocab = dict(tokenizer.get_vocab())
    if len(vocab) > rows or max(vocab.values()) >= rows:
        raise InputError(
            f"the tokenizer of {name} has tokens up to number {max(vocab.values())} and the embedding {rows} "
            "rows; they do not belong together"
        )
    tokens = [f"[PAD{i}]" for i in range(rows)]
    types = [UNUSED] * rows
    added = tokenizer.added_tokens_decoder
    for token, i in vocab.items():
        tokens[i], types[i] = token, NORMAL
        if i in added:
            types[i] = CONTROL if added[i].special else USER_DEFINED
        elif model.get("byte_fallback") and len(token) == 6 and token.startswith("<0x"):
            types[i] = BYTE
    if model.get("byte_fallback") and model.get("unk_token") in vocab:
        types[vocab[model["unk_token"]]] = UNKNOWN
    return tokens, types


def _special(tokenizer) -> dict:
    """Numbers of special tokens, and whether a text begins with one."""
    data = {}
    for role, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        if (number := getattr(tokenizer, f"{role}_token_id")) is not None:
            data[f"tokenizer.ggml.{key}_token_id"] = number
    ids = tokenizer("a").input_ids
    data["tokenizer.ggml.add_bos_token"] = len(ids) > 1 and ids[0] == tokenizer.bos_token_id
    return data


def _same(tokenizer, data: dict, name: str) -> bool:
    """True when a reader of the metadata cuts and encodes as the tokenizer does."""
    rebuilt = build_tokenizer(data, name)
    specials = "x".join(token.content for token in tokenizer.added_tokens_decoder.values())
    texts = (*TRAPS, specials)
    if any(rebuilt(t).input_ids != tokenizer(t).input_ids for t in texts):
        return False
    return all(_cut(rebuilt, t) == _cut(tokenizer, t) for t in TRAPS)


def _cut(tokenizer, text: str) -> list[str]:
    core = tokenizer.backend_tokenizer
    text = core.normalizer.normalize_str(text) if core.normalizer else text
    return [piece for piece, _ in core.pre_tokenizer.pre_tokenize_str(text)] if core.pre_tokenizer else [text]
