"""What a text is read as, how it is joined again, and that every bad source gets one clear sentence."""

import sys
import types
from pathlib import Path

import pytest

from fewbit.errors import InputError
from fewbit.io import text as module
from fewbit.io.text import Join, Text, join, read_text, token_ids

WIKITEXT = Path(__file__).resolve().parents[3] / "shared" / "data" / "wikitext2_raw_test.txt"


def _file(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_the_default_is_a_few_hundred_kilobytes_of_english_and_names_its_version():
    text = read_text()
    whole = "".join(text.documents)
    assert len(whole) > 300_000
    assert whole.count(" the ") > 2_000
    assert text.name == f"embedded (pydoc_data.topics of CPython {sys.version.split()[0]})"
    assert all(line.endswith("\n") for line in text.documents[:-1])
    assert read_text("embedded") == text


def test_the_held_out_part_is_a_few_windows_long_and_shares_no_paragraph_with_the_default():
    used, held = (read_text(spec) for spec in ("embedded", "embedded:eval"))
    paragraphs = [{" ".join(p.split()) for p in "".join(t.documents).split("\n\n")} for t in (used, held)]
    assert not paragraphs[0] & paragraphs[1]
    assert 40_000 < len("".join(held.documents)) < len("".join(used.documents)) / 5
    assert held.name.startswith("embedded:eval ")


def test_documents_of_a_text_file_are_its_lines_with_their_newlines(tmp_path):
    # A form feed, U+2028 and a lone CR end no line; byte order mark and CRLF are the file's, not the text's.
    path = _file(tmp_path, "a.txt", "\ufeffone\r\n\r\ntwo\f\u2028\rstill two\nthree".encode())
    assert read_text(path) == Text(str(path), ("one\n", "\n", "two\f\u2028\rstill two\n", "three"))
    assert read_text(str(path)).documents == read_text(path).documents


@pytest.mark.parametrize(
    ("documents", "rows", "solid"),
    [
        ((" \n", "a\n", "\n", "b\n"), "\n\na\n\n\n\n\nb\n", "a\nb\n"),
        (("a b", "", "c"), "a b\n\n\n\nc", "a b\nc"),
        (("a\nb", "c\n", "d"), "a\nb\n\nc\n\n\nd", "a\nb\nc\nd"),
        (("a",), "a", "a"),
    ],
)
def test_the_two_joins(documents, rows, solid):
    text = Text("t", documents)
    assert join(text, Join.ROWS) == rows
    assert join(text, Join.SOLID) == solid


def test_the_joins_of_a_whole_file_follow_the_published_recipe():
    text = read_text(WIKITEXT if WIKITEXT.exists() else None)
    plain, blank = "".join(text.documents), [line for line in text.documents if not line.strip()]
    published = "\n\n".join(line if line.strip() else "" for line in plain.splitlines(keepends=True))
    assert join(text, Join.ROWS) == published
    assert join(text, Join.SOLID) == "".join(line for line in text.documents if line.strip())
    if WIKITEXT.exists():
        assert plain.encode() == WIKITEXT.read_bytes()
        assert (len(text.documents), len(blank)) == (4358, 1467)
        assert join(text, Join.SOLID).count("\n") == 4358 - 1467


def test_a_join_is_not_a_string():
    with pytest.raises(InputError, match=r"'rows': pass Join\.ROWS or Join\.SOLID"):
        join(Text("t", ("a",)), "rows")


def test_json_lines_give_the_field_text_or_the_only_string(tmp_path):
    rows = '{"url": "u", "text": "first\\nline"}\n\n{"text": "second", "n": 1}\n'
    assert read_text(_file(tmp_path, "a.jsonl", rows)).documents == ("first\nline", "second")
    rows = '{"content": "one", "n": 1}\n{"n": 2, "content": "two"}'
    assert read_text(_file(tmp_path, "b.json", rows)).documents == ("one", "two")


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("empty.txt", "", "holds no text"),
        ("blank.md", " \n\n\t\n", "holds no text"),
        ("none.jsonl", "\n", "holds no text"),
        ("packed.gz", b"\x1f\x8b\x08\x00", "is not UTF-8 text: byte 0x8b at offset 1"),
        ("cut.jsonl", '{"text": "a"}\n{"text": "b', "line 2 of .* is not JSON"),
        ("array.json", '["a", "b"]', "line 1 of .* is no JSON object but a list"),
        (
            "two.jsonl",
            '{"q": "a", "a": "b", "n": 1}',
            "line 1 of .* has the fields q, a, n: expected a field 'text'",
        ),
        ("nothing.jsonl", "{}", r"line 1 of .* has the fields \(none\)"),
        (
            "null.jsonl",
            '{"text": "a"}\n{"text": null}',
            "line 2 of .* has a NoneType in it: expected a string",
        ),
        (
            "other.jsonl",
            '{"text": "a"}\n{"body": "b"}',
            "line 2 of .* has the fields body: .* the field 'text'",
        ),
        ("half.jsonl", '{"text": "\\ud800"}', "line 1 of .* half a surrogate pair"),
    ],
)
def test_a_file_that_cannot_be_used_gets_one_sentence(tmp_path, name, content, sentence):
    with pytest.raises(InputError, match=sentence) as caught:
        read_text(_file(tmp_path, name, content))
    assert "\n" not in str(caught.value)
    assert name in str(caught.value)


