"""Where models come from: a folder or hub repository of safetensors, a GGUF file, or the packaged model.

A :class:`Source` answers what the streaming loop asks, and nothing more: the configuration, the tokenizer,
the list of stored tensors (from the headers alone), and some named tensors now. Tensors come back as owned
memory and no file stays mapped between two reads, so a process that walks through the blocks one by one holds
one block, whatever the size of the file.

Only safetensors and GGUF are read. Pickled weights (``pytorch_model.bin``) and code that a repository brings
along are never loaded: both can run anything. The cost is that models which exist only in those forms are
refused.

Road not taken: ``from_pretrained`` and then quantize. It is simpler and needs the whole model in memory.
"""

import json
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path

import torch

from fewbit.errors import InputError
from fewbit.io.base import Cut, Source, TensorInfo, check_finite, content_hash, first_line
from fewbit.io.files import check_layers, open_weights, read_header, read_json, shard_names
from fewbit.io.locate import PACKAGED, from_hub, is_hub_id, packaged_file

__all__ = ["SafetensorsSource", "Source", "TensorInfo", "check_finite", "open_source"]

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "vocab.txt",
)
COMPANION_FILES = (
    *TOKENIZER_FILES,
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)


def open_source(model: str | Path) -> Source:
    """The source behind what a user typed.

    ``model`` is ``smollm2`` (the packaged model; a folder of that name is ``./smollm2``), a folder with
    safetensors, a ``.gguf`` file, or a hub id. Raises ``InputError`` when it is none of these.
    """
    from fewbit.io.checkpoint import open_folder
    from fewbit.io.gguf import GgufSource

    name = str(model)
    if name == PACKAGED:
        return GgufSource(packaged_file(), name)
    if not name:
        raise InputError(
            f"The name of the model is empty; give a folder, a .gguf file, a hub id, or {PACKAGED!r}."
        )
    path = Path(model).expanduser()
    if path.is_dir():
        return open_folder(path, name)
    if path.is_file():
        if path.suffix == ".gguf":
            return GgufSource(path, name)
        raise InputError(
            f"{name} is a single file that is not GGUF; give a .gguf file, or the folder of the safetensors."
        )
    if path.suffix == ".gguf" or not is_hub_id(name):
        raise InputError(
            f"There is no model at {name}; give a folder, a .gguf file, a hub id, or {PACKAGED!r}."
        )
    return open_folder(from_hub(name), name)


