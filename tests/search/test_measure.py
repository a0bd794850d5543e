"""Sensitivities: measured KL without needless forwards, held-out errors, kept rows, order of layers."""

import pytest
import torch
from tiny import tiny, tiny_ids

from fewbit.errors import InputError
from fewbit.nn.blocks import find_blocks, is_transposed, weight_of
from fewbit.recipe import named
from fewbit.search import (
    Budget,
    Choice,
    Judge,
    Kept,
    Row,
    Score,
    Texts,
    block_linears,
    choose,
    cost,
    error,
    fisher,
    fisher_inputs,
    fisher_rows,
    gram_matrices,
    measure,
    rank_correlation,
    rank_correlations,
)
from fewbit.solve import Stats


def choice(name, **settings):
    rule = named(name, settings).rules[0]
    return Choice(format=rule.weight, solver=rule.solver, basis=rule.basis, name=f"{name}:{settings}")


THREE = choice("rtn", bits="3", group_size="32")
FED = choice("gptq", bits="3", group_size="32")


@pytest.fixture(scope="module")
def llama():
    return tiny("llama")


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma3", "falcon"])
def test_a_forward_that_starts_at_a_block_measures_what_a_whole_one_does(arch):
    model, tokens = tiny(arch), tiny_ids(3, 40)
    calls = []
    find_blocks(model).modules[0].register_forward_pre_hook(lambda *_: calls.append(1))
    for name in (next(iter(block_linears(model))), list(block_linears(model))[-1]):
        with Judge(model, tokens) as judge:
            judge.start_at(name)
            calls.clear()
            weight = block_linears(model)[name].weight
            weight.data = weight.data.flip(0)
            short = judge.kl()
            ran = len(calls)
            judge.close()
            assert short == pytest.approx(judge.kl(), rel=1e-4)
            assert short > 1e-7
        weight.data = weight.data.flip(0)
    assert ran == 1  # the block was entered, and gave what it gave: its layers did not run
    assert all("forward" not in vars(block) for block in find_blocks(model).modules)


def test_blocks_that_hand_on_more_than_their_output_get_whole_forwards(llama):
    first, second = find_blocks(llama).modules
    aside = {}
    handles = [
        first.mlp.register_forward_hook(lambda m, args, out: aside.update(x=out)),
        second.mlp.register_forward_hook(lambda m, args, out: out + aside.pop("x", 0)),
    ]
    try:
        name = "model.layers.1.mlp.up_proj"
        with Judge(llama, tiny_ids(2, 32)) as judge:
            judge.start_at(name)
            assert judge.kl() < 1e-7  # as the float model, which a shortened forward was not
    finally:
        for handle in handles:
            handle.remove()


def test_feedback_is_judged_on_a_text_that_it_did_not_see(llama):
    tokens = tiny_ids(6, 48)
    rows = measure(llama, dict.fromkeys(block_linears(llama), (FED,)), Texts.split(tokens), {Score.OUTPUT})
    seen = gram_matrices(llama, list(rows), tokens[:-1])
    for name, (row,) in rows.items():
        w = llama.get_submodule(name).weight.detach()
        own = error(w, FED.solve(w, Stats(gram=seen[name])), seen[name])
        assert own.weight == pytest.approx(row.weight, rel=1e-5)  # the same codes
        assert own.output < row.output  # which fit their own text better


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_squared_gradients_foretell_the_kl_of_each_layer(arch):
    model = tiny(arch)
    texts = Texts.split(tiny_ids(32, 64), tiny_ids(6, 64, seed=3))
    choices = dict.fromkeys(block_linears(model), (THREE, FED))
    rows = measure(model, choices, texts, {Score.FISHER, Score.KL})
    for i in range(2):
        own = [pair[i] for pair in rows.values()]
        assert sum(r.fisher for r in own) == pytest.approx(sum(r.kl for r in own), rel=0.35)
    assert rank_correlation([r for pair in rows.values() for r in pair], Score.FISHER) > 0.9
    assert sum(r.fisher for _, r in rows.values()) < sum(r.fisher for r, _ in rows.values())


def test_errors_without_a_direction_cost_the_coefficient_times_t2(llama):
    tokens = tiny_ids(8, 64)
    name = "model.layers.1.mlp.down_proj"
    w = llama.get_submodule(name).weight.detach()
    r, m = fisher_rows(llama, tokens)[name], fisher_inputs(llama, [name], tokens)[name]
    assert m.diagonal().mean() == pytest.approx(1, rel=1e-5)
    noise = torch.randn(400, *w.shape, generator=torch.Generator().manual_seed(0))
    noise *= 0.1 * w.norm() / w.numel() ** 0.5
    expected = fisher(llama, tokens)[name] * 0.01
    assert sum(cost(e, r, m) for e in noise) / 400 == pytest.approx(expected, rel=0.02)
    assert sum(cost(e, r, None) for e in noise) / 400 == pytest.approx(expected, rel=0.02)


