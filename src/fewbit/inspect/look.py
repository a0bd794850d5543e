"""One look at a model: its blocks stream by once, and all that reports say is measured on the way.

Every batch of the text is a suspended forward (``fewbit.stream.suspend``). When all wait at a block, its
weights are read, it is run once on a few tokens to find out which linears read which tensor and which norm
gave it, and the batches flow through it past hooks that reduce what they see. Then the remedies are tried on
a sample of each input, and the weights are dropped. So memory is one block, the activations between two
blocks, and a few pictures.

Attention is run eagerly, so that modules return their weights; where one does not, its report is None.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from fewbit.errors import InputError
from fewbit.inspect.attention import AttentionReport, AttentionWatch, attentions
from fewbit.inspect.outliers import InputReport, Watch
from fewbit.inspect.remedies import BITS, Case, Norm, Remedy, some_rows
from fewbit.inspect.residual import Depth, depth
from fewbit.inspect.tokens import Tokens
from fewbit.io.skeleton import build_skeleton, dematerialize, materialize, parameter_map
from fewbit.io.source import check_finite, open_source
from fewbit.nn.blocks import find_blocks, linears, weight_of
from fewbit.seams.diagonal import gain_shift, trace
from fewbit.seams.residual import find_residual
from fewbit.seams.trial import first
from fewbit.stream.data import Calibration, sample_tokens
from fewbit.stream.suspend import Flow, advance, wait
from fewbit.stream.weights import forget, tensor

SMALL = 1 << 20  # parameters outside the blocks with fewer elements stay resident
BATCH_TOKENS = 1024  # of the text in one suspended forward
GUIDE = 128  # tokens on which a block is traced
PICTURES = 3  # inputs that lose most bits keep a picture

Errors = dict[int, dict[Remedy, float]]  # bits -> remedy -> error


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """One linear layer. shape (out, in); largest, rms and kurtosis of its weight; errors of its output."""

    name: str
    shape: tuple[int, int]
    largest: float
    rms: float
    kurtosis: float
    errors: Errors


@dataclass(frozen=True, kw_only=True)
class GroupReport:
    """Layers that read one tensor. norm: the norm that it comes out of, or None."""

    block: int
    layers: tuple[LayerReport, ...]
    input: InputReport
    norm: str | None

    @property
    def name(self) -> str:
        """'model.layers.3.self_attn.q_proj, k_proj, v_proj'."""
        rest = (layer.name.rpartition(".")[2] for layer in self.layers[1:])
        return ", ".join([self.layers[0].name, *rest])


@dataclass(frozen=True, kw_only=True, eq=False)
class Picture:
    """What is drawn of a group that loses many bits: |x| [tokens, in] of the first window, and a case."""

    group: GroupReport
    first: Tensor
    case: Case


@dataclass(frozen=True, kw_only=True, eq=False)
class Inspection:
    """What a look at a model has found. rotation: why its residual stream cannot be rotated, or ""; unseen:
    layers that the text never reached; pictures: the groups that lose most bits per token, the worst first.
    """

    model: str
    text: str
    windows: int
    seqlen: int
    groups: tuple[GroupReport, ...]
    attention: tuple[AttentionReport | None, ...]
    depths: tuple[Depth, ...]
    rotation: str
    unseen: tuple[str, ...]
    tokens: Tokens
    pictures: tuple[Picture, ...]

    @property
    def layers(self) -> tuple[LayerReport, ...]:
        """Every layer, in order."""
        return tuple(layer for g in self.groups for layer in g.layers)


@torch.no_grad()
def look(
    model: str | Path,
    text: Calibration,
    *,
    device: str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> Inspection:
    """Stream ``model`` once over ``text``; ``progress(blocks done, blocks)``.

    Raises ``InputError`` for a model or text that cannot be read, and for models without blocks.
    """
    source = open_source(model)
    skeleton = build_skeleton(source)
    mapping, _ = parameter_map(source, skeleton)
    run = _Run(skeleton, mapping, source, device)
    tokenizer = source.tokenizer()
    ids = _framed(sample_tokens(text, tokenizer), tokenizer)
    try:
        run.start(ids, tokenizer)
        for i in range(len(run.blocks)):
            run.block(i)
            if progress is not None:
                progress(i + 1, len(run.blocks))
    finally:
        run.end()
    if not run.groups:
        raise InputError(f"the text reached no linear layer of {model}; give a transformer language model")
    return Inspection(
        model=str(model),
        text=str(text.source or "embedded"),
        windows=text.samples,
        seqlen=text.seqlen,
        groups=tuple(run.groups),
        attention=tuple(run.attention),
        depths=tuple(run.depths),
        rotation=run.rotation,
        unseen=tuple(run.unseen),
        tokens=run.tokens,
        pictures=tuple(run.pictures),
    )


class _Run:
    """State of one look."""

    def __init__(self, model: nn.Module, mapping: dict[str, str], source, device: str):
        self.model, self.mapping, self.source, self.device = model, mapping, source, device
        self.blocks = find_blocks(model)
        self.dtype = torch.float32 if device == "cpu" else source.dtype
        self.groups: list[GroupReport] = []
        self.attention: list[AttentionReport | None] = []
        self.depths: list[Depth] = []
        self.unseen: list[str] = []
        self.pictures: list[Picture] = []
        self.rotation = ""
        self.handles: list = []
        self.flows: list[Flow] = []

    def start(self, ids: Tensor, tokenizer) -> None:
        """Everything outside the blocks in memory, and all batches on their way to the first block."""
        self.tokens = Tokens(ids, tokenizer)
        self.model.set_attn_implementation("eager")
        inside = tuple(n + "." for n in self.blocks.names)
        outside = [n for n in self.mapping if not n.startswith(inside)]
        self._read(outside)
        self.large = [n for n in outside if tensor(self.model, n).numel() >= SMALL]
        per = max(1, BATCH_TOKENS // ids.shape[1])
        cache = {"use_cache": False} if hasattr(self.model.config, "use_cache") else {}
        flow = lambda part: Flow(lambda: self.model(part.to(self.device), **cache)[0])  # noqa: E731
        self.guide = flow(ids[:1, :GUIDE])
        self.flows = [self.guide, *(flow(part) for part in ids.split(per))]
        self.handles = [b.register_forward_pre_hook(wait, with_kwargs=True) for b in self.blocks.modules]

    def block(self, i: int) -> None:
        """Look at block i, where all batches wait afterwards at the next one (at the last: past it)."""
        block, name = self.blocks.modules[i], self.blocks.names[i]
        stops = advance(self.flows, block)
        self.depths.append(depth(i, [s.x for s in stops[1:]], self.tokens))
        if i == 0:
            forget(self.model, self.large)
        else:
            dematerialize(self.blocks.modules[i - 1])
        self._read([n for n in self.mapping if n.startswith(name + ".")])
        call = lambda: block(*stops[0].args, **stops[0].kwargs)  # noqa: E731
        if i == 0:
            self.rotation = _unrotatable(block, call)
        made, read = trace(block, call)
        self._flow(i, block, name, made, read, stops)

    def _flow(self, i, block, name, made, read, stops) -> None:
        watches = [Watch(self.tokens.ids.numel()) for _ in read]
        seen = [AttentionWatch(self.tokens.kinds) for _ in attentions(block)]
        with ExitStack() as hooks:
            for watch, (_, names) in zip(watches, read, strict=True):
                see = lambda m, args, kwargs, watch=watch: watch.add(_input(args, kwargs))  # noqa: E731
                module = block.get_submodule(names[0])
                handle = module.register_forward_pre_hook(see, with_kwargs=True)
                hooks.callback(handle.remove)
            for own, module in zip(seen, attentions(block), strict=True):
                hooks.callback(module.register_forward_hook(own.see).remove)
            if i + 1 < len(self.blocks):
                advance(self.flows[1:], self.blocks.modules[i + 1])
            else:
                out = [first(block(*s.args, **s.kwargs)) for s in stops[1:]]
                self.depths.append(depth(i + 1, out, self.tokens))
        if i + 1 < len(self.blocks):
            advance([self.guide], self.blocks.modules[i + 1])
        self.attention.append(next((r for own in seen if (r := own.report()) is not None), None))
        reached = set()
        for watch, (x, names) in zip(watches, read, strict=True):
            reached |= set(names)
            if watch.seen:
                norm = next((n for n, out in made if out is x), None)
                self._group(i, block, name, names, norm, watch)
        self.unseen += [f"{name}.{n}" for n in linears(block) if n not in reached]

    def _group(self, i, block, name, names, norm, watch: Watch) -> None:
        weights = {n: weight_of(block.get_submodule(n)).detach() for n in names}
        sample = watch.sample.float()
        case = Case(
            x=sample,
            weights={n: some_rows(w) for n, w in weights.items()},
            largest=watch.abs_max,
            norm=None if norm is None else _norm(block.get_submodule(norm)),
        )
        errors = {bits: case.all_errors(bits) for bits in BITS}
        layers = tuple(
            _layer(f"{name}.{n}", w, {b: {r: e[n] for r, e in own.items()} for b, own in errors.items()})
            for n, w in weights.items()
        )
        full = None if norm is None else f"{name}.{norm}"
        group = GroupReport(block=i, layers=layers, input=watch.report(self.tokens), norm=full)
        self.groups.append(group)
        self.pictures.append(Picture(group=group, first=watch.picture, case=case))
        self.pictures.sort(key=lambda p: -p.group.input.bits_lost_token)
        del self.pictures[PICTURES:]

    def _read(self, names: list[str]) -> None:
        materialize(self.model, names, self.source, self.mapping, self.device, self.dtype)
        for n in names:
            check_finite(self.mapping[n], tensor(self.model, n))

    def end(self) -> None:
        """Batches and weights go."""
        for handle in self.handles:
            handle.remove()
        for flow in self.flows:
            flow.abandon()
        dematerialize(self.model)
        self.source.release()


def _framed(ids: Tensor, tokenizer) -> Tensor:
    """Windows that begin with [CLS] and end with [SEP], where the tokenizer knows both: as encoders read."""
    ends = getattr(tokenizer, "cls_token_id", None), getattr(tokenizer, "sep_token_id", None)
    if None in ends:
        return ids
    ids = ids.clone()
    ids[:, 0], ids[:, -1] = ends
    return ids


def _input(args: tuple, kwargs: dict) -> Tensor:
    return args[0] if args else next(iter(kwargs.values()))


def _unrotatable(block: nn.Module, call) -> str:
    """Why the residual stream of a block cannot be rotated, or ""."""
    try:
        find_residual(block, call)
    except InputError as error:
        return str(error)
    return ""


def _norm(module: nn.Module) -> Norm:
    bias = getattr(module, "bias", None)
    gain = module.weight.detach().float() + gain_shift(module)
    return Norm(gain=gain, bias=None if bias is None else bias.detach().float())


def _layer(name: str, w: Tensor, errors: Errors) -> LayerReport:
    flat = w.float()
    centred = flat - flat.mean()
    variance = float(centred.square().mean())
    return LayerReport(
        name=name,
        shape=tuple(w.shape),
        largest=float(flat.abs().max()),
        rms=float(flat.square().mean().sqrt()),
        kurtosis=float(centred.square().square().mean()) / variance**2 if variance else 0.0,
        errors=errors,
    )
