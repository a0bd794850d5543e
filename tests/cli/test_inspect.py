"""``fewbit inspect`` as a person runs it."""

WORDS = ("--samples", "2", "--seqlen", "32")


def test_the_summary_says_what_to_do_and_where_bits_are_lost(fewbit, llama):
    ran = fewbit("inspect", llama, *WORDS)
    assert ran.code == 0, ran.err
    assert f"fewbit quantize {llama} -r w8a8 -o OUT" in ran.out
    assert f"fewbit quantize {llama} -r quarot -o OUT" in ran.out
    assert "rotation" in ran.out
    assert "model.layers.0.self_attn.q_proj, k_proj, v_proj" in ran.out
    assert "embedded, 2 windows of 32 tokens, 64 in all" in ran.out
    assert "block 2/2" in ran.err


def test_json_is_all_there_is_on_standard_output(fewbit, llama):
    data = fewbit("inspect", llama, *WORDS, "--json").json
    assert data["advice"]["w8a8"]["recipe"] == "w8a8"
    assert len(data["groups"]) == 8


def test_a_report_is_written_beside_the_summary(fewbit, llama, tmp_path):
    ran = fewbit("inspect", llama, *WORDS, "-o", "r.html")
    assert ran.code == 0
    assert "wrote r.html" in ran.err
    assert (tmp_path / "r.html").read_text().startswith("<!DOCTYPE html>")
    assert [p.name for p in tmp_path.iterdir()] == ["r.html"]


def test_a_text_of_ones_own(fewbit, llama, tmp_path):
    (tmp_path / "own.txt").write_text("the cat sat on the mat. " * 40)
    assert fewbit("inspect", llama, *WORDS, "--data", "own.txt", "--json").json["text"] == "own.txt"


def test_what_cannot_work_is_one_sentence_before_any_work(fewbit, llama, tmp_path):
    for words, said in (
        ((llama, "-o", "no/r.html"), "folder no for the report does not exist"),
        ((llama, "-o", tmp_path), "is a folder"),
        ((llama, "--samples", "0"), "calibration samples is 0"),
        (("nowhere",), "nowhere"),
        ((llama, "--samples", "9999999"), "ask for at most"),
    ):
        ran = fewbit("inspect", *words)
        assert ran.code == 2, words
        assert said in ran.err, ran.err
        assert "block 1" not in ran.err
        assert len(ran.err.strip().splitlines()) == 1
        assert ran.out == ""


def test_a_quantized_checkpoint_is_looked_at_by_the_values_of_its_codes(fewbit, checkpoint):
    data = fewbit("inspect", checkpoint, *WORDS, "--json").json
    errors = [x["errors"]["w4a4"]["groups"] for g in data["groups"] for x in g["layers"]]
    assert len(errors) == 14
