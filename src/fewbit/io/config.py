"""A model's configuration alone, for questions that need shapes and no weights.

Road not taken: ``open_source`` for these questions too. It asks for the weights, and from the hub it fetches
them: gigabytes to answer what two kilobytes say.
"""

from __future__ import annotations

from pathlib import Path

from fewbit.io.base import Source, TensorInfo
from fewbit.io.locate import PACKAGED, from_hub, is_hub_id
from fewbit.io.source import SafetensorsSource, open_source


class ConfigSource(SafetensorsSource):
    """A folder that holds ``config.json``, whatever else it holds: a configuration and no tensors."""

    def __init__(self, folder: Path, name: str):
        """Reads nothing yet; ``config()`` raises ``InputError`` for a file that cannot be used."""
        self.name = name
        self.folder = folder

    def tensors(self) -> dict[str, TensorInfo]:
        """None: the weights are not looked at."""
        return {}


def open_config(model: str | Path) -> Source:
    """The source of ``model`` for its configuration; of a hub id only ``config.json`` is downloaded.

    ``model`` is what ``open_source`` takes, or a folder with nothing but ``config.json``. Raises
    ``InputError`` when it is none of these.
    """
    name, path = str(model), Path(model).expanduser()
    if name and (path / "config.json").is_file():
        return ConfigSource(path, name)
    if name == PACKAGED or path.exists() or not is_hub_id(name):
        return open_source(model)
    return ConfigSource(from_hub(name, ("config.json",)), name)
