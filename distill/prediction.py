"""`distill predict`: texts or files in, predictions out, streaming."""

import csv
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import tee
from pathlib import Path
from typing import IO, Any

import click
from click.core import ParameterSource

from distill.errors import DistillError
from distill.files import SURROGATE, TEXT_COLUMNS, find_column, read_csv, read_jsonl, read_lines, read_rows

Row = dict[str, Any]
SEPARATOR = "|"
CRLF = "\r\n"
FORMATS = ("text", "csv", "tsv", "jsonl", "parquet")


def _standard_input(form: str) -> Iterator[tuple[int, Row]]:
    stream = sys.stdin.buffer
    if form in ("csv", "tsv"):
        yield from read_csv(stream, "standard input", "\t" if form == "tsv" else ",")
    elif form == "jsonl":
        yield from read_jsonl(stream, "standard input")
    elif form == "parquet":
        raise DistillError("--format parquet: Parquet cannot be streamed from standard input; name the file")
    else:
        for number, line in enumerate(read_lines(stream, "standard input"), start=1):
            yield number, {"text": line.rstrip("\r\n")}


def texts_of_rows(
    rows: Iterator[tuple[int, Row]], name: str, column: str | None, pair: str | None
) -> Iterator[Any]:
    """The text, or pair of texts, of each row of a file.

    Args:
        rows: numbers and rows.
        name: of the file, for error messages.
        column: with the text; found by its usual names when left out.
        pair: column with a second text, for pairs.

    Raises:
        DistillError: naming the row that holds no text.
    """
    chosen = None
    for number, row in rows:
        chosen = chosen or find_column(name, list(row), column, TEXT_COLUMNS, "--text-column")
        if pair is not None and pair not in row:
            raise DistillError(
                f"{name}: no column {pair!r} with the second text of each pair; name it with "
                f"--text-pair-column; found {', '.join(row)}"
            )
        for wanted in filter(None, (chosen, pair)):
            if wanted not in row:
                raise DistillError(f"{name}, row {number}: no column {wanted!r}; found {', '.join(row)}")
            if not isinstance(row.get(wanted), str):
                raise DistillError(
                    f"{name}, row {number}: no text in column {wanted!r}; found {row.get(wanted)!r}"
                )
            if SURROGATE.search(row[wanted]):
                raise DistillError(
                    f"{name}, row {number}: column {wanted!r} holds half of a character (a lone surrogate); "
                    "take it out"
                )
        yield row[chosen] if pair is None else (row[chosen], row[pair])


