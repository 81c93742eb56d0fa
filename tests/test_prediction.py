import csv
import io
import json

import pytest
from conftest import make_rows, write_csv

from distill import Classifier

ROWS = make_rows(20, seed=11)
TEXTS = [text for text, _ in ROWS]


@pytest.fixture(scope="module")
def expected(chain):
    return Classifier(chain.export).predict(TEXTS)


def _sources(folder):
    import pyarrow
    import pyarrow.parquet

    write_csv(folder / "a.csv", [(str(i), text) for i, text in enumerate(TEXTS)], ("n", "text"))
    (folder / "a.tsv").write_text("n\ttext\n" + "".join(f"{i}\t{text}\n" for i, text in enumerate(TEXTS)))
    (folder / "a.jsonl").write_text(
        "".join(json.dumps({"n": str(i), "text": t}) + "\n" for i, t in enumerate(TEXTS))
    )
    table = pyarrow.table({"n": [str(i) for i in range(20)], "text": TEXTS})
    pyarrow.parquet.write_table(table, folder / "a.parquet")


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "parquet"])
def test_every_kind_of_file_comes_back_with_its_columns_and_predictions(
    suffix, chain, run, tmp_path, expected
):
    _sources(tmp_path)
    result = run("predict", tmp_path / f"a.{suffix}", "--bundle", chain.export)
    rows = list(csv.DictReader(io.StringIO(result.stdout)))
    assert [row["prediction"] for row in rows] == expected
    assert [row["n"] for row in rows] == [str(i) for i in range(20)]
    assert all(0 <= float(row["score"]) <= 1 for row in rows)


@pytest.mark.parametrize("form", ["text", "csv", "jsonl"])
def test_standard_input_is_read_in_the_format_that_is_named(form, chain, run, tmp_path, expected):
    _sources(tmp_path)
    source = "\n".join(TEXTS) if form == "text" else (tmp_path / f"a.{form}").read_text()
    result = run("predict", "--format", form, "--bundle", chain.export, input=source)
    assert [row["prediction"] for row in csv.DictReader(io.StringIO(result.stdout))] == expected


def test_json_lines_carry_every_probability(chain, run, tmp_path, expected):
    result = run("predict", "--bundle", chain.export, "--json", input="\n".join(TEXTS))
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [max(row["probabilities"], key=row["probabilities"].get) for row in rows] == expected


def test_a_file_is_written_whole(chain, run, tmp_path, expected):
    _sources(tmp_path)
    output = tmp_path / "out.jsonl"
    assert run("predict", tmp_path / "a.csv", "--bundle", chain.export, "--output", output).stdout == ""
    assert [json.loads(line)["prediction"] for line in output.read_text().splitlines()] == expected
    assert not list(tmp_path.glob(".*"))


def test_a_row_with_another_column_than_the_first_ends_in_one_line(chain, run, tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text('{"text": "lovely"}\n{"text": "awful", "stars": 1}\n')
    result = run("predict", path, "--bundle", chain.export)
    assert result.exit_code == 1 and "'stars'" in result.stderr and "--json" in result.stderr
    assert run("predict", path, "--bundle", chain.export, "--json").exit_code == 0


def test_a_column_that_would_be_overwritten_is_refused(chain, run, tmp_path):
    path = write_csv(tmp_path / "in.csv", [("lovely", "5")], ("text", "score"))
    result = run("predict", path, "--bundle", chain.export)
    assert result.exit_code == 1 and "already has a column 'score'; rename it" in result.stderr
