"""Every kind of bad input ends in one line that names the place and the remedy, and leaves nothing half-written."""

import json
import shutil
from pathlib import Path

import pyarrow.compute
import pyarrow.parquet
import pytest
from conftest import make_rows, write_csv

TEACHER = ["train-teacher", "--max-steps", "1", "--model"]


def _snapshot(root: Path) -> dict[str, bytes]:
    """Every file but checkpoints' recipes: content by path."""
    return {str(path): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def _check(result, before, root, place, remedy, code=1):
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("Error: ")
    assert place in last and remedy in last, last
    assert _snapshot(root) == before


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


ROWS = make_rows(40)
GOOD = "\n".join(["text,label", *(f"{text},{label}" for text, label in ROWS)])

# name -> (file name, content, place in the message, remedy in the message)
FILES = {
    "unknown suffix": ("x.xlsx", "text,label\na,b\n", "x.xlsx", "use .csv"),
    "empty file": ("x.csv", "", "x.csv", "first line must name the columns"),
    "header only": ("x.csv", "text,label\n", "x.csv", "at least one row"),
    "too many fields": ("x.csv", GOOD + "\na,b,c\n", "x.csv, line 42", "put quotes"),
    "too few fields": ("x.csv", GOOD + "\nalone\nagain\n", "x.csv, line 42", "put quotes"),
    "not UTF-8": ("x.csv", GOOD.encode() + "\ncafé,negative\n".encode("latin-1"), "x.csv", "iconv"),
    "UTF-16": ("x.csv", GOOD.encode("utf-16-le"), "x.csv, line 1", "UTF-8"),
    "not UTF-8, far down": (
        "x.csv",
        GOOD.encode() + b"\nmore,neutral" * 900 + b"\ncaf\xe9,negative\n",
        "x.csv, line 942",
        "iconv",
    ),
    "UTF-16 of a spreadsheet": ("x.csv", GOOD.encode("utf-16"), "x.csv, line 1", "UTF-8"),
    "half a character": ("x.jsonl", '{"text": "a \\ud800", "label": "b"}\n', "x.jsonl, line 1", "take it out"),
    "zero byte": ("x.csv", GOOD + "\na\0b,negative\n", "x.csv, line 42", "UTF-8"),
    "column twice": ("x.csv", "text,label,text\na,b,c\n", "x.csv, line 1", "rename"),
    "open quote": ("x.csv", GOOD + '\n"open,negative\n', "x.csv, line", "close every quote"),
    "no text column": ("x.csv", "words,label\na,b\n", "words, label", "--text-column"),
    "no label column": ("x.csv", "text,stars\na,b\n", "text, stars", "--label-column"),
    "bad JSON": ("x.jsonl", '{"text": "a", "label": "b"}\n{"text": \n', "x.jsonl, line 2", "one object a line"),
    "JSON array": ("x.jsonl", '["a", "b"]\n', "x.jsonl, line 1", "object"),
    "text is a number": ("x.jsonl", '{"text": 3, "label": "b"}\n', "x.jsonl, line 1", "--text-column"),
    "label is a list": ("x.jsonl", '{"text": "a", "label": ["b"]}\n', "x.jsonl, line 1", "--multi-label"),
    "damaged Parquet": ("x.parquet", "PAR1 nothing", "x.parquet", "not a readable Parquet"),
    "one label": ("x.csv", "text,label\na,b\nc,b\n", "only one label (b)", "at least two"),
    "label is free text": (
        "x.csv", "text,label\n" + "".join(f"t{i},l{i}\n" for i in range(40)), "40 different labels", "--label-column",
    ),
    "every text empty": ("x.csv", "text,label\n ,a\n,b\n", "x.csv", "no row of the training split"),
    "classes too small": ("x.csv", "text,label\na,x\nb,y\n", "x.csv", "add rows"),
}  # fmt: skip


@pytest.mark.parametrize("kind", FILES)
def test_bad_data_file(kind, here, run, checkpoint):
    name, content, place, remedy = FILES[kind]
    (here / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    before = _snapshot(here)
    _check(run(*TEACHER, checkpoint, "--data", name), before, here, place, remedy)


def _two_train_files(here):
    write_csv(here / "d" / "train.csv", ROWS)
    write_csv(here / "d" / "training.csv", ROWS)


def _leaky(here):
    for split in ("train", "validation", "test"):
        write_csv(here / "d" / f"{split}.csv", ROWS)


def _same_held_out(here):
    write_csv(here / "d" / "train.csv", ROWS[:30])
    for split in ("validation", "test"):
        write_csv(here / "d" / f"{split}.csv", ROWS[30:])


FOLDERS = {
    "no train file": (
        lambda here: write_csv(here / "d" / "test.csv", ROWS),
        "only test.csv",
        "name it train.csv",
    ),
    "empty folder": (lambda here: (here / "d").mkdir(), "no data files", "name it train.csv"),
    "two train files": (_two_train_files, "train.csv and training.csv", "keep one"),
    "validation equals test": (_same_held_out, "--data d", "no validation file"),
    "train equals test": (_leaky, "--data d", "nothing is left to train on"),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_bad_data_folder(kind, here, run, checkpoint):
    build, place, remedy = FOLDERS[kind]
    build(here)
    before = _snapshot(here)
    _check(run(*TEACHER, checkpoint, "--data", "d"), before, here, place, remedy)


OPTIONS = {
    "missing checkpoint": (["--data", "good.csv", "--model", "./absent"], "./absent", "no such folder", 1),
    "semicolons": (["--data", "semicolons.csv"], "semicolons.csv", "save the file with commas", 1),
    "missing file": (["--data", "absent.csv"], "absent.csv", "no such file", 1),
    "missing path": (["--data", "./absent"], "./absent", "no such file", 1),
    "named column absent": (["--data", "good.csv", "--text-column", "body"], "'body'", "--text-column", 1),
    "output is a file": (["--data", "good.csv", "--output", "good.csv"], "good.csv", "name a folder", 1),
    "output exists": (["--data", "good.csv", "--output", "mine"], "mine", "add --overwrite", 1),
    "output not ours": (
        ["--data", "good.csv", "--output", "mine", "--overwrite"],
        "mine",
        "choose another",
        1,
    ),
    "fp16 on a CPU": (
        ["--data", "good.csv", "--device", "cpu", "--precision", "fp16"],
        "fp16",
        "use bf16",
        1,
    ),
    "output inside a file": (
        ["--data", "good.csv", "--output", "good.csv/x"],
        "good.csv",
        "choose another",
        1,
    ),
    "no steps": (["--data", "good.csv", "--max-steps", "0"], "--max-steps 0", "at least 1", 1),
    "not a number": (["--data", "good.csv", "--epochs", "many"], "--epochs", "many", 2),
    "dropout of one": (["--data", "good.csv", "--dropout", "1"], "--dropout", "x<1", 2),
    "out of range": (["--data", "good.csv", "--label-smoothing", "1.5"], "--label-smoothing", "1.5", 2),
    "unknown option": (["--data", "good.csv", "--epoch", "1"], "--epoch", "--epochs", 2),
    "no data": ([], "--data", "Missing option", 2),
}


@pytest.mark.parametrize("kind", OPTIONS)
def test_bad_option(kind, here, run, checkpoint):
    options, place, remedy, code = OPTIONS[kind]
    write_csv(here / "good.csv", ROWS)
    (here / "semicolons.csv").write_text("review;category\nlovely;good\nawful;bad\n")
    (here / "mine").mkdir()
    (here / "mine" / "thesis.txt").write_text("precious")
    before = _snapshot(here)
    _check(run(*TEACHER, checkpoint, *options), before, here, place, remedy, code)


def test_cuda_without_a_device(here, run, checkpoint, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    write_csv(here / "good.csv", ROWS)
    before = _snapshot(here)
    result = run(*TEACHER, checkpoint, "--data", "good.csv", "--device", "cuda")
    _check(result, before, here, "--device cuda", "use --device cpu")


@pytest.mark.parametrize("kind", ["no config", "only a pickle"])
def test_bad_checkpoint(kind, here, run, checkpoint):
    write_csv(here / "good.csv", ROWS)
    shutil.copytree(checkpoint, here / "model")
    if kind == "no config":
        (here / "model" / "config.json").unlink()
    else:
        (here / "model" / "model.safetensors").rename(here / "model" / "pytorch_model.bin")
    before = _snapshot(here)
    result = run("train-teacher", "--data", "good.csv", "--model", "./model")
    _check(
        result, before, here, "--model ./model", "cannot be loaded" if kind != "no config" else "config.json"
    )


CONFIGS = {
    "list for a value": ("[predict]\nthreads = [1]\n", "threads", "one value"),
    "not TOML": ("[train-teacher\n", "distill.toml", "not valid TOML"),
    "unknown table": ("[train-techer]\n", "[train-techer]", "did you mean 'train-teacher'"),
    "unknown option": ("[predict]\nbundel = 'x'\n", "'bundel'", "did you mean 'bundle'"),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_bad_configuration(kind, here, run):
    content, place, remedy = CONFIGS[kind]
    (here / "distill.toml").write_text(content)
    _check(run("predict"), _snapshot(here), here, place, remedy, code=2)


def test_configuration_file_that_is_not_there(here, run):
    _check(run("--config", "other.toml", "predict"), {}, here, "--config other.toml", "no such file", code=2)


def _change_a_weight(folder):
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)


def _edit_manifest(**changes):
    def edit(folder):
        path = folder / "distill.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return edit


TEACHERS = {
    "absent": (shutil.rmtree, "--teacher t", "run `distill train-teacher` first"),
    "unfinished": (
        lambda folder: (folder / "distill.json").unlink(),
        "--teacher t",
        "run `distill train-teacher`",
    ),
    "weights changed": (_change_a_weight, "model.safetensors", "run `distill train-teacher` again"),
    "file lost": (lambda folder: (folder / "config.json").unlink(), "config.json", "again"),
    "other stage": (_edit_manifest(stage="export"), "--teacher t", "`distill train-teacher` is needed"),
    "newer schema": (_edit_manifest(schema_version=99), "schema 99", "upgrade"),
    "damaged manifest": (lambda folder: (folder / "distill.json").write_text("{"), "distill.json", "again"),
}


@pytest.mark.parametrize("kind", TEACHERS)
def test_bad_teacher(kind, here, run, chain):
    damage, place, remedy = TEACHERS[kind]
    shutil.copytree(chain.teacher, here / "t")
    damage(here / "t")
    _check(run("train-student", "--teacher", "t"), _snapshot(here), here, place, remedy)


STUDENTS = {
    "data changed": (["--data", "other.csv"], "--data other.csv", "bring the old file back"),
    "data gone": (["--data", "absent.csv"], "absent.csv", "name one, or a dataset"),
    "unknown label": (["--data", "labels.csv"], "'furious'", "train the teacher on this data"),
    "output is the teacher": (
        ["--output", "TEACHER", "--overwrite"],
        "`distill train-teacher` wrote this folder",
        "choose another",
    ),
    "too many layers": (["--layers", "5"], "--layers 5", "only 4 layers"),
    "unlabeled absent": (["--unlabeled", "absent.csv"], "absent.csv", "no such file"),
    "unlabeled empty": (["--unlabeled", "empty.csv"], "--unlabeled empty.csv", "give a file with texts"),
    "unlabeled for nothing": (["--unlabeled", "other.csv", "--alpha", "0"], "--unlabeled", "raise --alpha"),
}


@pytest.mark.parametrize("kind", STUDENTS)
def test_bad_student_option(kind, here, run, chain):
    options, place, remedy = STUDENTS[kind]
    options = [str(chain.teacher) if option == "TEACHER" else option for option in options]
    write_csv(here / "other.csv", make_rows(60, seed=9))
    write_csv(here / "labels.csv", [*make_rows(60), *[(f"very {i}", "furious") for i in range(9)]])
    write_csv(here / "empty.csv", [("",), (" ",)], ("text",))
    before = _snapshot(here)
    _check(run("train-student", "--teacher", chain.teacher, *options), before, here, place, remedy)


def test_export_without_a_student(here, run):
    _check(run("export"), {}, here, "--student runs/student", "run `distill train-student` first")


def test_export_of_a_teacher(here, run, chain):
    result = run("export", "--student", chain.teacher)
    _check(result, {}, here, "--student", "`distill train-student` is needed")


def test_report_on_stages_that_do_not_belong_together(here, run, chain):
    shutil.copytree(chain.teacher, here / "t")
    _edit_manifest(seed=7)(here / "t")
    before = _snapshot(here)
    result = run("report", "--teacher", "t", "--student", chain.student, "--export", chain.export)
    _check(result, before, here, str(chain.student), "run `distill train-student --overwrite` again")


EXPLANATIONS = {
    "no stage": (["a text"], "runs/", "first"),
    "empty text": (["good", " ", "--export", "b", "--version", "int8"], "text 2", "nothing to explain"),
    "no INT8": (["good", "--export", "plain", "--version", "int8"], "--version int8", "export --int8"),
    "data gone": (
        ["--export", "b", "--version", "int8", "--data", "absent.csv"],
        "absent.csv",
        "name one, or a dataset",
    ),
}


@pytest.mark.parametrize("kind", EXPLANATIONS)
def test_bad_explanation(kind, here, run, chain):
    options, place, remedy = EXPLANATIONS[kind]
    shutil.copytree(chain.export, here / "b")
    shutil.copytree(chain.export, here / "plain")
    manifest = json.loads((here / "plain" / "distill.json").read_text())
    table = pyarrow.parquet.read_table(here / "plain" / "predictions.parquet")
    table = table.filter(pyarrow.compute.equal(table["version"], "onnx-fp32"))
    pyarrow.parquet.write_table(table, here / "plain" / "predictions.parquet")
    manifest["details"]["files"]["cpu"] = "onnx/model.onnx"
    (here / "plain" / "distill.json").write_text(json.dumps(manifest))
    before = _snapshot(here)
    _check(run("explain", *options), before, here, place, remedy)


REPORTS = {
    "negative margin": (["--max-drop", "-1"], "--max-drop", "-1", 2),
    "precision above one": (["--target-precision", "1.5"], "--target-precision", "1.5", 2),
    "unknown method": (["--method", "anchors"], "--method", "shap", 2),
    "no teacher": (["--teacher", "absent"], "--teacher absent", "run `distill train-teacher` first", 1),
}


@pytest.mark.parametrize("kind", REPORTS)
def test_bad_report(kind, here, run, chain):
    options, place, remedy, code = REPORTS[kind]
    stages = ["--teacher", chain.teacher, "--student", chain.student, "--export", chain.export]
    _check(run("report", *stages, *options), {}, here, place, remedy, code)


PREDICTIONS = {
    "no bundle": (["in.csv"], "runs/export", "`distill export`"),
    "unknown output": (["in.csv", "--output", "o.xml"], "o.xml", "use .csv"),
    "output there": (["in.csv", "--output", "odd.csv"], "odd.csv", "add --overwrite"),
    "output is the input": (["in.csv", "--output", "in.csv", "--overwrite"], "in.csv", "name another"),
    "output is a folder": (["in.csv", "--output", "b", "--overwrite"], "--output b", "name a file"),
    "JSON in a CSV": (["in.csv", "--json", "--output", "o.csv"], "o.csv", ".jsonl"),
    "half a character": (
        ["half.jsonl", "--bundle", "b", "--output", "o.csv"],
        "half.jsonl, row 1",
        "take it out",
    ),
    "no folder": (["in.csv", "--output", "no/o.csv"], "no/o.csv", "make it first"),
    "no text column": (["odd.csv", "--bundle", "b"], "words", "--text-column"),
    "no text": (["gap.jsonl", "--bundle", "b", "--output", "o.csv"], "gap.jsonl, row 2", "no text"),
    "ragged": (["ragged.csv", "--bundle", "b", "--output", "o.csv"], "ragged.csv, line 3", "put quotes"),
    "no tokenizer": (["in.csv", "--bundle", "broken"], "tokenizer.json", "copy the whole bundle again"),
    "no model": (["in.csv", "--bundle", "hollow"], "model_quantized.onnx", "copy the whole bundle again"),
    "not a bundle": (["in.csv", "--bundle", "t"], "t: not a bundle", "run `distill export`"),
    "no CUDA": (["in.csv", "--bundle", "b", "--provider", "cuda"], "'cuda'", "onnxruntime-gpu"),
    "a folder": (["b", "--bundle", "b"], "b: a folder", "name one of its files"),
    "the format of a file": (["in.csv", "--format", "jsonl"], "--format jsonl", "a file's name says"),
    "no such single file": (["in.csv", "--bundle", "no.onnx"], "no.onnx: no such file", "`distill export`"),
    "a part of a bundle": (
        ["in.csv", "--bundle", "b/onnx"],
        "b/onnx/distill.json: no such file",
        "name its folder, b",
    ),
    "a row without the column": (
        ["other.jsonl", "--bundle", "b", "--output", "o.csv"],
        "other.jsonl, row 2",
        "no column 'text'; found txt",
    ),
    "Parquet on a pipe": (["-", "--bundle", "b", "--format", "parquet"], "--format parquet", "name the file"),
}


@pytest.mark.parametrize("kind", PREDICTIONS)
def test_bad_prediction(kind, here, run, chain, monkeypatch):
    options, place, remedy = PREDICTIONS[kind]
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    write_csv(here / "in.csv", ROWS)
    write_csv(here / "odd.csv", [("a",)], ("words",))
    (here / "gap.jsonl").write_text('{"text": "a"}\n{"text": null}\n')
    (here / "ragged.csv").write_text("text,n\na,1\nb,2,3\n")
    (here / "other.jsonl").write_text('{"text": "a"}\n{"txt": "b"}\n')
    (here / "half.jsonl").write_text('{"text": "a \\ud800"}\n')
    for name in ("b", "broken", "hollow"):
        shutil.copytree(chain.export, here / name)
    (here / "broken" / "tokenizer.json").unlink()
    (here / "hollow" / "onnx" / "model_quantized.onnx").unlink()
    shutil.copytree(chain.teacher, here / "t")
    before = _snapshot(here)
    _check(run("predict", *options), before, here, place, remedy)
