"""The loop: bits after a resume, updates that must not happen, and that all ways train."""

import io
import math
import warnings

import pytest
import torch

from fewbit.errors import InputError
from fewbit.recipe import rtn
from fewbit.train import LowLinear
from fewbit.train.guard import NonFiniteStep
from fewbit.trainer.data import read_corpus
from fewbit.trainer.loop import STUCK, Loop
from fewbit.trainer.settings import Settings
from fewbit.trainer.small import byte_tokenizer, small_llama
from fewbit.trainer.way import Way, quest

INT4 = rtn(bits=4, group_size=64)
WAYS = {
    "bf16": Way(),
    "delayed": Way(products="delayed"),
    "nvfp4": Way(products="nvfp4"),  # rounds stochastically
    "O3": Way(products="tensorwise", level="O3"),
    "4-bit states": Way(optimizer="adamw-4bit"),
    "lsq": Way(quant="lsq", recipe=INT4),
    "quest": Way(quant="quest", recipe=quest(2)),
}


@pytest.fixture
def corpus(text, quick):
    return read_corpus(byte_tokenizer(), text, quick)


def start(way: Way, corpus, settings: Settings, seed: int = 0) -> Loop:
    torch.manual_seed(seed)
    model = way.apply(small_llama(seed, blocks=1), corpus.ids[:32].view(1, -1))
    return Loop(model, way, corpus, settings)


def through_a_file(state: dict) -> dict:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("name", WAYS)
def test_a_run_that_goes_on_from_a_file_gives_the_same_bits(name, corpus, quick):
    whole = start(WAYS[name], corpus, quick)
    for _ in range(3):
        whole.update()
    kept = through_a_file(whole.state())
    for _ in range(3):
        whole.update()
    again = start(WAYS[name], corpus, quick, seed=99)  # other weights, another random state
    again.load(kept)
    for _ in range(3):
        again.update()
    assert again.rows == whole.rows
    assert "held" in again.rows[-1]
    own, other = (torch.nn.Module.state_dict(loop.model) for loop in (whole, again))
    assert own.keys() == other.keys()
    assert all(torch.equal(own[key], other[key]) for key in own)


@pytest.mark.parametrize("name", WAYS)
def test_every_way_learns(name, corpus):
    plan = Settings(steps=12, batch=2, length=32, held=3, looks=1, lr=4e-3)
    loop = start(WAYS[name], corpus, plan)
    before = loop.held_out()
    while loop.done < plan.steps:
        assert not loop.update()["skipped"]
    assert loop.rows[-1]["held"] < before - 1
    for part in loop.state()["optimizer"]["state"].values():
        assert part["step"] == plan.steps


def test_the_products_that_were_asked_for_compute(corpus, quick):
    loop = start(Way(products="rowwise"), corpus, quick)
    low = [n for n, m in loop.model.named_modules() if isinstance(m, LowLinear)]
    assert len(low) == 7
    assert start(Way(), corpus, quick).held_out() != loop.held_out()


def test_micro_batches_add_up_to_the_batch(corpus):
    how = {"steps": 2, "batch": 4, "length": 32, "held": 2, "precision": "float32"}
    whole, parts = (start(Way(), corpus, Settings(**how, micro=m)) for m in (None, 1))
    for _ in range(2):
        a, b = whole.update(), parts.update()
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["norm"] == pytest.approx(b["norm"], rel=1e-4)


@pytest.mark.parametrize("name", ["bf16", "delayed", "O3"])
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_an_update_with_an_inf_changes_nothing_and_the_next_one_goes_on(name, value, corpus, quick):
    loop = start(WAYS[name], corpus, quick)
    loop.update()
    weight = loop.model.model.layers[0].mlp.up_proj.weight
    before = through_a_file({k: v for k, v in loop.state().items() if k in ("model", "optimizer")})
    hook = weight.register_hook(lambda g: g + value)
    with pytest.warns(NonFiniteStep, match=r"up_proj\.weight holds NaN or Inf"):
        row = loop.update()
    hook.remove()
    assert row["skipped"]
    after = loop.state()
    names = [n for n, _ in loop.model.named_parameters()]
    assert all(torch.equal(after["model"][n], before["model"][n]) for n in names)
    assert flat(after["optimizer"]["state"]) == flat(before["optimizer"]["state"])
    assert not loop.update()["skipped"]
    assert all(torch.isfinite(p).all() for p in loop.model.parameters())


def flat(state: object) -> object:
    """Tensors as lists, so that states can be compared."""
    if isinstance(state, torch.Tensor):
        return state.float().tolist()
    return {k: flat(v) for k, v in state.items()} if isinstance(state, dict) else state


def test_a_run_whose_gradients_are_never_finite_is_given_up_in_words(corpus):
    loop = start(Way(), corpus, Settings(steps=30, batch=1, length=32, held=1))
    loop.model.lm_head.weight.register_hook(lambda g: g * math.inf)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(STUCK - 1):
            loop.update()
        with pytest.raises(InputError, match=f"last {STUCK} updates up to number {STUCK}; lower --lr"):
            loop.update()


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"products": "rowise"}, "did you mean rowwise"),
        ({"level": "O9"}, "known are O1, O2, O3"),
        ({"quant": "lsq"}, "give both"),
        ({"recipe": INT4}, "give both"),
        ({"recipe": INT4, "quant": "lsq", "products": "rowwise"}, "one or the other"),
        ({"level": "O3", "optimizer": "adamw-8bit"}, "leave --optimizer adamw-8bit out"),
    ],
)
def test_ways_that_make_no_sense_are_refused(parts, said):
    with pytest.raises(InputError, match=said):
        Way(**parts)
