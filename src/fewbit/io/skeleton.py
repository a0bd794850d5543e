"""A model without weights, and how weights get in and out of it.

The skeleton is the transformers class that the config names, built by its own constructor. As each parameter
is registered it is replaced by one on the meta device, so nothing is initialised or allocated, while every
buffer (rotary frequencies, causal masks, embedding scales) is computed for real. Building it takes as long as
running the constructor: no table per architecture says which buffers there are.

``parameter_map`` says where each parameter comes from, by the renamings that transformers itself applies when
it loads (prefix of the base model, old names of norms, moved modules). Parameters that are one object are
tied, and share one stored tensor. Experts that transformers holds as one 3-D parameter are linears of their
own here (``fewbit.nn.experts``), under the names that checkpoints have for them; where a file stores them
fused, they are cut out of it. ``materialize`` and ``dematerialize`` bring named parameters in and give them
back.

Road not taken: ``torch.device("meta")`` around the constructor makes the buffers meta too, and what they
held is not in the checkpoint.
"""

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fewbit.errors import InputError
from fewbit.io.base import Source, first_line
from fewbit.io.renaming import cut_experts, expert_names, renamed
from fewbit.nn.experts import split_experts

# What constructors of transformers and torch raise for numbers that mean no model.
WRONG = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
ROOM = 2**26  # elements of a tensor that any model may have, such as masks and tables of positions


def build_skeleton(source: Source) -> nn.Module:
    """The model of ``source`` in evaluation mode: parameters on meta (float32), buffers real and on the CPU.

    The class is the one that ``config.architectures`` names first, else what ``AutoModelForCausalLM`` picks.
    Raises ``InputError`` when it exists only as custom code. The global random state and default dtype stay
    as they are.
    """
    import transformers

    config = copy.deepcopy(source.config())
    named = next(iter(config.architectures or ()), None)
    cls = getattr(transformers, named, None) if isinstance(named, str) else None
    known = isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)
    with _weightless(source):
        if known:
            model = _construct(cls, config, source.name)
        elif getattr(config, "auto_map", None):
            raise InputError(
                f"{source.name} needs custom code from its repository (class {named!r:.60} is not in "
                "transformers), which is never run; use a model that transformers supports natively."
            )
        else:
            try:
                model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
            except ValueError as error:
                raise InputError(
                    f"{source.name} is a {config.model_type} model of class {named!r:.60}, which "
                    "transformers does not have as a language model; use a causal or masked language model."
                ) from error
        split_experts(model, expert_names(model))
    return model.eval()


def _construct(cls: type, config, name: str) -> nn.Module:
    """``cls(config)``; what a constructor makes of numbers that mean no model becomes one sentence."""
    try:
        return cls(config)
    except InputError:
        raise
    except WRONG as error:
        raise InputError(
            f"transformers cannot build {cls.__name__} from the configuration of {name} "
            f"({first_line(error)}); it is damaged, get it again."
        ) from error


@contextmanager
def _weightless(source: Source):
    """Parameters registered inside become meta; random state and default dtype are restored afterwards.

    Raises ``InputError`` before more is allocated, and when more is registered, than the tensors of
    ``source`` leave room for: a configuration can ask for a model of any size.
    """
    from torch.nn.modules.module import register_module_parameter_registration_hook

    held = sum(math.prod(info.shape) for info in source.tensors().values())
    most, seen = max(2 * held, ROOM) if held else math.inf, 0

    def allow(elements: int) -> None:
        if elements > most:
            raise InputError(
                f"The configuration of {source.name} asks for a model far larger than its {held} stored "
                "weights; configuration and weights do not belong together."
            )

    def to_meta(module: nn.Module, name: str, param: nn.Parameter):
        if (
            param is None or param.is_meta
        ):  # one that is meta already may be tied: it must stay the same object
            return None
        nonlocal seen
        seen += param.numel()
        allow(seen)
        return nn.Parameter(param.detach().to("meta"), requires_grad=param.requires_grad)

    before = torch.get_default_dtype()
    handle = register_module_parameter_registration_hook(to_meta)
    try:
        torch.set_default_dtype(torch.float32)
        with torch.random.fork_rng(devices=[]), _Allocations(allow):
            yield
    finally:
        torch.set_default_dtype(before)
        handle.remove()


class _Allocations(TorchDispatchMode):
    """Shows ``allow`` the elements of every tensor that is made of numbers alone, before it is made."""

    def __init__(self, allow: Callable[[int], None]):
        super().__init__()
        self.allow = allow

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        numbers = [a for a in args if isinstance(a, int | float)]
        if args and isinstance(args[0], list | tuple) and all(isinstance(n, int) for n in args[0]):
            self.allow(math.prod(args[0]))  # empty, zeros, full, rand
        elif args and len(numbers) == len(args):  # arange: end; start, end; start, end, step
            self.allow(int(max(map(abs, numbers))))
        return func(*args, **(kwargs or {}))