def test_conv1d_rows_are_its_outputs():
    model, tokens = tiny("gpt2"), tiny_ids(4, 32)
    rows = fisher_rows(model, tokens)
    for name, module in block_linears(model).items():
        assert is_transposed(module)
        assert rows[name].shape == weight_of(module).shape[:1]


def test_rows_are_kept_by_what_they_depend_on(llama, tmp_path):
    names = list(block_linears(llama))[:3]
    texts = Texts.split(tiny_ids(4, 24))

    def ran(choice, identity, said):
        solved = []
        kept = Kept(tmp_path, identity)
        tell = lambda text, what: solved.append(text)  # noqa: E731
        rows = measure(llama, dict.fromkeys(names, (choice,)), texts, {Score.OUTPUT}, kept=kept, phase=tell)
        assert bool(solved) == said
        return rows

    first = ran(THREE, {"model": 1}, said=True)
    assert ran(THREE, {"model": 1}, said=False) == first
    ran(THREE, {"model": 2}, said=True)
    ran(FED, {"model": 1}, said=True)
    assert len((tmp_path / "scores.jsonl").read_text().splitlines()) == 9
    same = Choice(format=THREE.format, solver=THREE.solver, name="other words")
    assert ran(same, {"model": 1}, said=False)[names[0]][0].weight == first[names[0]][0].weight


def test_ranks_and_not_sizes_count():
    rows = [Row(layer=str(i), choice="a", weight=0, fisher=f, kl=k) for i, (f, k) in enumerate(
        [(1, 0.1), (2, 0.2), (900, 0.3), (1000, 0.4)])]  # fmt: skip
    assert rank_correlation(rows, Score.FISHER) == pytest.approx(1)
    assert rank_correlation(rows, Score.NOISE) is None  # not measured
    assert rank_correlation(rows, Score.WEIGHT) is None  # constant
    assert rank_correlation(rows[:2], Score.FISHER) is None
    back = [Row(layer="x", choice="b", weight=0, fisher=-r.fisher, kl=r.kl) for r in rows]
    found = rank_correlations({"x": rows, "y": back}, [Score.FISHER])
    assert found["a"]["fisher"] == pytest.approx(1)
    assert found["b"]["fisher"] == pytest.approx(-1)
    assert abs(found["all"]["fisher"]) < 1


def test_least_harm_for_bits_and_least_bits_for_harm_are_one_program():
    sizes = [
        Choice(format=named("rtn", {"bits": b, "group_size": "-1"}).rules[0].weight) for b in ("2", "4", "8")
    ]
    names = [f"l{i}" for i in range(12)]
    shapes = {n: (64, 32 * (1 + i % 3)) for i, n in enumerate(names)}
    rng = torch.Generator().manual_seed(0)
    rows = {
        n: [Row(layer=n, choice="", weight=0, fisher=float(a) * t) for t in (0.1, 0.01, 0.0001)]
        for n, a in zip(names, torch.rand(12, generator=rng), strict=True)
    }
    own = dict.fromkeys(names, sizes)
    total = sum(a * b for a, b in shapes.values())
    by_bits = choose(own, shapes, rows, Budget(bits=4 * total))
    by_harm = choose(own, shapes, rows, Budget(kl=by_bits.expected_kl * (1 + 1e-9)))
    assert by_harm.bits <= by_bits.bits <= 4 * total
    assert by_harm.expected_kl <= by_bits.expected_kl * (1 + 1e-9)
    alike = choose(own, shapes, rows, Budget(bits=4 * total), together=[names[:6]])
    assert len({p.choice for p in alike.layers[:6]}) == 1
    assert alike.expected_kl >= by_bits.expected_kl


@pytest.mark.parametrize("given", [{}, {"bits": 1.0, "kl": 1.0}, {"bits": 0.0}, {"kl": -1.0}])
def test_a_budget_is_one_positive_number(given):
    with pytest.raises(InputError, match="budget"):
        Budget(**given)


def test_one_window_cannot_be_split():
    with pytest.raises(InputError, match="2 or more"):
        Texts.split(tiny_ids(1, 8))
