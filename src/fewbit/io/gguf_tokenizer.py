"""The tokenizer inside a GGUF file, rebuilt with the ``tokenizers`` library.

Two kinds exist. ``gpt2`` is byte-level BPE: tokens and merges are in the file, and ``tokenizer.ggml.pre``
names the rule that cuts the text before the merges. That rule decides the tokens as much as the vocabulary
does, so an unknown name is refused, never guessed. ``llama`` is SentencePiece BPE (Llama 2, Mistral): the
file has scores in place of merges, and the merge list follows from them: a piece that is the join of two
pieces is a merge, best score first.
"""

from collections.abc import Mapping

from fewbit.errors import InputError

# How a text is cut, as the models' own tokenizer.json files have it; {} takes the rule for digits.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {"qwen2": WORDS.format(r"\p{N}"), "llama-bpe": WORDS.format(r"\p{N}{1,3}")}
SINGLE_DIGITS = ("smollm", "starcoder", "refact", "command-r")
BYTE_LEVEL = ("gpt-2", "gpt2", *SINGLE_DIGITS, *SPLITS)
LONGEST = 1024  # characters of a token: the ways to cut it grow with the square
UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4  # token types of the file


def build_tokenizer(metadata: Mapping, name: str):
    """The transformers fast tokenizer that the metadata of a GGUF file describe.

    Special tokens, the begin-of-text rule and the chat template are set. Raises ``InputError`` when the file
    has no tokenizer or one of another kind. ``name`` is the model's name for the message.
    """
    from tokenizers import AddedToken, processors
    from transformers import PreTrainedTokenizerFast

    tokens = metadata.get("tokenizer.ggml.tokens")
    kind = metadata.get("tokenizer.ggml.model")
    if not tokens:
        raise InputError(f"{name} comes without a tokenizer; use a GGUF file that holds one.")
    if kind == "gpt2":
        core = _byte_level(metadata, tokens, name)
    elif kind == "llama":
        core = _sentencepiece(metadata, tokens)
    else:
        raise InputError(
            f"{name} has a tokenizer of kind {kind!r:.60}; gpt2 (byte-level BPE) and llama are supported."
        )

    types = metadata.get("tokenizer.ggml.token_type", [])
    special = (CONTROL, UNKNOWN)
    added = [
        AddedToken(token, special=type_ in special, normalized=False)
        for token, type_ in zip(tokens, types, strict=False)
        if type_ in (*special, USER_DEFINED)
    ]
    core.add_tokens(added)
    roles = {}
    for role, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        index = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if index is not None and index < len(tokens):
            roles[f"{role}_token"] = tokens[index]
    starts = kind == "llama" or metadata.get("tokenizer.ggml.pre") == "llama-bpe"
    if metadata.get("tokenizer.ggml.add_bos_token", starts) and "bos_token" in roles:
        bos = roles["bos_token"]
        template = processors.TemplateProcessing(
            single=f"{bos}:0 $A:0",
            pair=f"{bos}:0 $A:0 {bos}:1 $B:1",
            special_tokens=[(bos, tokens.index(bos))],
        )
        core.post_processor = (
            processors.Sequence([core.post_processor, template]) if core.post_processor else template
        )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, clean_up_tokenization_spaces=False, **roles)
    tokenizer.chat_template = metadata.get("tokenizer.chat_template")
    context = metadata.get(f"{metadata.get('general.architecture')}.context_length")
    if context:
        tokenizer.model_max_length = context
    return tokenizer


def _byte_level(metadata: Mapping, tokens: list[str], name: str):
    """Byte-level BPE with the cutting rule that the file names."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    rule = metadata.get("tokenizer.ggml.pre", "none")
    if rule not in BYTE_LEVEL:
        raise InputError(
            f"{name} cuts its text by the rule {rule!r:.60}; supported are {', '.join(BYTE_LEVEL)}; "
            "give the safetensors checkpoint of this model instead."
        )
    merges = [tuple(merge.split(" ", 1)) for merge in metadata.get("tokenizer.ggml.merges", [])]
    vocab = {token: i for i, token in enumerate(tokens)}
    # Llama 3's vocabulary has words that no sequence of its merges builds; they are looked up first.
    core = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=rule == "llama-bpe"))
    if rule in SPLITS:
        cut = pre_tokenizers.Split(Regex(SPLITS[rule]), behavior="isolated")
        spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        core.pre_tokenizer = pre_tokenizers.Sequence([cut, spell])
    else:
        space = bool(metadata.get("tokenizer.ggml.add_space_prefix", False))
        steps = [pre_tokenizers.Digits(individual_digits=True)] if rule in SINGLE_DIGITS else []
        core.pre_tokenizer = pre_tokenizers.Sequence(
            [*steps, pre_tokenizers.ByteLevel(add_prefix_space=space, use_regex=True)]
        )
    if rule == "qwen2":
        core.normalizer = normalizers.NFC()
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.ByteLevel(trim_offsets=False)
    return core


def _sentencepiece(metadata: Mapping, tokens: list[str]):
    """SentencePiece BPE: spaces are written as U+2581, bytes without a piece as <0x..>."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    vocab = {token: i for i, token in enumerate(tokens)}
    scores = metadata["tokenizer.ggml.scores"]
    unknown = metadata.get("tokenizer.ggml.unknown_token_id", 0)
    core = Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=merges_from_scores(tokens, scores),
            unk_token=tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    spaces = [normalizers.Replace(" ", "▁")]
    if metadata.get("tokenizer.ggml.add_space_prefix", True):
        spaces.insert(0, normalizers.Prepend("▁"))
        steps.append(decoders.Strip(content=" ", left=1))
    core.normalizer = normalizers.Sequence(spaces)
    core.decoder = decoders.Sequence(steps)
    return core


def merges_from_scores(tokens: list[str], scores: list[float]) -> list[tuple[str, str]]:
    """The merge list of a SentencePiece BPE vocabulary: every join of two pieces into a third, by score.

    Among joins of the same piece, the one whose left part is the more frequent piece comes first.
    """
    vocab = {token: i for i, token in enumerate(tokens)}
    longest = max(map(len, tokens))
    if longest > LONGEST:
        raise InputError(f"a token of {longest} characters is none; the file is damaged, get it again.")
    merges = []
    for token, score in zip(tokens, scores, strict=True):
        ways = []
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocab and right in vocab:
                ways.append((-score, vocab[left], vocab[right], left, right))
        merges += sorted(ways)
    merges.sort(key=lambda way: way[0])  # stable: the order among joins of one piece stays
    return [(left, right) for *_, left, right in merges]