def parameter_map(source: Source, model: nn.Module) -> tuple[dict[str, str], tuple[str, ...]]:
    """(name in ``model.state_dict()`` -> stored name, stored names that nothing uses).

    Tied parameters map to the same stored tensor. A persistent buffer without a stored tensor is left out and
    keeps its computed value. Raises ``InputError`` for a parameter without a stored tensor, a shape that
    differs, tied parameters stored with different values, and models whose tensors transformers rebuilds on
    loading.
    """
    cut_experts(source, model)
    infos = source.tensors()
    slots = model.state_dict(keep_vars=True)
    mapping: dict[str, str] = {}
    unused = []
    for stored, name in renamed(source, model, infos, slots):
        if name in slots and name not in mapping:
            mapping[name] = stored
        else:
            unused.append(stored)

    for names in _tied(model):
        present = [name for name in names if name in mapping]
        if present:
            _check_equal(source, {name: mapping[name] for name in present})
            unused += sorted({mapping[name] for name in present[1:]} - {mapping[present[0]]})
            mapping.update(dict.fromkeys(names, mapping[present[0]]))

    missing = [
        name for name, value in slots.items() if name not in mapping and isinstance(value, nn.Parameter)
    ]
    if missing:
        raise InputError(_why_missing(source, missing))
    for name, stored in mapping.items():
        if tuple(slots[name].shape) != infos[stored].shape:
            raise InputError(
                f"{source.name} stores {stored} with shape {list(infos[stored].shape)}, but its config "
                f"asks for {list(slots[name].shape)}; config.json and weights do not belong together."
            )
        stored_as = infos[stored].dtype
        if isinstance(slots[name], nn.Parameter) and not (
            stored_as.is_floating_point and stored_as.itemsize > 1
        ):
            raise InputError(
                f"{source.name} stores {stored} as {stored_as}, which is no float of 16 bits or more, and "
                "says of no step that belongs to it; the checkpoint is damaged or its config.json incomplete."
            )
    ordered = {name: mapping[name] for name in slots if name in mapping}
    return ordered, tuple(unused)


def _tied(model: nn.Module) -> list[list[str]]:
    """Groups of two or more names that are one parameter."""
    groups: dict[int, list[str]] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(param), []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def _check_equal(source: Source, mapping: Mapping[str, str]) -> None:
    """Refuse a file that stores tied parameters twice and differently: one of the two would be lost."""
    (first, kept), *others = mapping.items()
    for name, stored in others:
        pair = source.read([kept, stored])
        if not torch.equal(pair[kept], pair[stored]):
            raise InputError(
                f"The config of {source.name} ties {name} to {first}, but the file stores different "
                'values for them; set "tie_word_embeddings" to false in config.json.'
            )


def _why_missing(source: Source, missing: list[str]) -> str:
    shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
    return (
        f"{source.name} stores no tensor for {shown}; the checkpoint is incomplete or its config names "
        "another class than it was saved from."
    )


def materialize(
    model: nn.Module,
    names: Iterable[str],
    source: Source,
    mapping: Mapping[str, str],
    device: str | torch.device,
    dtype: torch.dtype,
) -> None:
    """Put the named parameters and buffers in place by one ``source.read``; cast floating ones to ``dtype``.

    What the model's class says must stay float32 (a router's correction of its scores) is never narrowed.
    All names that share a stored tensor get it as one and the same parameter, also those not asked for.
    Buffers that were computed (not read) move to ``device``, in their own dtype, throughout the model.
    """
    holders: dict[str, list[str]] = {}
    for name, stored in mapping.items():
        holders.setdefault(stored, []).append(name)
    wanted = list(dict.fromkeys(mapping[name] for name in names))
    tensors = source.read(wanted)
    wide = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    for stored in wanted:
        value = tensors.pop(stored)
        own = torch.float32 if wide & set(holders[stored][0].split(".")) else dtype
        value = value.to(device, own if value.is_floating_point() else value.dtype)
        _place(model, holders[stored], value)
        del value
    for module in model.modules():
        for key, buffer in module._buffers.items():
            if buffer is not None and not buffer.is_meta and buffer.device != torch.device(device):
                module._buffers[key] = buffer.to(device)


def _place(model: nn.Module, names: list[str], value: torch.Tensor) -> None:
    """Set ``value`` at all ``names``: as one shared parameter, or as a buffer where the slot is one."""
    shared = None
    for name in names:
        owner, _, key = name.rpartition(".")
        module = model.get_submodule(owner)
        if key in module._buffers:
            module._buffers[key] = value
        elif shared is None:
            shared = module._parameters[key]
            fresh = nn.Parameter(value, requires_grad=shared.requires_grad and value.is_floating_point())
            torch.utils.swap_tensors(shared, fresh)
        else:
            module._parameters[key] = shared


def dematerialize(module: nn.Module) -> None:
    """All parameters of ``module`` back to meta, memory given back; those tied to them elsewhere go along.

    Buffers stay: computed ones cannot be read again, and they are small.
    """
    for param in module.parameters():
        if not param.is_meta:
            # In place, not by replacement: a tied parameter in another module is this same object.
            meta = nn.Parameter(param.detach().to("meta"), requires_grad=param.requires_grad)
            torch.utils.swap_tensors(param, meta)
            del meta
