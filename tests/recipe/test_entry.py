"""What is compared: words, files, and what they cannot be."""

import pytest

from fewbit.errors import InputError
from fewbit.recipe import gptq, named
from fewbit.recipe.entry import from_file, from_words


def test_words_are_a_recipe_with_its_settings():
    entry = from_words("gptq:bits=3,group_size=64")
    assert entry.recipe == gptq(bits=3, group_size=64)
    assert entry.name == "gptq:bits=3,group_size=64"
    assert entry.words == "-r gptq --set bits=3 --set group_size=64"
    assert from_words("nf4").recipe == named("nf4", {})


def test_a_file_is_called_by_its_stem(tmp_path):
    path = tmp_path / "my own.yaml"
    path.write_text(gptq(bits=3).to_yaml())
    entry = from_file(path)
    assert (entry.name, entry.recipe) == ("my own", gptq(bits=3))
    assert entry.words == f"--recipe-file '{path}'"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("gtpq", "did you mean 'gptq'"),
        ("gptq:bit=3", "has no setting 'bit'"),
        ("gptq:bits", "'bits', which is no setting"),
        ("gptq:", "which is no setting"),
        ("gptq:bits=3,bits=4", "twice"),
        ("gptq:bits=x", "is not int"),
    ],
)
def test_wrong_words_are_refused(text, said):
    with pytest.raises(InputError, match=said):
        from_words(text)


def test_a_file_that_is_no_recipe_is_refused(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        from_file(tmp_path / "no.yaml")
    (tmp_path / "x.yaml").write_text("- 1\n")
    with pytest.raises(InputError, match="holds no recipe"):
        from_file(tmp_path / "x.yaml")
