"""LET: learned scales and shifts keep the float function and lower the error that quantized inputs bring."""

import pytest
import torch
from tiny import save_tiny, tiny, tiny_ids

import fewbit
from fewbit.errors import InputError
from fewbit.format import BF16, FP32, Format, Group, MinMax, Need, Token, Zero
from fewbit.format.activation import Activation
from fewbit.grid import by_name
from fewbit.nn.blocks import find_blocks, is_transposed, linears, weight_of
from fewbit.recipe import Recipe, Rule, autoround, from_yaml, omniquant
from fewbit.seams import find_seams, fold
from fewbit.seams.trial import change, first
from fewbit.solve.calls import Calls, Target, quantized_inputs, rounded
from fewbit.solve.let import Maps
from fewbit.solve.lwc import Lwc
from fewbit.solve.signround import SignRound
from fewbit.stream.data import Calibration
from fewbit.stream.inputs import Inputs
from fewbit.stream.let import find_joints, fold_learned
from fewbit.stream.quantize import quantize
from fewbit.transform import Reader, Smooth

TRAIN = 24
W6 = Format(grid=by_name("uint6"), block=Group(32), range=MinMax(), zero=Zero.INTEGER, scale=BF16)
TOKEN = Format(grid=by_name("int6"), block=Token(), range=MinMax(), zero=Zero.INTEGER, scale=FP32)
SIX = Activation(format=TOKEN)
LARGE = {3: 1 / 30, 17: 1 / 60, 40: 1 / 45}


def plant(block, call):
    """Channels with outliers in the inputs of what reads a norm; the block computes what it did."""
    for seam in find_seams(block, call):
        if seam.kind == "norm":
            s = torch.ones(block.get_submodule(seam.readers[0]).weight.shape).amax(0)[:64]
            for channel, factor in LARGE.items():
                s[channel] = factor
            fold(block, seam, s, None)


def caught(arch):
    """A block with planted outliers, its calls of one sequence each and its outputs, of TRAIN + 6 texts."""
    model, calls, outputs = tiny(arch), [], []
    block = find_blocks(model).modules[1]

    def hook(module, args, kwargs, out):
        calls.append((args, kwargs))
        outputs.append(first(out))

    handle = block.register_forward_hook(hook, with_kwargs=True)
    with torch.no_grad():
        for ids in tiny_ids(TRAIN + 6, 48):
            model(ids[None], use_cache=False)
    handle.remove()
    once = lambda: block(*calls[0][0], **calls[0][1])  # noqa: E731
    plant(block, once)
    return block, calls, outputs, once


def targets(block, fmt=W6, activation=SIX):
    return {
        n: Target(format=fmt, activation=activation, transposed=is_transposed(m))
        for n, m in linears(block).items()
    }


def drawn(block, run, joints):
    """Maps of a block far from where learning starts."""
    maps, generator = Maps(run, joints), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in maps.leaves:
            p.add_(0.7 * torch.randn(p.shape, generator=generator))
    return maps


SHIFTS = {"llama": 0, "qwen2": 0, "gemma3": 0, "opt": 3, "gpt2": 2}
SCALES = {"llama": 4, "qwen2": 4, "gemma3": 4, "opt": 4, "gpt2": 2}


@pytest.mark.parametrize("arch", SHIFTS)
def test_folded_maps_leave_the_float_function_and_are_what_was_learned(arch):
    block, calls, outputs, once = caught(arch)
    found = find_joints(block, once, linears(block), torch.float32)
    joints = [joint for _, joint in found]
    assert sum(joint.shift for joint in joints) == SHIFTS[arch]
    assert len(joints) == SCALES[arch]
    run = Calls(block, targets(block), calls, outputs)
    maps = drawn(block, run, joints)
    with torch.no_grad():
        weights, rest, learned = maps.applied()
        before, simulated = first(once()), run.call(weights, 0, rest)
    readers = {r for joint in joints for r in joint.readers}
    assert all(change(run.weight(n), weights[n]) > 0.5 for n in readers)
    assert change(before, simulated) < 1e-4
    assert fold_learned(block, once, [seam for seam, _ in found], learned, torch.float32) == ""
    with torch.no_grad():
        assert change(before, first(once())) < 1e-4
    for n, w in weights.items():
        stored = block.get_submodule(n).weight
        torch.testing.assert_close(w, stored.t() if is_transposed(block.get_submodule(n)) else stored)
    for n, p in rest.items():
        torch.testing.assert_close(p, block.get_parameter(n), rtol=1e-5, atol=1e-5)


def held_out(block, calls, outputs, once, tuner):
    """Errors of the block on texts that were not tuned on: (at the start, after tuning with ``tuner``)."""
    found = find_joints(block, once, linears(block), torch.bfloat16) if tuner.let else []
    joints = [joint for _, joint in found]
    got = tuner.tune(block, targets(block), calls[:TRAIN], outputs[:TRAIN], joints=joints)
    one = next(iter(got.values()))
    assert one.error <= one.start
    run = Calls(block, targets(block), calls[TRAIN:], outputs[TRAIN:])
    seen = lambda: quantized_inputs(dict(block.named_modules()), targets(block))  # noqa: E731
    with torch.no_grad(), seen():
        start = run.error({n: W6.quantize(run.weight(n)).dequantize() for n in targets(block)})
    if one.learned:
        assert fold_learned(block, once, [seam for seam, _ in found], one.learned, torch.bfloat16) == ""
    with torch.no_grad(), seen():
        return start, run.error({n: t.q.dequantize() for n, t in got.items()})