class _Lines:
    """Ends the rows of a table with a line feed: csv, told to do so, leaves carriage returns unquoted."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def write(self, row: str) -> None:
        self._stream.write(row.removesuffix(CRLF) + "\n")


@contextmanager
def _writer(output: Path | None, form: str, columns: Sequence[str]) -> Iterator[Callable[[Row], None]]:
    """Give a function that writes one row; a file appears only when all of it is there.

    A table without a row gets `columns`.
    """
    with ExitStack() as stack:
        partial = output and output.with_name(f".{output.name}.partial")
        stream: IO[str] = (
            stack.enter_context(partial.open("w", encoding="utf-8", newline="")) if partial else sys.stdout
        )
        table: Any = None

        def write_csv(row: Row) -> None:
            nonlocal table
            if table is None:
                delimiter = "\t" if form == "tsv" else ","
                table = csv.DictWriter(_Lines(stream), list(row), delimiter=delimiter, lineterminator=CRLF)
                table.writeheader()
            new = [column for column in row if column not in table.fieldnames]
            if new:
                raise DistillError(
                    f"a row has a column {new[0]!r} that the first row lacks, which {form} cannot hold; "
                    "add --json"
                )
            table.writerow(row)

        def write_jsonl(row: Row) -> None:
            stream.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")

        try:
            yield write_jsonl if form == "jsonl" else write_csv
            if table is None and form != "jsonl":
                stream.write(("\t" if form == "tsv" else ",").join(columns) + "\n")
            stream.flush()
            if partial and output:
                stack.close()
                partial.replace(output)
        finally:
            if partial:
                partial.unlink(missing_ok=True)


def _target(source: str, output: Path | None, as_json: bool, overwrite: bool) -> str:
    """The format to write, after a look at the place."""
    target = "jsonl" if as_json else (output.suffix.lstrip(".").lower() if output else "csv")
    if output and output.is_dir():
        raise DistillError(f"--output {output}: this is a folder; name a file in it")
    if output and as_json and output.suffix.lower() in (".csv", ".tsv"):
        raise DistillError(f"--output {output}: --json writes JSON; name a .jsonl file, or leave --json out")
    if output and target not in ("csv", "tsv", "jsonl"):
        raise DistillError(f"--output {output}: unknown kind of file; use .csv, .tsv or .jsonl")
    if output and source != "-" and output.resolve() == Path(source).resolve():
        raise DistillError(f"--output {output}: this is the file that is read; name another")
    if output and output.exists() and not overwrite:
        raise DistillError(f"--output {output}: already there; add --overwrite to replace it")
    if output and not output.parent.is_dir():
        raise DistillError(f"--output {output}: no folder {output.parent}; make it first")
    return target


def _answer(found: str | list[str], probabilities: dict[str, float], form: str, as_json: bool) -> Row:
    """What is added to a row: several labels, and their scores, are lists, or joined in a table."""
    score: Any = probabilities[found] if isinstance(found, str) else [probabilities[one] for one in found]
    answer: Row = {"prediction": found, "score": score}
    if form != "jsonl" and isinstance(found, list):
        answer = {"prediction": SEPARATOR.join(found), "score": SEPARATOR.join(map(str, score))}
    return {**answer, "probabilities": probabilities} if as_json else answer


def _predict_with_ray(
    source: str, output: str | None, bundle: Path, beside: dict[str, Any], *rest: Any
) -> None:
    if given := [name for name, value in beside.items() if value]:
        raise DistillError(f"{given[0]}: not with --engine ray; leave it out")
    if source == "-" or output is None:
        raise DistillError(
            "--engine ray: reads Parquet and writes Parquet; name a file, a folder or an address as SOURCE, "
            "and a folder or an address as --output"
        )
    from distill.bulk import predict_with_ray

    text_column, pair_column, provider, *others = rest
    count = predict_with_ray(
        source, output, bundle, text_column, pair_column, "cuda" if provider == "cuda" else "cpu", *others
    )
    click.echo(f"{output}: {count:,} rows")


@click.command("predict")
@click.argument("source", default="-")
@click.option(
    "--bundle", type=click.Path(path_type=Path), default=Path("runs/export"), help="Folder of export."
)
@click.option(
    "--format", "form", type=click.Choice(FORMATS), help="Of standard input [text: one text a line]."
)
@click.option("--text-column", help="Column with the text [found by its usual names].")
@click.option("--text-pair-column", help="Column with a second text, for pairs [as in training].")
@click.option(
    "--output",
    help="File to write: .csv, .tsv or .jsonl [standard output]; with --engine ray a folder, or an address.",
)
@click.option("--overwrite", is_flag=True, help="Replace an existing output.")
@click.option(
    "--json", "as_json", is_flag=True, help="One JSON object a line, with every class's probability."
)
@click.option("--provider", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", help="Where to run.")
@click.option("--file", help="ONNX file of the bundle, such as onnx/model.onnx [the provider's].")
@click.option("--threads", type=click.IntRange(min=1), help="Texts in flight at once [one a core].")
@click.option(
    "--engine",
    type=click.Choice(["local", "ray"]),
    default="local",
    help="ray: Parquet files, here or in an object store, over Ray Data, on CPUs unless --provider is cuda; "
    "the same call goes on with an interrupted run.",
)
@click.option("--workers", type=click.IntRange(min=1), help="With --engine ray [one a core, or a GPU].")
def predict(
    source: str,
    bundle: Path,
    form: str | None,
    text_column: str | None,
    text_pair_column: str | None,
    output: str | None,
    overwrite: bool,
    as_json: bool,
    provider: str,
    file: str | None,
    threads: int | None,
    engine: str,
    workers: int | None,
) -> None:
    """Classify texts from SOURCE: a CSV, TSV, JSONL or Parquet file, or - for standard input.

    Every row comes back with `prediction` and `score` added, in order; several labels of a text, and their
    scores, are joined with "|". Rows are read ahead: an answer is
    written when the next row is there, and at once with --threads 1.
    """
    if engine == "ray":
        _predict_with_ray(
            source, output, bundle, {"--json": as_json, "--format": form, "--threads": threads},
            text_column, text_pair_column, provider, file, workers, overwrite,
        )  # fmt: skip
        return
    from distill.bundle import open_bundle, second_column
    from distill.runtime import Classifier

    typed = click.get_current_context().get_parameter_source("form") is ParameterSource.COMMANDLINE
    if source != "-" and form and typed:
        raise DistillError(f"--format {form}: of standard input alone; a file's name says what it is")
    place = Path(output) if output else None
    target = _target(source, place, as_json, overwrite)
    if source != "-" and not Path(source).suffix and not Path(source).exists():
        raise DistillError(
            f"{source}: no such file; to classify a text, pipe it in: echo {source!r} | distill predict"
        )
    name = "standard input" if source == "-" else source
    rows, again = tee(_standard_input(form or "text") if source == "-" else read_rows(Path(source)))
    parts = open_bundle(bundle)
    text_pair_column = text_pair_column or second_column(parts.manifest["data"])
    classifier = Classifier(parts, provider=provider, file=file, threads=threads)
    several = classifier.labels if classifier.thresholds is not None and target != "jsonl" else []
    if joined := next((label for label in several if SEPARATOR in label), None):
        raise DistillError(f'label {joined!r}: holds the "|" that joins a text\'s labels; add --json')
    answers = classifier.stream_logits(texts_of_rows(again, name, text_column, text_pair_column))
    added = ("prediction", "score", *(["probabilities"] if as_json else []))
    with _writer(place, target, (text_column or "text", *added)) as write:
        for (_, row), logits in zip(rows, answers, strict=False):
            taken = [column for column in added if column in row]
            if taken:
                raise DistillError(f"{name}: already has a column {taken[0]!r}; rename it")
            probabilities = dict(
                zip(classifier.labels, classifier.probabilities(logits).round(6).tolist(), strict=True)
            )
            write({**row, **_answer(classifier.answer(logits), probabilities, target, as_json)})
        next(answers, None)  # raises what ended the rows, if it was an error