class SafetensorsSource(Source):
    """A folder with ``config.json`` and safetensors: one file, or an index and its shards."""

    def __init__(self, folder: Path, name: str):
        """List the stored tensors. Raises ``InputError`` for a folder, index or file that cannot be read."""
        self.name = name
        self.folder = folder
        self._infos: dict[str, TensorInfo] = {}
        self._file_of: dict[str, Path] = {}
        self._index: dict[str, str] = {}
        self._cuts: dict[str, Cut] = {}
        self.files = self._find_files()
        for path in self.files:
            headers = read_header(path)
            self._infos |= headers
            self._file_of |= dict.fromkeys(headers, path)
        for tensor, shard in self._index.items():
            if self._file_of.get(tensor) != folder / shard:
                raise InputError(
                    f"The index of {name} says that {shard} holds {tensor}, but it does not; get both again."
                )
        if not self._infos:
            raise InputError(
                f"The safetensors in {name} hold no tensor; the checkpoint is empty, get it again."
            )

    def config(self):
        """See :class:`Source`. Raises ``InputError`` when there is none or it needs custom code."""
        return self._config

    @cached_property
    def _config(self):
        from transformers import AutoConfig
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        raw = self._raw_config
        kind = raw.get("model_type")
        if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
            if "auto_map" in raw:
                raise InputError(
                    f"{self.name} needs custom code from its repository (model_type {kind!r:.60} is not in "
                    "transformers), which is never run; use a model that transformers supports natively."
                )
            raise InputError(
                f"The config.json of {self.name} gives model_type {kind!r:.60}, which this transformers "
                "does not know; use a supported model or a newer transformers."
            )
        check_layers(raw, self.tensors(), self.name)
        try:
            return _own_code(AutoConfig.from_pretrained(self.folder, trust_remote_code=False))
        except Exception as error:  # every config class checks its fields in its own way
            raise InputError(
                f"transformers cannot use the config.json of {self.name} ({first_line(error)}); correct it."
            ) from error

    @cached_property
    def _raw_config(self) -> dict:
        path = self.folder / "config.json"
        if not path.is_file():
            raise InputError(
                f"{self.name} has no config.json; give the folder of a complete Hugging Face checkpoint."
            )
        return read_json(path)

    def tokenizer(self):
        """See :class:`Source`."""
        from transformers import AutoTokenizer

        if not any((self.folder / file).is_file() for file in TOKENIZER_FILES):
            raise InputError(
                f"{self.name} comes without a tokenizer; copy its tokenizer.json into the folder."
            )
        try:
            tokenizer = AutoTokenizer.from_pretrained(self.folder, trust_remote_code=False)
        except Exception as error:  # the loaders raise whatever their formats raise
            raise InputError(
                f"The tokenizer of {self.name} cannot be loaded ({first_line(error)}); "
                "copy a complete tokenizer.json into the folder."
            ) from error
        if not tokenizer.is_fast:
            raise InputError(f"{self.name} has only a slow tokenizer; convert it to a tokenizer.json first.")
        return tokenizer

    def tensors(self) -> dict[str, TensorInfo]:
        """See :class:`Source`."""
        whole = {cut.stored for cut in self._cuts.values()}
        out = {name: info for name, info in self._infos.items() if name not in whole}
        return out | {name: self._cut_info(cut) for name, cut in self._cuts.items()}

    def present(self, cuts: Mapping[str, Cut]) -> None:
        """See :class:`Source`."""
        self._cuts |= cuts

    def _cut_info(self, cut: Cut) -> TensorInfo:
        own = self._infos[cut.stored]
        shape = cut.take(torch.empty(own.shape[1:], device="meta")).shape
        return TensorInfo(shape=tuple(shape), dtype=own.dtype, nbytes=own.dtype.itemsize * shape.numel())

    def kept_dtype(self, name: str) -> torch.dtype:
        """See :class:`Source`: the dtype of the file, where that is no code of a quantized weight."""
        stored = self._cuts[name].stored if name in self._cuts else name
        own = self._infos[stored].dtype if stored in self._infos else self.dtype
        return own if own.is_floating_point and own.itemsize > 1 else self.dtype

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """See :class:`Source`. Files are opened for this call alone; the copies own their memory."""
        by_file: dict[Path, list[str]] = {}
        for name in names:
            stored = self._cuts[name].stored if name in self._cuts else name
            by_file.setdefault(self._file_of[stored], []).append(name)
        result = {}
        for path, members in by_file.items():
            with open_weights(path) as file:
                for name in members:
                    if (cut := self._cuts.get(name)) is not None:
                        result[name] = cut.take(file.get_slice(cut.stored)[cut.index]).clone()
                    else:
                        result[name] = file.get_tensor(name).clone()
        return result

    @property
    def dtype(self) -> torch.dtype:
        """The config's dtype, else the float dtype that holds most of the stored bytes."""
        if isinstance(self.config().dtype, torch.dtype):
            return self.config().dtype
        weight = Counter()
        for info in self._infos.values():
            if info.dtype.is_floating_point:
                weight[info.dtype] += info.nbytes
        return weight.most_common(1)[0][0] if weight else torch.float32

    def companions(self, folder: Path) -> list[str]:
        """See :class:`Source`. ``auto_map`` is dropped too: the code it points to is not copied."""
        config = {k: v for k, v in self._raw_config.items() if k not in ("quantization_config", "auto_map")}
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        extra = [p.relative_to(self.folder) for p in self.folder.glob("additional_chat_templates/*.jinja")]
        present = [Path(file) for file in COMPANION_FILES if (self.folder / file).is_file()]
        for file in [*present, *extra]:
            (folder / file).parent.mkdir(exist_ok=True)
            shutil.copyfile(self.folder / file, folder / file)
        return ["config.json", *(str(file) for file in [*present, *sorted(extra)])]

    def fingerprint(self) -> str:
        """See :class:`Source`. Covers the config and tokenizer files as well: they decide the result too."""
        small = [self.folder / f for f in ("config.json", *COMPANION_FILES) if (self.folder / f).is_file()]
        parts = [(p.name, p, p.stat().st_size) for p in small]
        for path in self.files:
            with path.open("rb") as file:
                parts.append((path.name, path, 8 + int.from_bytes(file.read(8), "little")))
        return content_hash(parts)

    def _find_files(self) -> list[Path]:
        index = self.folder / "model.safetensors.index.json"
        single = self.folder / "model.safetensors"
        if index.is_file():
            self._index = shard_names(index)
            names = sorted(set(self._index.values()))
            return [self.folder / name for name in names]
        found = [single] if single.is_file() else sorted(self.folder.glob("*.safetensors"))
        if len(found) > 1:
            raise InputError(
                f"{self.name} holds {len(found)} safetensors files but no model.safetensors.index.json; "
                "add the index."
            )
        if not found:
            raise InputError(self._why_nothing())
        return found

    def _why_nothing(self) -> str:
        pickles = [p.name for kind in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in self.folder.glob(kind)]
        if pickles:
            return (
                f"{self.name} has only pickled weights ({pickles[0]}), which are never loaded because a "
                "pickle can run code; convert them to safetensors first."
            )
        ggufs = sorted(self.folder.glob("*.gguf"))
        if ggufs:
            return f"{self.name} is a folder with GGUF files; name the file itself, for example {ggufs[0]}."
        return f"{self.name} holds no safetensors weights; give the folder of a Hugging Face checkpoint."


def _own_code(config):
    """``config`` without kernels that it would have transformers fetch from the hub and run.

    A name with a slash in ``_attn_implementation`` is a repository of code to transformers.
    """
    from transformers import PreTrainedConfig

    for part in (config, *(v for v in vars(config).values() if isinstance(v, PreTrainedConfig))):
        for key in ("_attn_implementation_internal", "_experts_implementation_internal"):
            if getattr(part, key, None) not in (None, "eager", "sdpa"):
                setattr(part, key, None)
    return config