@torch.no_grad()
def smooth(block, calls, once):
    """SmoothQuant's closed form at every seam of the block."""
    for seam in find_seams(block, once):
        seen, readers = (
            Inputs(frozenset({Need.COLUMNS}), TRAIN),
            [block.get_submodule(r) for r in seam.readers],
        )
        hook = readers[0].register_forward_pre_hook(lambda module, args, seen=seen: seen.add(args[0]))
        for args, kwargs in calls[:TRAIN]:
            block(*args, **kwargs)
        hook.remove()
        own = [Reader(weight=weight_of(r), format=W6) for r in readers]
        fold(block, seam, Smooth(linear=True)(own, seen.stats(), seam.index), None)


@pytest.mark.parametrize(("arch", "gain"), [("llama", 1.05), ("opt", 0.8)])
def test_learned_scales_beat_learned_clips_and_the_closed_form_on_inputs_with_outliers(arch, gain):
    """Random channels of equal rank leave little to learn after the closed form; shifts are in none."""
    start, clips = held_out(*caught(arch), Lwc(steps=60, lr=0.05))
    _, both = held_out(*caught(arch), Lwc(steps=60, lr=0.05, let=0.05))
    block, calls, outputs, once = caught(arch)
    smooth(block, calls, once)
    closed, after = held_out(block, calls, outputs, once, Lwc(steps=60, lr=0.05, let=0.01))
    assert both < 0.2 * clips < 0.2 * start
    assert after < gain * closed < clips


def test_gradients_reach_a_quantized_input_through_its_step():
    """Straight through the rounding, and through the step, which the extremes of a token set."""
    x = (torch.tensor([[1.0, -2.0, 8.0, 0.3]]) + 1e-3).requires_grad_()
    g = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    (rounded(x, SIX, None) * g).sum().backward()
    off = (SIX(x.detach()) - x.detach()) * 63 / 10  # in steps
    slope = (off * g).sum() / 63
    want = g + slope * torch.tensor([[0.0, -1.0, 1.0, 0.0]])
    torch.testing.assert_close(x.grad, want, rtol=0, atol=1e-4)
    assert abs(slope) > 0.01


def kl(folder, original):
    """KL of a checkpoint from the float model, mean per token."""
    with torch.no_grad():
        want, got = (
            fewbit.load(f)(tiny_ids(8, 100, seed=9)).logits.log_softmax(-1) for f in (original, folder)
        )
    return (want.exp() * (want - got)).sum(-1).mean().item()


def test_recipes_with_learned_scales_lose_less_than_clips_and_than_smoothquant(tmp_path):
    model = save_tiny("opt", tmp_path / "opt")
    for block in find_blocks(model).modules:
        with torch.no_grad():
            for norm, readers in (
                (block.self_attn_layer_norm, [getattr(block.self_attn, f"{n}_proj") for n in "qkv"]),
                (block.final_layer_norm, [block.fc1]),
            ):
                for channel, factor in LARGE.items():
                    for p in (norm.weight, norm.bias):
                        p[channel] /= factor
                    for r in readers:
                        r.weight[:, channel] *= factor
    model.save_pretrained(tmp_path / "opt")
    six = {"bits": 6, "group_size": 32, "input_bits": 6, "steps": 40}
    rule = Rule(weight=W6, input=SIX)
    recipes = {
        "lwc": omniquant(**six),
        "let": omniquant(**six, let=True),
        "smooth": Recipe(name="smooth", rules=(rule,), transforms=(Smooth(linear=True),)),
    }
    lost = {}
    for name, recipe in recipes.items():
        assert from_yaml(recipe.to_yaml()) == recipe
        calibration = Calibration(samples=16, seqlen=64)
        result = quantize(tmp_path / "opt", recipe, output=tmp_path / name, calibration=calibration)
        assert result.difference == 0
        assert not any("not folded" in note for row in result.rows for note in row.notes)
        lost[name] = kl(tmp_path / name, tmp_path / "opt")
    assert lost["let"] < lost["smooth"]
    assert lost["let"] < 0.2 * lost["lwc"]


def test_weights_alone_take_learned_scales_from_one_too(tmp_path):
    save_tiny("llama", tmp_path / "llama")
    calibration = Calibration(samples=16, seqlen=32)
    recipe = omniquant(bits=3, group_size=32, steps=20, let=True)
    assert recipe.transforms == ()
    quantize(tmp_path / "llama", recipe, output=tmp_path / "out", calibration=calibration)
    changed = fewbit.load(tmp_path / "out").model.layers[0].input_layernorm.weight
    assert (
        changed != fewbit.load(tmp_path / "llama").model.layers[0].input_layernorm.weight
    ).float().mean() > 0.5


def test_tuners_say_that_they_need_the_block_and_refuse_rates_of_nothing():
    assert Lwc().needs == SignRound().needs == {Need.BLOCK}
    assert autoround(range="minmax").rules[0].needs == {Need.BLOCK}
    with pytest.raises(InputError, match="rate 0"):
        Lwc(let=0.0)
