"""Files of rows, and which of their rows are measured."""

import pytest

from fewbit.compare import Schedule, from_rows
from fewbit.errors import InputError
from fewbit.recipe import gptq, nf4, rtn

ROWS = """
4 bit:
  GPTQ, symmetric: gptq:group_size=64
  mine: recipes/mine.yaml
2 bit:
  mine: {INLINE}
"""


@pytest.fixture
def rows(tmp_path):
    """The path of a file with a row of each kind."""
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "mine.yaml").write_text(nf4().to_yaml())
    lines = [f"    {line}" for line in rtn(bits=2).to_yaml().splitlines()]
    path = tmp_path / "rows.yaml"
    path.write_text(ROWS.replace("{INLINE}", "\n" + "\n".join(lines)))
    return path


def test_a_row_is_words_a_file_beside_it_or_a_recipe(rows):
    found = from_rows(rows)
    assert [entry.title for entry in found] == ["4 bit/GPTQ, symmetric", "4 bit/mine", "2 bit/mine"]
    assert [entry.recipe for entry in found] == [gptq(group_size=64), nf4(), rtn(bits=2)]
    assert found[0].words == "-r gptq --set group_size=64"
    assert found[1].words == "--recipe-file recipes/mine.yaml"  # from where the rows are, wherever that is


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "holds no rows"),
        ("nf4", "holds no rows"),
        ("4 bit: nf4", "holds no rows"),
        ("4 bit: {a: 4}", "row 'a' of '4 bit': got 4; give words"),
        ("4 bit: {a: gtpq}", "row 'a' of '4 bit': .*did you mean 'gptq'"),
        ("4 bit: {a: no.yaml}", "row 'a' of '4 bit': .*cannot be read"),
        ("4 bit: {a: {name: x}}", "row 'a' of '4 bit': "),
        ("4 bit:\n  a: nf4\n  a: int8\n", "'a' stands twice, the second time in line 3"),
        ("4 bit: {a: nf4}\n4 bit: {b: int8}\n", "'4 bit' stands twice"),
        ("4 bit: [", "not valid YAML"),
    ],
)
def test_what_is_no_row_is_refused_by_its_place(tmp_path, text, said):
    path = tmp_path / "rows.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=said) as raised:
        from_rows(path)
    assert "\n" not in str(raised.value)
    with pytest.raises(InputError, match="cannot be read"):
        from_rows(tmp_path / "none.yaml")


def test_a_schedule_takes_rows_by_what_their_titles_hold(rows):
    entries = from_rows(rows)

    def titles(**options):
        return [entry.title for entry in Schedule(**options).chosen(entries)]

    assert titles() == [entry.title for entry in entries]
    assert titles(only=("gptq", "2 BIT")) == ["4 bit/GPTQ, symmetric", "2 bit/mine"]
    assert titles(only=("4 bit",), skip=("mine",)) == ["4 bit/GPTQ, symmetric"]
    with pytest.raises(InputError, match="only AWQ and skip mine; titles read like '4 bit/GPTQ, symmetric'"):
        titles(only=("AWQ",), skip=("mine",))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"workers": 0}, "got 0 workers"),
        ({"minutes": -1}, "got -1 minutes"),
        ({"minutes": float("nan")}, "got nan"),
    ],
)
def test_a_schedule_rejects_what_cannot_be(options, said):
    with pytest.raises(InputError, match=said):
        Schedule(**options)
