import csv
import io
import json

import pytest
from conftest import make_rows, write_csv

from distill import Classifier
from distill.bundle import open_bundle, second_column
from distill.files import read_rows

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


@pytest.mark.parametrize(("suffix", "header"), [("csv", "text,prediction,score\n"), ("jsonl", "")])
def test_a_file_without_rows_becomes_a_table_without_rows(chain, run, tmp_path, suffix, header):
    (tmp_path / "in.csv").write_text("text\n")
    output = tmp_path / f"out.{suffix}"
    result = run("predict", tmp_path / "in.csv", "--bundle", chain.export, "--output", output)
    assert result.exit_code == 0 and output.read_text() == header


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


@pytest.mark.parametrize("form", ["text", "csv", "jsonl"])
def test_a_byte_order_mark_on_standard_input_is_no_part_of_the_text(form, chain, run):
    content = {"text": "lovely", "csv": "text\nlovely\n", "jsonl": '{"text": "lovely"}'}[form]
    result = run(
        "predict", "--format", form, "--bundle", chain.export, input=b"\xef\xbb\xbf" + content.encode()
    )
    assert next(csv.DictReader(io.StringIO(result.stdout)))["text"] == "lovely"


def test_a_text_on_standard_input_ends_at_a_line_feed_alone(chain, run):
    found = run("predict", "--bundle", chain.export, "--json", input=b"lovely\rphone\r\nbad\n").stdout
    assert [json.loads(line)["text"] for line in found.splitlines()] == ["lovely\rphone", "bad"]


@pytest.mark.parametrize("form", ["csv", "tsv"])
def test_a_table_with_a_carriage_return_in_a_text_can_be_read_again(chain, run, tmp_path, form):
    (tmp_path / "in.jsonl").write_text('{"text": "lovely\\rphone"}\n{"text": "bad\\r"}\n')
    result = run(
        "predict", tmp_path / "in.jsonl", "--bundle", chain.export, "--output", tmp_path / f"o.{form}"
    )
    assert result.exit_code == 0, result.output
    written = (tmp_path / f"o.{form}").read_bytes()
    assert written.count(b"\n") == 3 and b"\r\n" not in written
    assert [row["text"] for _, row in read_rows(tmp_path / f"o.{form}")] == ["lovely\rphone", "bad\r"]


def test_a_file_that_is_not_there_is_said_before_the_bundle_is_opened(run, tmp_path):
    result = run("predict", tmp_path / "none.csv", "--bundle", tmp_path / "nowhere")
    assert result.exit_code == 1 and "none.csv: no such file" in result.stderr


def test_bytes_on_standard_input_that_are_not_utf_8_end_in_one_line(chain, run):
    result = run("predict", "--bundle", chain.export, input=b"good\ncaf\xe9\n")
    assert result.exit_code == 1 and "standard input, line 2: byte 0xe9" in result.stderr


def test_dates_become_json_and_probabilities_are_not_overwritten(chain, run, tmp_path):
    import datetime

    import pyarrow.parquet

    day = datetime.datetime(2026, 1, 2)
    pyarrow.parquet.write_table(pyarrow.table({"text": ["lovely"], "day": [day]}), tmp_path / "a.parquet")
    row = json.loads(run("predict", tmp_path / "a.parquet", "--bundle", chain.export, "--json").stdout)
    assert row["day"].startswith("2026-01-02")
    path = write_csv(tmp_path / "in.csv", [("lovely", "5")], ("text", "probabilities"))
    assert "already has a column" in run("predict", path, "--bundle", chain.export, "--json").stderr
    assert run("predict", path, "--bundle", chain.export).exit_code == 0


def test_the_input_is_never_the_output(chain, run, tmp_path):
    (tmp_path / "in.csv").write_text("text\nlovely\n")
    arguments = ["--bundle", chain.export, "--output", tmp_path / "in.csv", "--overwrite"]
    result = run("predict", tmp_path / "in.csv", *arguments)
    assert result.exit_code == 1 and "the file that is read" in result.output
    assert (tmp_path / "in.csv").read_text() == "text\nlovely\n"


def test_a_bundle_of_pairs_looks_for_the_second_column_that_it_was_trained_on(
    chain, run, tmp_path, monkeypatch
):
    assert second_column({"columns": {"text": None, "text_pair": "second"}}) == "second"
    assert second_column(open_bundle(chain.export).manifest["data"]) is None
    for module in ("bundle", "runtime"):
        monkeypatch.setattr(f"distill.{module}.second_column", lambda data: "second")
    rows = [("lovely phone", "awful"), ("it was", "great")]
    source = write_csv(tmp_path / "in.csv", rows, ("text", "second"))
    result = run("predict", source, "--bundle", chain.export)
    assert result.exit_code == 0, result.output
    found = [line.split(",")[2] for line in result.stdout.splitlines()[1:]]
    assert found == Classifier(chain.export).predict(rows)
    result = run("predict", "--bundle", chain.export, input="lovely\n")
    assert result.exit_code == 1 and "no column 'second'" in result.stderr
    assert "--text-pair-column" in result.stderr
