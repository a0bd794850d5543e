"""The report of a look, as sections of a page: what to do first, then what was seen, then every layer."""

from __future__ import annotations

from markupsafe import Markup

from fewbit.inspect.advice import Advice, advise, common_channels, mean_error
from fewbit.inspect.layers import layers, percent, ranges, reach
from fewbit.inspect.look import Inspection
from fewbit.inspect.pictures import pictures
from fewbit.inspect.remedies import Remedy
from fewbit.report import Axis, Cell, Column, Section, Series, chart, facts, page, table

SHOWN = 20  # rows of a list
WHAT = {
    Remedy.TENSOR: "one step for each weight matrix and each input",
    Remedy.CHANNEL: "a step for each output channel and each token",
    Remedy.GROUPS: "a step for each group of columns, of weights and of tokens",
    Remedy.SMOOTH: "SmoothQuant behind norms, alpha 0.5",
    Remedy.SMOOTH_MORE: "SmoothQuant behind norms, alpha 0.8",
    Remedy.ROTATION: "a Hadamard map of inputs and weights (QuaRot)",
    Remedy.SPLIT: "columns that reach 6 stay in float (LLM.int8())",
}


def report(seen: Inspection) -> str:
    """The text of an HTML file."""
    sections = [
        Section(title="In short", parts=[_facts(seen), *headlines(seen)]),
        Section(title="Remedies", parts=_remedies(seen)),
        Section(title="Channels that stand out", parts=_channels(seen)),
        Section(title="Residual stream", parts=_residual(seen)),
        Section(title="Attention", parts=_attention(seen)),
        Section(title="Inputs that lose most", parts=pictures(seen)),
        Section(title="Every layer", parts=[ranges(seen), layers(seen)]),
    ]
    return page(f"What makes {seen.model} hard to quantize", sections)


def _facts(seen: Inspection) -> Markup:
    words = {8: "8-bit weights and inputs", 4: "4-bit weights and inputs"}
    rows = []
    for bits, said in words.items():
        advice = advise(seen, bits)
        rows.append((said, "no recipe fits: " + seen.rotation if advice is None else _command(seen, advice)))
    total = seen.windows * seen.seqlen
    rows.append(("text", f"{seen.text}: {seen.windows} windows of {seen.seqlen} tokens, {total} in all"))
    return facts([("model", seen.model), *rows])


def _command(seen: Inspection, advice: Advice) -> Markup:
    gain = advice.plain / max(advice.error, 1e-30)
    return Markup("<code>{}</code><br>{}").format(
        advice.command(seen.model),
        f"{advice.remedy}: mean error of a layer's output {percent(advice.error)}, "
        f"{percent(advice.plain)} with steps per channel and token alone"
        + (f", {gain:.1f} times as much" if gain > 1 else ""),
    )


def headlines(seen: Inspection) -> list[str]:
    """What was seen, in a few sentences."""
    out = []
    worst = max(seen.groups, key=lambda g: g.input.bits_lost_token)
    if worst.input.bits_lost_token > 0.5:
        out.append(
            f"The input of {worst.name} loses most: with a step for each token "
            f"{worst.input.bits_lost_token:.1f} bits more than normal values would, with one step in all "
            f"{worst.input.bits_lost:.1f}."
        )
    else:
        out.append("No input loses more than half a bit to outliers when each token has a step of its own.")
    common = [c for c in common_channels(seen) if c.inputs >= 0.25 * c.of]
    if common:
        names = ", ".join(f"{c.index} ({c.inputs} of {c.of})" for c in common[:6])
        out.append(f"Channels that stand out in a quarter or more of the inputs behind norms: {names}.")
    else:
        out.append("No channel stands out in a quarter of the inputs behind norms.")
    massive = [(d, d.massive[0]) for d in seen.depths if d.massive]
    if massive:
        d, m = max(massive, key=lambda pair: abs(pair[1].value))
        out.append(
            f"The residual stream has massive activations: {m.value:.0f} in channel {m.channel} before block "
            f"{d.block}, at the token {m.token}."
        )
    known = [a for a in seen.attention if a is not None]
    if known:
        first = sum(a.shares["first"] for a in known) / len(known)
        heads = sum(a.resting for a in known)
        out.append(
            f"Attention spends {percent(first)} of its weight on the first token; {heads} of "
            f"{sum(a.heads for a in known)} heads give more than half to tokens that say little."
        )
    if seen.unseen:
        out.append(f"The text never reached {len(seen.unseen)} layers, such as {seen.unseen[0]}.")
    return out


