"""Encoders from the command line: the plan, the run, what comes next, and wrong arguments."""

import pytest


def words(bert, recipe="mixed-precision", *settings):
    given = [word for setting in settings for word in ("--set", setting)]
    return (bert, "-r", recipe, *given, "--data", bert.parent / "sentences.txt", "--samples", 6)


@pytest.mark.parametrize(
    ("recipe", "settings", "wide"),
    [
        ("mixed-precision", ("embedding_bits=4", "weight_bits=4"), "6 tensors (x, h, y) to uq16.0 pertensor"),
        ("peg-encoder", ("groups=4",), "6 tensors (x, h, y) to uint8 columns"),
    ],
)
def test_an_encoder_goes_from_plan_to_score(fewbit, bert, recipe, settings, wide):
    chosen, pairs = words(bert, recipe, *settings), bert.parent / "pairs.tsv"
    plan = fewbit("plan", *chosen, "--json").json
    assert len(plan["sites"]) == 24
    assert {s["role"] for s in plan["sites"]} > {"x", "h", "y", "gelu"}
    assert sum(layer["layer"] == "embeddings.word_embeddings" for layer in plan["layers"]) == 1
    ran = fewbit("quantize", *chosen, "-o", "out")
    assert ran.code == 0
    for said in (
        wide,
        "18 tensors to uint8 pertensor",
        "6 sentences of",
        "calibrating 24 tensors",
        "block 2/2",
    ):
        assert said in ran.err
    assert "its answers equal those of the run\n" in ran.out
    assert f"fewbit eval out --pairs sts-dev.tsv --against {bert}\n" in ran.out
    again = fewbit("quantize", *chosen, "-o", "out", "--json").json
    assert again["finished_before"]
    assert (again["sites"], again["reload_difference"], len(again["layers"])) == (24, 0, 13)
    assert again["bits_per_weight"] == plan["bits_per_weight"]
    assert again["size_bytes"] == pytest.approx(plan["size_bytes"], rel=0.2)
    found = fewbit("eval", "out", "--pairs", pairs, "--against", bert, "--json").json
    assert found["pairs"] == 5
    assert 0 < found["change"] < 1
    assert -1 <= found["spearman"] <= 1
    assert found["bits_per_weight"] == plan["bits_per_weight"]
    shown = fewbit("eval", "out", "--pairs", pairs, "--against", bert).out
    for said in ("Spearman", "of the embeddings, squared", "5 pairs", "standard error"):
        assert said in shown
    same = fewbit("eval", bert, "--pairs", pairs, "--against", bert, "--json").json
    assert same["change"] == 0
    assert same["spearman"] == same["original_spearman"]


def test_a_recipe_file_of_a_checkpoint_makes_it_again(fewbit, bert):
    assert fewbit("quantize", *words(bert, "peg-encoder", "groups=8"), "-o", "a").code == 0
    again = (bert, "--recipe-file", "a/fewbit_recipe.yaml", "--data", bert.parent / "sentences.txt")
    assert fewbit("quantize", *again, "--samples", 6, "-o", "b").code == 0
    with open("a/model.safetensors", "rb") as a, open("b/model.safetensors", "rb") as b:
        assert a.read() == b.read()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda w, llama: (llama, *w[1:]), "LlamaForCausalLM is no encoder built like BERT"),
        (lambda w, llama: w[:3], "--calibration FILE"),
        (lambda w, llama: (*w[:3], "--data", "none.txt"), "no text file none.txt"),
        (lambda w, llama: (*w[:3], "--data", "empty.txt"), "empty.txt holds no text"),
        (lambda w, llama: (*w[:-1], 7), "has 6 different sentences (lines), but 7 are asked for"),
        (lambda w, llama: (*w, "--set", "weight_bits=1"), "weight_bits=1 is out of range: give 2 to 8"),
        (lambda w, llama: (*w, "--set", "weight_bits=few"), "is not int"),
        (lambda w, llama: (*w, "--set", "residual=z"), "'z' is no tensor of an encoder layer"),
        (lambda w, llama: (*w, "--set", "range=wide"), "choose one of minmax"),
        (lambda w, llama: (*w, "--depth", "block"), "leave it at auto"),
    ],
)
def test_wrong_arguments_are_one_sentence_and_exit_code_2(fewbit, bert, llama, tmp_path, change, said):
    (tmp_path / "empty.txt").write_text("\n\n")
    for command in (("quantize", "-o", "out"), ("plan",)):
        ran = fewbit(command[0], *change(words(bert), llama), *command[1:])
        assert ran.code == 2
        assert said in ran.err
        assert ran.err.count("\n") == 1
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--pairs", "none.tsv"), "none.tsv cannot be read"),
        (("--pairs", "none.tsv", "--window", 8), "has no use for --window"),
        (("--pairs", "none.tsv", "--kv", "int8"), "has no use for --kv"),
    ],
)
def test_pairs_that_cannot_be_scored(fewbit, bert, options, said):
    ran = fewbit("eval", bert, *options)
    assert ran.code == 2
    assert said in ran.err


def test_a_decoder_has_no_embeddings_to_score(fewbit, bert, llama):
    ran = fewbit("eval", llama, "--pairs", bert.parent / "pairs.tsv")
    assert ran.code == 2
    assert "no last_hidden_state" in ran.err
