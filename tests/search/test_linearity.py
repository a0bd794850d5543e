"""The linear model: two roads to its coefficients agree, and errors foretell the KL of whole models."""

import pytest
import torch
from tiny import VOCAB, tiny, tiny_ids

from fewbit.errors import InputError
from fewbit.format import Stats
from fewbit.recipe import named
from fewbit.search import (
    Choice,
    error,
    fisher,
    gram_matrices,
    noise_responses,
    predict,
    random_tokens,
    siblings,
)
from fewbit.search.judge import Judge, block_linears


@pytest.fixture(scope="module")
def llama():
    return tiny("llama")


@pytest.fixture(scope="module")
def coefficients(llama):
    return fisher(llama, tiny_ids(48, 64, seed=1))


def choice(name, **settings):
    rule = named(name, settings).rules[0]
    return Choice(format=rule.weight, solver=rule.solver, basis=rule.basis)


def test_kl_grows_with_the_square_of_small_noise_and_the_model_is_as_before(llama):
    before = {n: p.clone() for n, p in llama.named_parameters()}
    found = noise_responses(llama, tiny_ids(4, 48), levels=(0.04, 0.08))
    assert [r.layer for r in found] == list(block_linears(llama))
    for r in found:
        assert r.kl[1] / r.kl[0] == pytest.approx(4, rel=0.1)
        assert r.bend == pytest.approx(1, rel=0.1)
    assert all(torch.equal(p, before[n]) for n, p in llama.named_parameters())
    assert found == noise_responses(llama, tiny_ids(4, 48), levels=(0.04, 0.08))


def test_gradients_give_the_coefficients_of_noise(llama, coefficients):
    seen = {r.layer: r.coefficient for r in noise_responses(llama, tiny_ids(8, 64), levels=(0.03,))}
    assert max(seen.values()) > 50 * min(seen.values())  # there is something to tell apart
    for name, a in seen.items():
        assert coefficients[name] == pytest.approx(a, rel=0.3)
    assert all(p.requires_grad for p in llama.parameters())  # left as it was


def test_the_sum_over_layers_foretells_the_kl_of_whole_models(llama, coefficients):
    tokens = tiny_ids(8, 64, seed=2)
    for bits in ("4", "5", "6"):
        own = choice("higgs", bits=bits, p="1")
        model, errors = tiny("llama"), {}
        judge = Judge(model, tokens)
        for name, module in block_linears(model).items():
            w = module.weight.detach()
            module.weight.data = own.solve(w, Stats())
            errors[name] = error(w, module.weight.data, None).best
        foretold = predict(coefficients, errors)
        assert judge.kl() == pytest.approx(foretold, rel=0.35)


def test_isotropic_errors_are_their_own_effective_noise():
    generator = torch.Generator().manual_seed(0)
    w, e = torch.randn(2, 256, 64, generator=generator)
    h = torch.diag(torch.linspace(1, 100, 64))
    got = error(w, w + 0.1 * e, h)
    assert got.weight == pytest.approx(0.01, rel=0.05)
    assert got.effective == pytest.approx(0.01, rel=0.1)
    quiet = torch.zeros_like(w)
    quiet[:, :8] = e[:, :8]  # the same columns' noise where inputs are weak harms less
    assert error(w, w + quiet, h).effective < 0.3 * error(w, w + quiet, h).weight
    assert error(w, w + quiet, None).best == pytest.approx(error(w, w + quiet, h).weight)


def test_feedback_has_more_error_in_the_weight_and_less_effective(llama):
    tokens, name = tiny_ids(16, 64), "model.layers.0.self_attn.q_proj"
    w, h = llama.get_submodule(name).weight.detach(), gram_matrices(llama, [name], tokens)[name]
    choices = choice("higgs", bits="2"), choice("higgs", bits="2", solver="gptq")
    plain, fed = (error(w, c.solve(w, Stats(gram=h)), h) for c in choices)
    assert fed.weight > plain.weight
    assert fed.effective < plain.effective
    assert fed.output < plain.output


def test_layers_that_read_one_tensor_share_its_gram_matrix(llama):
    names, tokens = list(block_linears(llama)), tiny_ids(3, 20)
    groups = siblings(llama, names, tokens)
    assert [len(g) for g in groups] == [3, 1, 2, 1] * 2
    grams = gram_matrices(llama, names, tokens)
    assert set(grams) == set(names)
    seen = []
    handle = llama.get_submodule(names[3]).register_forward_pre_hook(lambda m, x: seen.append(x[0]))
    llama(input_ids=tokens)
    handle.remove()
    x = seen[0].flatten(0, 1)
    torch.testing.assert_close(grams[names[3]], x.T @ x / 60, rtol=1e-4, atol=1e-5)
    assert grams[names[0]] is grams[names[1]]


def test_random_tokens_are_of_the_vocabulary_and_of_the_seed():
    a = random_tokens(VOCAB, 3, 50, seed=4)
    assert a.shape == (3, 50)
    assert a.min() >= 0
    assert a.max() < VOCAB
    assert torch.equal(a, random_tokens(VOCAB, 3, 50, seed=4))
    assert not torch.equal(a, random_tokens(VOCAB, 3, 50, seed=5))


def test_impossible_noise_and_a_model_in_training_are_refused(llama):
    with pytest.raises(InputError, match="noise levels"):
        noise_responses(llama, tiny_ids(1, 8), levels=(0.0,))
    with pytest.raises(InputError, match=r"model.eval\(\)"):
        Judge(tiny("llama").train(), tiny_ids(1, 8))
