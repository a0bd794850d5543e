"""compare: the table sorted by bits, the files it leaves, exit codes, one sentence for wrong arguments."""

import json
from threading import Lock

import pytest

from fewbit.compare import worker
from fewbit.compare.processes import Processes
from fewbit.errors import InputError

SMALL = ("--samples", 4, "--seqlen", 32, "--window", 32, "--windows", 2)


@pytest.fixture(autouse=True)
def here(monkeypatch):
    """Rows are made in this process, which has imported everything, one after another."""
    lock = Lock()

    def work(self, job, step):
        try:
            with lock:
                return "row", worker.run(job, lambda kind, *said: step(*said))
        except InputError as error:
            return "failed", str(error)

    monkeypatch.setattr(Processes, "run", work)


def test_a_table_a_report_and_figures(fewbit, llama, tmp_path):
    (tmp_path / "mine.yaml").write_text(fewbit("recipes", "gptq", "--set", "group_size=32").out)
    words = ("compare", llama, "-r", "int8", "-r", "nf4", "--recipe-file", "mine.yaml", *SMALL)
    ran = fewbit(*words, "-o", "out")
    assert ran.code == 0
    names = ("nf4", "mine", "int8", "original")
    lines = [next(line for line in ran.out.splitlines() if f" {name} " in line) for name in names]
    assert lines == sorted(lines, key=ran.out.splitlines().index)
    assert lines[2].startswith("*")  # 8 bits are closest to the original
    assert "out/report.html" in ran.out
    data = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [row["name"] for row in data["rows"]] == ["int8", "nf4", "mine"]
    page = (tmp_path / "out" / "report.html").read_text()
    assert all(name in page for name in names)
    assert "[4/4] mine" in ran.err
    again = fewbit(*words, "-o", "out", "--json")
    assert "measured before" in again.err
    assert again.json["front"] == data["front"]
    assert again.json["rows"][0]["kl"] == data["rows"][0]["kl"]


def test_a_file_of_rows_becomes_tables_in_a_page_step_by_step(fewbit, llama, tmp_path):
    (tmp_path / "rows.yaml").write_text(
        "4 bit:\n  best: nf4\n  plain: rtn:group_size=32\n8 bit:\n  best: int8\n"
    )
    (tmp_path / "page.md").write_text("Top.\n<!-- fewbit compare: out -->\n<!-- end -->\nBottom.\n")
    words = ("compare", llama, "--rows", "rows.yaml", *SMALL, "-o", "out", "--markdown", "page.md")
    ran = fewbit(*words, "--only", "best", "--skip", "8 BIT")
    assert ran.code == 0
    assert "2 rows, measured without --minutes, --only and --skip: 4 bit/plain; 8 bit/best" in ran.out
    assert ran.err.count("[") == 2  # the original and one row
    ran = fewbit(*words, "--workers", 2)
    assert "4 bit/best: measured before" in ran.err
    assert "; 1 of 2 rows, about" in ran.err
    assert "missing" not in ran.out
    page = (tmp_path / "page.md").read_text()
    assert page.startswith("Top.\n")
    assert page.endswith("\nBottom.\n")
    names = [line.split("|")[1].strip() for line in page.splitlines() if line.endswith("| CPU |")]
    assert names == ["best", "plain", "best"]
    again = fewbit(*words, "--minutes", 0, "--json")
    assert (again.json["missing"], again.json["front"]) == ([], ["4 bit/best", "8 bit/best"])


def test_a_failed_row_is_shown_and_the_exit_code_tells(fewbit, llama, tmp_path):
    ran = fewbit("compare", llama, "-r", "rtn:group_size=48", "-r", "nf4", *SMALL)
    assert ran.code == 1
    assert "48 does not divide" in ran.out
    assert "Traceback" not in ran.err
    assert "nf4" in ran.out
    assert (tmp_path / "compare-llama" / "report.html").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "no recipe to compare"),
        (("-r", "gtpq"), "did you mean 'gptq'"),
        (("-r", "gptq:bits"), "no setting"),
        (("-r", "nf4", "-r", "nf4"), "give each recipe once"),
        (("--recipe-file", "no.yaml"), "cannot be read"),
        (("-r", "nf4", "--eval-data", "no.txt"), "no text file"),
        (("-r", "nf4", "--limit", 2), "belong to tasks"),
        (("-r", "nf4", "--window", 1), "predicts nothing"),
        (("-r", "nf4", "--device", "tpu"), "is unknown"),
        (("--rows", "no.yaml"), "file of rows no.yaml cannot be read"),
        (("-r", "nf4", "--only", "int"), "no row is left"),
        (("-r", "nf4", "--workers", 0), "give 1 or more rows at a time"),
        (("-r", "nf4", "--minutes", "-2"), "give 0 or more"),
        (("-r", "nf4", "--markdown", "."), "cannot be read"),
    ],
)
def test_wrong_arguments_are_one_sentence_before_any_work(fewbit, llama, tmp_path, words, said):
    ran = fewbit("compare", llama, *words)
    assert ran.code == 2
    assert said in ran.err
    assert ran.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_an_interruption_says_that_the_same_command_goes_on(fewbit, llama, monkeypatch):
    def interrupted(self, job, step):
        raise KeyboardInterrupt

    monkeypatch.setattr(Processes, "run", interrupted)
    ran = fewbit("compare", llama, "-r", "nf4", *SMALL)
    assert ran.code == 130
    assert "goes on from the last finished row" in ran.err


def test_help_ends_with_an_example(fewbit):
    said = fewbit("compare", "--help").out.strip().splitlines()
    assert said[-1].strip().startswith("Example:  fewbit compare ")