@pytest.mark.parametrize(
    "spec", ["gone.txt", "a/b/c", "./gone", "gone.jsonl", Path("gone"), "a:b:c:d", "two words"]
)
def test_a_missing_file_is_named_as_typed(spec):
    with pytest.raises(InputError, match="there is no text file") as caught:
        read_text(spec)
    assert str(spec) in str(caught.value)


def test_a_folder_a_blank_name_and_a_text_in_place_of_its_name_are_refused(tmp_path):
    with pytest.raises(InputError, match="is a folder"):
        read_text(tmp_path)
    with pytest.raises(InputError, match="name of the text is empty"):
        read_text(" ")
    with pytest.raises(InputError, match="cannot be looked up"):
        read_text("x" * 5000)


def _hub(monkeypatch, rows):
    """A stand-in for the datasets package; returns the calls it got."""
    calls = []

    def load_dataset(*args, **keywords):
        calls.append((args, keywords))
        if isinstance(rows, Exception):
            raise rows
        return iter(rows)

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    return calls


@pytest.mark.parametrize(
    ("spec", "asked"),
    [
        ("wikitext:wikitext-2-raw-v1:test", ("wikitext", "wikitext-2-raw-v1", "test")),
        ("owner/name", ("owner/name", None, "train")),
        ("owner/name::valid", ("owner/name", None, "valid")),
        ("owner/name:en", ("owner/name", "en", "train")),
    ],
)
def test_a_hub_data_set_is_streamed_by_name_config_and_split(monkeypatch, spec, asked):
    calls = _hub(monkeypatch, [{"text": " = A = \n"}, {"text": ""}, {"text": "b\n"}])
    assert read_text(spec) == Text(spec, (" = A = \n", "", "b\n"))
    assert calls == [(asked[:2], {"split": asked[2], "streaming": True})]


def test_reading_a_large_hub_data_set_stops_and_its_name_says_so(monkeypatch):
    monkeypatch.setattr(module, "HUB_CHARACTERS", 10)
    _hub(monkeypatch, ({"text": "abcd"} for _ in range(10**9)))
    assert read_text("c4:en") == Text("c4:en (its first 3 rows)", ("abcd",) * 3)


def test_a_hub_data_set_that_cannot_be_read_gets_one_sentence(monkeypatch):
    _hub(monkeypatch, ConnectionError("no route\nlong trace"))
    with pytest.raises(
        InputError, match=r"'c4:en' cannot be read \(ConnectionError: no route\): check"
    ) as caught:
        read_text("c4:en")
    assert "\n" not in str(caught.value)
    _hub(monkeypatch, [{"question": "a", "answer": "b"}])
    with pytest.raises(InputError, match="row 1 of qa has the fields question, answer"):
        read_text("qa")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"'c4:en' is no file here, .* pip install 'fewbit\[eval\]'"):
        read_text("c4:en")


def test_tokens_carry_nothing_that_the_text_does_not():
    def tokenizer(text, *, add_special_tokens, verbose):
        assert not verbose
        return {"input_ids": [999] * add_special_tokens + [ord(letter) for letter in text]}

    ids = token_ids(tokenizer, "abc")
    assert ids.tolist() == [97, 98, 99]
    assert str(ids.dtype) == "torch.int64"