def _remedies(seen: Inspection) -> list[str | Markup]:
    columns = [
        Column(name="remedy"),
        Column(name="what it is", wrap=True),
        *(
            Column(
                name=f"{what} W{b}A{b}", number=True, help=f"{what} over layers of the error of the output"
            )
            for b in (8, 4)
            for what in ("mean", "worst")
        ),
    ]
    advice = advise(seen, 8)
    marked = [] if advice is None else [list(Remedy).index(advice.remedy)]
    rows = []
    for r in Remedy:
        cells = []
        for b in (8, 4):
            worst = max(layer.errors[b][r] for layer in seen.layers)
            mean = mean_error(seen, r, b)
            cells += [Cell(text=percent(mean), value=mean), Cell(text=percent(worst), value=worst)]
        rows.append((str(r), WHAT[r], *cells))
    made = table(columns, rows, caption="Simulated error by remedy", marked=marked)
    note = "" if not seen.rotation else f"The residual stream cannot be rotated: {seen.rotation}."
    blocks = sorted({g.block for g in seen.groups})
    by_block = {b: [layer for g in seen.groups if g.block == b for layer in g.layers] for b in blocks}
    lines = []
    for r in (
        Remedy.TENSOR,
        Remedy.CHANNEL,
        Remedy.GROUPS,
        Remedy.SMOOTH_MORE,
        Remedy.ROTATION,
        Remedy.SPLIT,
    ):
        points = [(b, sum(x.errors[8][r] for x in own) / len(own)) for b, own in by_block.items()]
        lines.append(Series(name=str(r), points=points))
    drawn = chart(
        lines,
        x=Axis(label="block"),
        y=Axis(label="error of the output", log=True),
        title="8-bit weights and inputs: mean error of a block's layers",
    )
    return [
        "Each layer's weights and inputs were rounded under each remedy, on tokens of the text, and its "
        "output compared with that of the float layer: squared error over squared output.",
        *([note] if note else []),
        made,
        drawn,
    ]


def _channels(seen: Inspection) -> list[str | Markup]:
    common = common_channels(seen)
    columns = [
        Column(name="channel", number=True),
        Column(name="inputs", number=True, help="inputs behind norms in which it stands out"),
        Column(name="times the median", number=True, help="its rms over that of the median channel, at most"),
        Column(name="largest |x|", number=True),
    ]
    rows = [(c.index, c.inputs, c.ratio, c.largest) for c in common[:SHOWN]]
    said = (
        "A channel stands out where its rms is 6 times the median channel's, or where it reaches 6 at 6 % of "
        "the tokens (the criterion of LLM.int8()). Channels of the residual stream keep their number from "
        f"block to block; {len(common)} stand out behind at least one norm."
    )
    if not rows:
        return [said]
    made = table(columns, rows, caption="Channels that stand out behind norms", sorted_by=(1, "descending"))
    own = [g for g in seen.groups if g.input.tokens_out > 0]
    columns = [
        Column(name="input of"),
        Column(name="tokens", number=True, help="share of tokens whose largest |x| is 10 times the median's"),
        Column(name="kinds", wrap=True),
        Column(name="most frequent", wrap=True),
    ]
    rows = [
        (
            g.name,
            Cell(text=percent(g.input.tokens_out), value=g.input.tokens_out),
            ", ".join(f"{n} {k}" for k, n in g.input.kinds.items()),
            "  ".join(f"'{t}'" for t in g.input.texts),
        )
        for g in sorted(own, key=lambda g: -reach(g.input.largest, g.input.rms))[:SHOWN]
    ]
    tokens = [table(columns, rows, caption="Inputs in which single tokens stand out")] if rows else []
    return [said, made, *tokens]


def _residual(seen: Inspection) -> list[str | Markup]:
    at = [d.block for d in seen.depths]
    lines = {
        "largest |x|": [d.largest for d in seen.depths],
        "median over tokens of the largest": [d.token for d in seen.depths],
        "rms": [d.rms for d in seen.depths],
    }
    drawn = chart(
        [Series(name=n, points=list(zip(at, v, strict=True))) for n, v in lines.items()],
        x=Axis(label="before block"),
        y=Axis(label="|x|", log=True),
        title="Residual stream by depth",
        note="Where the upper two lines part, single tokens reach much farther than the others.",
    )
    found: dict[int, list] = {}
    for d in seen.depths:
        for m in d.massive:
            found.setdefault(m.channel, []).append((d.block, m))
    if not found:
        return [drawn, "No massive activations: none above 100 and 1000 times the median."]
    columns = [
        Column(name="channel", number=True),
        Column(name="largest", number=True, digits=5),
        Column(name="at the token"),
        Column(name="depths", number=True, help="before how many blocks"),
        Column(name="first before block", number=True),
        Column(name="last before block", number=True),
    ]
    rows = []
    for channel, own in found.items():
        most = max((m for _, m in own), key=lambda m: abs(m.value))
        rows.append((channel, most.value, most.token, len(own), own[0][0], own[-1][0]))
    rows.sort(key=lambda row: -abs(row[1]))
    caption = "Massive activations: above 100 and 1000 times the median magnitude"
    return [drawn, table(columns, rows[:SHOWN], caption=caption)]


def _attention(seen: Inspection) -> list[str | Markup]:
    known = [(i, a) for i, a in enumerate(seen.attention) if a is not None]
    if not known:
        return ["The attention of this model returns no weights, so nothing can be said about it."]
    shown = ("first", "special", "separator", "punctuation")
    lines = [
        Series(
            name=f"{k} tokens" if k != "first" else "first token", points=[(i, a.shares[k]) for i, a in known]
        )
        for k in shown
        if any(a.shares[k] > 0 for _, a in known)
    ]
    lines.append(
        Series(name="first token, the head that gives most", points=[(i, a.first_head) for i, a in known])
    )
    counted = {k: int((seen.tokens.kinds == i).sum()) for i, k in enumerate(shown)}
    share = ", ".join(f"{n / seen.tokens.kinds.numel():.1%} {k}" for k, n in counted.items() if n)
    drawn = chart(
        lines,
        x=Axis(label="block"),
        y=Axis(label="share of attention", low=0),
        title="Where attention goes",
        note=f"Of the tokens themselves are: {share}.",
    )
    return [drawn]
