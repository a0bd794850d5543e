"""Caches in few bits: states that do not depend on how a text was cut, bytes that add up, KIVI's claims."""

import math
from dataclasses import replace

import pytest
import torch
from tiny import tiny, tiny_ids
from transformers import DynamicCache

from fewbit.errors import InputError
from fewbit.format import FP16, FP32, Channel, Format, Group, MinMax, PerTensor, Token, Zero, format_by_name
from fewbit.grid import Int, by_name
from fewbit.nn.kvcache import KV_FORMATS, Along, KVFormat, kivi, kv_format, per_token
from fewbit.nn.kvlayer import QuantizedCache
from fewbit.nn.kvsteps import calibrate
from fewbit.nn.kvstore import empty, fixed_steps

B, H, D = 2, 3, 64


def stream(tokens, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(B, H, tokens, D, generator=generator).to(dtype)


def small(name):
    """The named format with a residual of 32 where it has one."""
    kv = kv_format(name)
    return replace(kv, residual=min(kv.residual, 32))


def filled(part, x, cuts=()):
    """A store that got ``x`` in the pieces between ``cuts``."""
    store = empty(part, x, fixed_steps(part, x))
    for piece in torch.tensor_split(x, list(cuts), dim=-2):
        store = store.append(piece)
    return store


def tensors(store):
    return {n: t for n in ("head", "tail", "codes", "scale", "zero") if (t := getattr(store, n)) is not None}


def assert_same(a, b):
    assert a.coded == b.coded
    assert tensors(a).keys() == tensors(b).keys()
    for name, tensor in tensors(a).items():
        assert torch.equal(tensor, tensors(b)[name]), name


@pytest.mark.parametrize("name", KV_FORMATS)
@pytest.mark.parametrize("sink", [0, 5])
def test_the_state_does_not_depend_on_how_the_tokens_came(name, sink):
    x = stream(107)
    for part in replace(small(name), sink=sink).parts():
        whole = filled(part, x)
        assert whole.tokens == 107
        for cuts in (range(1, 107), range(50, 107), (3, 64, 96, 100), (32, 64, 96)):
            assert_same(filled(part, x, cuts), whole)


@pytest.mark.parametrize("name", KV_FORMATS)
def test_what_is_stored_is_the_format_on_the_old_tokens_and_the_new_ones_themselves(name):
    x = stream(107, dtype=torch.bfloat16)
    views = {
        Along.TOKENS: (lambda t: t.mT, lambda t: t.mT),
        Along.CHANNELS: (lambda t: t, lambda t: t),
        Along.HEADS: (lambda t: t.transpose(0, 1).reshape(H, -1), lambda t: t.view(H, B, -1, D).mT.mT),
    }
    for part in replace(small(name), sink=3).parts():
        store, fmt = filled(part, x, (40, 41, 80)), part.format
        n, got = store.coded, store.read()
        assert n in (96, 72, 104)  # groups of tokens, a residual of 32, none
        assert (got.dtype, got.shape) == (x.dtype, x.shape)
        assert torch.equal(got[..., :3, :], x[..., :3, :])
        assert torch.equal(got[..., 3 + n :, :], x[..., 3 + n :, :])
        to, back = views[part.along]
        middle = to(x[..., 3 : 3 + n, :])
        params = fmt.fit(middle) if store.steps is None else fmt.fit(to(x))
        expected = back(fmt.encode(middle, params).dequantize(torch.bfloat16))
        expected = expected.transpose(0, 1) if part.along is Along.HEADS else expected
        assert torch.equal(got[..., 3 : 3 + n, :], expected)


def test_kivi_keeps_the_newest_tokens_in_float():
    key, value = kivi(2, residual=32).parts()
    for tokens, keys_left, values_left in ((31, 31, 31), (32, 0, 32), (33, 1, 32), (107, 11, 32)):
        x = stream(tokens)
        assert filled(key, x).tail.shape[-2] == keys_left == tokens % 32
        assert filled(value, x).tail.shape[-2] == values_left == min(tokens, 32)


def test_bytes_are_those_of_the_papers_formula():
    # 2 bits and a 32nd of 32 bits of step and offset: 3 bits an element (KIVI), and float32 for the rest.
    kv, elements = kivi(2, group=32, residual=64), B * H * D
    for tokens in (1, 63, 64, 65, 128, 300):
        x = stream(tokens)
        key, value = (filled(part, x) for part in kv.parts())
        n = tokens // 64 * 64
        assert key.nbytes == elements * (n * 3 / 8 + (tokens - n) * 4)
        n = max(0, tokens - 64)
        assert value.nbytes == elements * (n * 3 / 8 + (tokens - n) * 4)
        assert key.nbytes + value.nbytes == kv.nbytes(B, H, tokens, D, torch.float32)


@pytest.mark.parametrize("name", KV_FORMATS)
def test_bytes_held_are_the_bytes_foretold(name):
    kv = replace(small(name), sink=2)
    for tokens in (1, 40, 107):
        x = stream(tokens, dtype=torch.bfloat16)
        stores = [filled(part, x, range(1, tokens, 9)) for part in kv.parts()]
        held = [t for store in stores for t in tensors(store).values()]
        assert sum(t.untyped_storage().nbytes() for t in held) == kv.nbytes(B, H, tokens, D, torch.bfloat16)
        assert sum(store.nbytes for store in stores) == kv.nbytes(B, H, tokens, D, torch.bfloat16)
    bits = {"kivi2": 3, "int4-token": 4.5, "int8-token": 8.5, "fp8": 8, "fp8-head": 8, "mxfp4": 4.25}
    if name in bits:
        many, more = (replace(kv, sink=0).nbytes(1, 1, n, D, torch.bfloat16) for n in (32 * 64, 32 * 65))
        assert 8 * (more - many) / (32 * 2 * D) == bits[name]


def test_keys_with_large_channels_want_groups_along_tokens_and_values_do_not_care():
    keys = stream(128)
    keys[..., [3, 40]] = 10 + keys[..., [3, 40]]  # large at every token
    queries = stream(8, seed=1)
    for bits in (2, 4):
        kv = kivi(bits, residual=32)
        along_tokens, along_channels = (
            filled(part, keys).read()
            for part in (kv.parts()[0], replace(kv, key_along=Along.CHANNELS, residual=0).parts()[0])
        )
        scores = [(queries @ (k - keys).mT).norm() for k in (along_tokens, along_channels)]
        assert scores[0] < 0.7 * scores[1]
    values = stream(128, seed=2)
    alone = replace(kv, key=None, residual=0)
    parts = (kv.parts()[0], alone.parts()[1])
    errors = [(filled(part, values).read() - values).norm().item() for part in parts]
    assert errors[0] == pytest.approx(errors[1], rel=0.05)


def attention(q, k, v):
    return torch.nn.functional.scaled_dot_product_attention(q, k, v)


def test_attention_on_8_bits_is_within_a_hundredth_and_without_formats_exact():
    q, k, v = stream(16, seed=1), stream(128, seed=2), stream(128, seed=3)
    exact = attention(q, k, v)
    errors = {}
    for bits in (8, 4, 2):
        read = [
            filled(part, x).read() for part, x in zip(kivi(bits, residual=32).parts(), (k, v), strict=True)
        ]
        errors[bits] = ((attention(q, *read) - exact).norm() / exact.norm()).item()
    assert errors[8] < 1e-2 < errors[4] < errors[2]
    none = KVFormat(key=None, value=None).parts()
    assert torch.equal(attention(q, *(filled(p, x).read() for p, x in zip(none, (k, v), strict=True))), exact)


def test_four_bits_per_token_and_head_err_by_half_a_step_at_most():
    x = 5 * stream(40)
    store = filled(per_token(4).parts()[0], x)
    step = (x.amax(-1, keepdim=True) - x.amin(-1, keepdim=True)) / 15
    # beside half a step, what float16 takes from the step (2^-11 of up to 15 steps) and from the offset
    slack = 15 * step * 2**-11 + x.amin(-1, keepdim=True).abs() * 2**-11
    assert ((store.read() - x).abs() <= step / 2 + slack).all()
    assert (store.read() - x).abs().max() > 0.4 * step.max()


@pytest.mark.parametrize("name", KV_FORMATS)
def test_constant_and_zero_tokens_stay_what_they_are(name):
    x = torch.cat([torch.zeros(B, H, 40, D), torch.full((B, H, 40, D), -1.5)], -2)
    for part in small(name).parts():
        assert torch.allclose(filled(part, x).read(), x, rtol=1e-3, atol=1e-3)
    for part in small(name).parts():  # nothing but zeros: fixed steps of zeros, too
        assert torch.equal(filled(part, x[..., :40, :]).read(), x[..., :40, :])


def test_fp8_saturates_without_a_step_and_reaches_far_with_a_calibrated_one():
    x = stream(40)
    x[:, 1] *= 1e6  # a head far beyond 448, and beside it others
    cast, tensor, head = (filled(kv_format(name).parts()[0], x) for name in ("fp8", "fp8-tensor", "fp8-head"))
    assert cast.read().abs().max() == 448
    assert tensor.read().abs().max() == pytest.approx(x.abs().max().item(), rel=1e-6)
    assert head.steps.shape == (H, 1)
    assert head.steps[:, 0].tolist() == pytest.approx((x.abs().amax((0, 2, 3)) / 448).tolist())
    assert (head.read() - x)[:, 0].norm() < (tensor.read() - x)[:, 0].norm() / 10


def feed(model, ids, cache, sizes):
    with torch.no_grad():
        parts = ids.split(sizes, dim=1)
        return torch.cat(
            [model(input_ids=p, past_key_values=cache, use_cache=True).logits for p in parts], dim=1
        )


ARCHS = ("llama", "qwen3", "gemma3", "gpt2", "opt", "gpt_neox", "falcon", "phi3")


@pytest.mark.parametrize("arch", ARCHS)
def test_a_residual_longer_than_the_text_changes_nothing(arch):
    model, ids = tiny(arch), tiny_ids(2, 40)
    cache = QuantizedCache(model.config, kv_format("kivi2-g16-r64"))
    plain = DynamicCache(config=model.config)
    sizes = [17, 1, 1, 20, 1]
    assert torch.equal(feed(model, ids, cache, sizes), feed(model, ids, plain, sizes))


@pytest.mark.parametrize("arch", ARCHS)
def test_the_model_reads_the_quantized_prefix_and_its_own_tokens_as_they_are(arch):
    model, ids = tiny(arch), tiny_ids(2, 48)
    exact = model(input_ids=ids).logits
    errors = {}
    for bits in (8, 4, 2):
        cache = QuantizedCache(model.config, kv_format(f"kivi{bits}-g16-r16"))
        logits = feed(model, ids, cache, [32, *[1] * 16])
        # The prefill of 32 tokens is one call; but a call that continues differs in kernels, so nearly.
        assert torch.allclose(logits[:, :32], exact[:, :32], rtol=1e-4, atol=1e-4)
        errors[bits] = ((logits - exact)[:, 32:].norm() / exact[:, 32:].norm()).item()
        assert cache.get_seq_length() == 48
    assert 0 < errors[8] < errors[4] < errors[2]
    assert errors[8] < 0.01


def test_generate_uses_the_cache_and_never_codes_the_newest_token():
    model, ids, seen = tiny("llama"), tiny_ids(2, 7), []
    cache = QuantizedCache(model.config, kv_format("kivi4-g16-r16"))
    layer = cache.layers[0]
    update = layer.update

    def watched(k, v, *args, **keywords):
        keys, values = update(k, v, *args, **keywords)
        n = k.shape[-2]
        assert torch.equal(keys[..., -n:, :], k)
        assert torch.equal(values[..., -n:, :], v)
        assert keys.shape == values.shape == (*k.shape[:2], cache.get_seq_length(1) + n, k.shape[-1])
        seen.append(keys.shape[-2])
        return keys, values

    layer.update = watched
    steps = 3 * 16 + 5
    out = model.generate(
        input_ids=ids, past_key_values=cache, min_new_tokens=steps, max_new_tokens=steps, do_sample=False
    )
    assert out.shape == (2, 7 + steps)
    assert seen == list(range(7, 7 + steps))
    assert [store.coded for store in layer.stores] == [48, seen[-1] - 16]
    # the same, token by token
    again = QuantizedCache(model.config, kv_format("kivi4-g16-r16"))
    logits = feed(model, out[:, :-1], again, [7, *[1] * (steps - 1)])
    assert torch.equal(logits[:, 6:].argmax(-1), out[:, 7:])


def test_beams_move_codes_as_they_are():
    model, ids = tiny("llama"), tiny_ids(2, 20)
    kv = kv_format("kivi4-g16-r16")
    order = torch.tensor([1, 0, 0])
    a, b = (QuantizedCache(model.config, kv) for _ in range(2))
    feed(model, ids, a, [20])
    feed(model, ids[order], b, [20])
    a.reorder_cache(order)
    for x, y in zip(a.layers, b.layers, strict=True):
        for left, right in zip(x.stores, y.stores, strict=True):
            assert torch.equal(left.read(), right.read())
    options = {"max_new_tokens": 30, "num_beams": 3, "do_sample": False}
    float_text = model.generate(input_ids=ids, **options)
    cache = QuantizedCache(model.config, kv_format("kivi8-g16-r16"))
    assert torch.equal(model.generate(input_ids=ids, past_key_values=cache, **options), float_text)


def test_float_tokens_can_be_taken_back_and_coded_ones_cannot():
    model, ids = tiny("llama"), tiny_ids(1, 60)
    kv = kv_format("kivi4-g16-r16")
    long, short = (QuantizedCache(model.config, kv) for _ in range(2))
    feed(model, ids[:, :60], long, [60])
    feed(model, ids[:, :50], short, [50])
    long.crop(-10)  # 60 = 3 * 16 + 12: the keys hold 12 in float
    assert long.get_seq_length() == 50
    assert_same(long.layers[0].stores[0], short.layers[0].stores[0])
    rest = feed(model, ids[:, 50:], long, [10])
    assert torch.allclose(rest, feed(model, ids[:, 50:], short, [10]), atol=0.05)
    with pytest.raises(InputError, match=r"20 tokens cannot be taken back .* newest 12 in float"):
        long.crop(-20)


def test_a_cache_can_be_emptied_and_used_again():
    model, ids = tiny("llama"), tiny_ids(1, 40)
    cache = QuantizedCache(model.config, kv_format("kivi2-g16-r16"))
    first = feed(model, ids, cache, [30, 10])
    cache.reset()
    assert (cache.get_seq_length(), cache.nbytes) == (0, 0)
    assert torch.equal(feed(model, ids, cache, [30, 10]), first)


def test_sliding_windows_and_skipped_layers_stay_in_float_and_are_named():
    model, ids = tiny("gemma3"), tiny_ids(1, 40)
    cache = QuantizedCache(model.config, kv_format("int4-token"))
    assert cache.left_float == {0: "sliding window", 2: "sliding window"}
    feed(model, ids, cache, [40])
    assert cache.layers[1].nbytes < cache.nbytes
    llama = tiny("llama")
    cache = QuantizedCache(llama.config, replace(kv_format("int4-token"), skip=(1,)))
    assert cache.left_float == {1: "skipped"}
    feed(llama, ids, cache, [40])
    shape = {"batch": 1, "heads": 2, "tokens": 40, "head_dim": 16, "dtype": torch.float32}
    assert cache.nbytes == kv_format("int4-token").nbytes(**shape) + 2 * 2 * 40 * 16 * 4
    with pytest.raises(
        InputError, match=r"no layer of MistralConfig has a cache to quantize \(sliding window"
    ):
        QuantizedCache(tiny("mistral").config, kv_format("kivi4"))
    with pytest.raises(InputError, match="layer 2 to skip is not among the 2 layers"):
        QuantizedCache(llama.config, replace(kv_format("kivi4"), skip=(2,)))


@pytest.mark.parametrize("name", ["fp8-tensor", "fp8-head"])
def test_calibrated_steps_are_the_largest_of_the_windows(name):
    model, ids, kv = tiny("llama"), tiny_ids(3, 32), kv_format(name)
    steps = calibrate(model, ids, kv)
    plain = DynamicCache(config=model.config)
    feed(model, ids, plain, [32])
    for index, layer in enumerate(plain.layers):
        over = (0, 2, 3) if name == "fp8-head" else (0, 1, 2, 3)
        assert torch.allclose(steps.key[index].flatten(), layer.keys.abs().amax(over) / 448)
        assert torch.allclose(steps.value[index].flatten(), layer.values.abs().amax(over) / 448)
    exact = model(input_ids=ids).logits
    got = feed(model, ids, QuantizedCache(model.config, kv, steps), [16, *[1] * 16])
    assert 0 < (got - exact).norm() / exact.norm() < 0.05
    with pytest.raises(InputError, match=r"has fixed steps; find them with kvsteps\.calibrate"):
        QuantizedCache(model.config, kv)
    with pytest.raises(InputError, match="token by token; leave calibration out"):
        calibrate(model, ids, kv_format("kivi4"))


def test_keys_and_values_in_formats_of_their_own():
    model, ids = tiny("qwen3"), tiny_ids(2, 40)  # heads of 32
    mixed = replace(kv_format("kivi2-r32"), value=format_by_name("mxfp4"), skip=(1,))
    cache = QuantizedCache(model.config, mixed)
    feed(model, ids, cache, [40])
    assert cache.layers[0].nbytes == mixed.nbytes(2, 2, 40, 32, torch.float32)
    keys, values = (store.nbytes for store in cache.layers[0].stores)
    assert (keys, values) == (2 * 2 * 32 * (32 * 3 / 8 + 8 * 4), 2 * 2 * 32 * (8 * 4.25 / 8 + 32 * 4))


def test_names_carry_settings():
    assert kv_format("kivi4") == kivi(4) == kv_format("KIVI4-g32-r128")
    assert kv_format("kivi2-r32-s4") == kivi(2, residual=32, sink=4)
    assert kv_format("kivi2-g64") == kivi(2, group=64)
    assert kv_format("int4-token-r16") == per_token(4, residual=16)
    assert kv_format("mxfp4-g16").key == format_by_name("mxfp4-g16")


AFFINE = {"grid": Int(4, signed=False), "range": MinMax(), "zero": Zero.OFFSET, "scale": FP16}


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: kv_format("kivi5"), "no KV format named 'kivi5'; known are kivi"),
        (lambda: kv_format("fp8-g32"), "fp8 has no groups, so -g32 after it means nothing"),
        (
            lambda: kv_format("kivi4-r48"),
            "48 tokens does not hold whole groups of 32 tokens; give .* such as 64",
        ),
        (lambda: kv_format("kivi4-r0"), "0 tokens does not hold whole groups .* such as 32"),
        (lambda: kivi(4, sink=-1), "sink is -1: expected a number of tokens"),
        (lambda: replace(kivi(4), skip=(-1,)), r"layers to skip are \[-1\]"),
        (lambda: KVFormat(key=format_by_name("nvfp4"), value=None), "steps of its steps span tokens"),
        (lambda: KVFormat(key=Format(grid=by_name("bf16")), value=None), "scalar grid of up to 8 bits"),
        (
            lambda: KVFormat(key=Format(block=Channel(), **AFFINE), value=None),
            "keys along channels cannot have",
        ),
        (
            lambda: KVFormat(key=None, value=Format(block=Token(), **AFFINE), value_along=Along.TOKENS),
            "values along tokens cannot have",
        ),
        (lambda: KVFormat(key=Format(block=PerTensor(), **AFFINE), value=None), "fixed steps have no offset"),
        (
            lambda: KVFormat(
                key=Format(block=Group(3), **AFFINE), value=None, key_along=Along.TOKENS, residual=3
            ),
            "groups that fill whole bytes",
        ),
        (
            lambda: KVFormat(key=Format(grid=by_name("e4m3")), value=None, key_along=Along.TOKENS),
            "groups that fill whole bytes",
        ),
    ],
)
def test_what_cannot_be_stored_is_refused(make, sentence):
    with pytest.raises(InputError, match=sentence):
        make()


def test_groups_that_do_not_tile_a_head_are_refused_by_the_first_call():
    model = tiny("llama")  # heads of 16
    cache = QuantizedCache(model.config, kv_format("kivi4"))
    with pytest.raises(InputError, match="groups of 32 channels do not tile a head of 16; use groups of 16"):
        feed(model, tiny_ids(1, 8), cache, [8])
    static = Format(grid=by_name("e4m3"), scale=FP32)
    with pytest.raises(InputError, match="needs steps that are found beforehand"):
        empty(KVFormat(key=static, value=None).parts()[0], stream(1))


def test_bits_of_long_texts():
    kv = kivi(4)
    total = kv.nbytes(1, 3, 128 * 1000, 64, torch.bfloat16)
    assert 8 * total / (2 * 3 * 64 * 128 * 1000) == pytest.approx(5, abs=0.01)
    assert math.isclose(
        kv.nbytes(2, 3, 500, 64, torch.bfloat16), 2 * kv.nbytes(1, 3, 500, 64, torch.bfloat16)
    )
