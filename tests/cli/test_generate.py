"""generate: text on standard output, speed aside, draws that a seed decides."""


def test_generate(fewbit, checkpoint):
    words = ("generate", checkpoint, "It was", "--max-new-tokens", 5)
    found = fewbit(*words, "--json").json
    assert {"text", "prompt", "new_tokens", "tokens_per_second"} <= set(found)
    assert 1 <= found["new_tokens"] <= 5
    ran = fewbit(*words)
    assert ran.out == "It was" + found["text"] + "\n"
    assert "tokens/s" in ran.err


def test_generate_draws_by_its_seed_alone(fewbit, checkpoint):
    import torch

    words = ("generate", checkpoint, "It was", "--max-new-tokens", 12, "--temperature", 2, "--json")
    torch.manual_seed(7)
    state = torch.get_rng_state()
    texts = [fewbit(*words, "--seed", seed).json["text"] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert torch.equal(torch.get_rng_state(), state)


def test_generate_in_the_chat_template(fewbit, checkpoint):
    words = ("generate", checkpoint, "Hi", "--json")
    plain, chat = fewbit(*words).json, fewbit(*words, "--chat").json
    assert chat["prompt_tokens"] > plain["prompt_tokens"] == 2
