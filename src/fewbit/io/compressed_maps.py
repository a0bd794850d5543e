"""compressed-tensors' ``transform_config``: maps that run at every call, before or after a linear.

    "input"    x -> x M / sqrt(n)      M [n, n] of +-1, or block by block where "head_dim" says n
    "output"   y -> y M / sqrt(n)      M^T where "inverse" is true
    "weight_input", "weight_output"    nothing at run time: a record of what the stored weights went through

"hadamard" is Sylvester's matrix, for n a power of two, and stores nothing. "random-hadamard" is any matrix of
the file, X.NAME_input.weight, which stands once, in the first module that uses it. A map here is a seed and
not a matrix (``fewbit.transform.Hadamard``), so NAME carries the seed, and a matrix that is read must be the
one that the seed draws.

The library runs these maps where it is asked to (``apply_transform_config``), vLLM while it serves, on one
GPU; transformers 5.23 ignores the whole entry.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fewbit.errors import InputError
from fewbit.io.base import TensorInfo
from fewbit.io.compressed_targets import targets
from fewbit.io.parts import take
from fewbit.transform import Hadamard, Map

KEY = "transform_config"
Maps = tuple[Map | None, Map | None]  # of the input, and the one whose inverse the output takes


def refusal(online: Map | None, output: Map | None) -> str | None:
    """Why the maps of a module cannot be held; None when they can."""
    if output is not None:
        return "it takes a map of its output at every call, each layer another, and there they are matrices"
    if online is None:
        return None
    if not isinstance(online, Hadamard):
        return f"it holds Hadamard maps of inputs, not {type(online).__name__}"
    if not online.exact:
        return f"it holds matrices of +-1, and {online} is none"
    if online.block is not None and online.seed is not None:
        return "its signs differ from block to block, and there all blocks of a map are alike"
    return None


def to_config(maps: Mapping[str, Map | None]) -> dict:
    """The entry of the configuration for the maps of inputs, by module; empty without any."""
    groups = {}
    for map, modules in _shared(maps).items():
        groups[_name(map)] = {
            "type": "hadamard" if _plain(map) else "random-hadamard",
            "apply": [{"targets": modules, "location": "input", "inverse": False, "ignore": []}],
            "randomize": False,
            "head_dim": map.block,
        }
    return {KEY: {"config_groups": groups}} if groups else {}


def to_dict(maps: Mapping[str, Map | None], dtype: torch.dtype) -> dict[str, Tensor]:
    """The matrices of a file, of +-1 in ``dtype``."""
    shared = {m: modules for m, modules in _shared(maps).items() if not _plain(m)}
    return {f"{modules[0]}.{_name(m)}_input.weight": _matrix(m).to(dtype) for m, modules in shared.items()}


def stored(config: Mapping, infos: Mapping[str, TensorInfo]) -> list[str]:
    """Names of the tensors that belong to maps."""
    names = "|".join(re.escape(name) for name in _groups(config))
    own = re.compile(rf".*[.](?:{names})_(?:input|output)[.](?:weight|perm)")
    return [n for n in infos if own.fullmatch(n)] if names else []


def from_config(
    config: Mapping,
    shapes: Mapping[str, tuple[int, ...]],
    infos: Mapping[str, TensorInfo],
    read: Callable[[list[str]], dict[str, Tensor]],
) -> dict[str, Maps]:
    """The maps of every quantized module that has one. shapes: [out, in] of all of them, by name.

    Raises ``InputError`` for maps that are not read, and where one is of a layer that is not quantized.
    """
    out: dict[str, Maps] = {}
    own = set(stored(config, infos))
    matrices = (n for n, i in infos.items() if n.endswith(".weight") and len(i.shape) == 2 and n not in own)
    plain = [m for n in matrices if (m := n.removesuffix(".weight")) not in shapes]
    for name, group in _groups(config).items():
        if not isinstance(group, Mapping):
            raise InputError(f"the transform {name!r:.60} of this checkpoint is no object; it is broken")
        for how in group.get("apply") or ():
            where = how.get("location")
            if where in ("weight_input", "weight_output"):
                continue
            if where not in ("input", "output"):
                raise _unread(name, f"a map of {where!s:.20}")
            meant, spared = targets([how]), targets([{"targets": how.get("ignore") or []}])
            hit = [m for m in (*shapes, *plain) if meant(m) and not spared(m)]
            outside = next((m for m in hit if m not in shapes and not _is_table(m)), None)
            if outside is not None:
                raise _unread(name, f"a map of {outside}, which is not quantized,")
            for module in (m for m in hit if m in shapes):
                out[module] = _join(out.get(module, (None, None)), name, group, where, shapes[module], module)
                if where == "output" and f"{module}.bias" in infos:
                    raise _unread(name, f"a map of the output of {module}, which has a bias,")
            _check_matrices(name, group, where, [m for m in hit if m in shapes], out, infos, read)
    return out


def _join(before: Maps, name: str, group: Mapping, where: str, shape: tuple[int, ...], module: str) -> Maps:
    """The maps of a module with one more."""
    side = 0 if where == "input" else 1
    if before[side] is not None:
        raise _unread(name, f"a second map of the {where} of {module}")
    n, block = shape[1 - side], group.get("head_dim")
    if group.get("randomize") or (block is not None and (type(block) is not int or block < 1 or n % block)):
        raise _unread(name, f"a map of {n} channels in blocks of {block!r:.20}, or one in a random order,")
    seed = re.fullmatch(r".*_seed(\d{1,9})", name)
    map = Hadamard(n, seed=None if seed is None else int(seed[1]), block=block)
    if group.get("type") == "hadamard":
        map = Hadamard(n, block=block)
        if not _plain(map):
            raise _unread(name, f"Sylvester's matrix of {block or n} channels, which is no power of two,")
    elif group.get("type") != "random-hadamard" or side:
        raise _unread(name, f"a map of type {group.get('type')!s:.30} of the {where}")
    return (map, before[1]) if side == 0 else (before[0], map)


def _check_matrices(
    name: str, group: Mapping, where: str, modules: list[str], out: Mapping[str, Maps], infos, read
) -> None:
    """A matrix of the file must be the one that our map draws."""
    if group.get("type") != "random-hadamard" or not modules:
        return
    held = [n for m in modules if (n := f"{m}.{name}_{where}.weight") in infos]
    if not held:
        raise InputError(f"the checkpoint has no matrix of its transform {name!s:.60}; it is incomplete")
    for tensor in held:
        map = out[tensor.removesuffix(f".{name}_{where}.weight")][0]
        side = map.block or map.size
        if infos[tensor].shape != (side, side):
            raise InputError(f"{tensor} has shape {list(infos[tensor].shape)} instead of {[side, side]}")
        got = take(read([tensor]), tensor, (side, side), torch.float32, torch.float16, torch.bfloat16)
        if refusal(map, None) or not torch.equal(got.float(), _matrix(map)):
            raise _unread(name, "a matrix that fewbit does not draw from the seed in its name,")


def _groups(config: Mapping) -> Mapping:
    found = config.get(KEY) or {}
    groups = found.get("config_groups") if isinstance(found, Mapping) else None
    if not isinstance(groups, Mapping) and found:
        raise InputError(f"the {KEY} of this checkpoint has no config_groups; it is broken")
    return groups or {}


def _shared(maps: Mapping[str, Map | None]) -> dict[Hadamard, list[str]]:
    """Modules by their map."""
    out: dict[Hadamard, list[str]] = {}
    for module, map in maps.items():
        if map is not None:
            out.setdefault(map, []).append(module)
    return out


def _plain(map: Hadamard) -> bool:
    """Whether it is Sylvester's matrix."""
    n = map.block or map.size
    return map.seed is None and n & (n - 1) == 0


def _name(map: Hadamard) -> str:
    block = "" if map.block is None else f"_blocks_of_{map.block}"
    return f"hadamard_{map.size}{block}{'' if map.seed is None else f'_seed{map.seed}'}"


def _matrix(map: Hadamard) -> Tensor:
    """M [n, n] float32 of +-1; of equal blocks one."""
    n = map.block or map.size
    one = Hadamard(n, seed=map.seed) if map.block is not None else map
    return (one.apply(torch.eye(n)) * math.sqrt(n)).round()


def _is_table(module: str) -> bool:
    """Whether a matrix that no config group quantizes is an embedding by its name."""
    return re.search(r"emb|wte|wpe|(^|[.])shared$", module) is not None


def _unread(name: str, what: str) -> InputError:
    return InputError(
        f"the transform {name!s:.60} of this compressed-tensors checkpoint is {what} that is not read"
    )
