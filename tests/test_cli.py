import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from distill.cli import COMMANDS

SCRIPT = Path(sys.executable).with_name("distill")


def test_help_answers_within_300_milliseconds():
    commands = {"help": [SCRIPT, "--help"], "click": [sys.executable, "-c", "import click"]}
    times = {name: [] for name in commands}
    for _ in range(10):
        for name, command in commands.items():
            started = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True)
            times[name].append(time.perf_counter() - started)
    # Where other work makes Python itself slow, not much longer than it takes alone.
    assert min(times["help"]) <= max(0.3, 2 * min(times["click"]))


@pytest.mark.parametrize(("before", "after"), [(None, "passive"), ("active", "active")])
def test_threads_that_wait_are_quiet_before_torch_is_loaded(tmp_path, before, after):
    code = (
        "import os, sys, distill.cli as c\n"
        "c.cli = lambda **_: print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)\nc.main()"
    )
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    if before:
        environment["OMP_WAIT_POLICY"] = before
    shown = subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
    ).stdout
    assert shown.split() == [after, "False"]


def test_help_imports_nothing_heavy(tmp_path):
    code = "import sys, distill.cli as c\ntry: c.cli(['--help'])\nexcept SystemExit: pass\nprint(sorted(sys.modules))"
    shown = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=tmp_path
    ).stdout
    for command in COMMANDS:
        assert command in shown
    for heavy in ("torch", "transformers", "datasets", "onnxruntime", "numpy", "rich"):
        assert f"'{heavy}'" not in shown


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command, run):
    result = run(command, "--help")
    assert result.exit_code == 0
    assert COMMANDS[command][1].split()[0] in result.output


@pytest.mark.parametrize("command", ["train-teacher", "train-student", "export", "report", "predict"])
def test_every_command_shows_its_defaults(command, run):
    assert "[default: " in run(command, "--help").output


def test_options_come_from_distill_toml_and_what_is_typed_wins(tmp_path, monkeypatch, run, chain):
    monkeypatch.chdir(tmp_path)
    bundle = json.dumps(str(chain.export))
    Path("distill.toml").write_text(f"[predict]\nbundle = {bundle}\nformat = 'jsonl'\nthreads = 1\n")
    assert "prediction" in run("predict", input='{"text": "lovely"}\n').stdout
    result = run("predict", "--format", "text", input='{"text": "lovely"}\n')
    assert '"{""text"": ""lovely""}"' in result.stdout


def test_hyphens_and_underscores_both_name_an_option(tmp_path, monkeypatch, run):
    monkeypatch.chdir(tmp_path)
    Path("distill.toml").write_text("[export]\nmax-drop = 2\n")
    assert "runs/student" in run("export").stderr
    Path("distill.toml").write_text("[export]\nmax_drop = 2\n")
    assert "runs/student" in run("export").stderr


def test_a_missing_extra_is_named(monkeypatch, run, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name in ("torch", "onnxruntime"):

        def missing(name=name, **_):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

        monkeypatch.setattr("distill.export.command.export.callback", missing)
        result = run("export")
        assert result.exit_code == 1
        assert f"distill-onnx[{'cpu' if name == 'onnxruntime' else 'train'}]" in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["train-teacher", "--data", "x.csv", "--model", "x", "--output", "there"],
        ["train-student", "--teacher", "absent"],
        ["export", "--student", "absent"],
        ["report", "--output", "there"],
    ],
)
def test_a_plain_mistake_is_told_before_torch_is_loaded(arguments, tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("mine")
    code = (
        "import sys; from distill.cli import cli\n"
        f"try: cli({arguments!r})\n"
        "except SystemExit as end: print(end.code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.split() == ["1", "False"], done.stderr


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("[export]\nint8 = 1\n", "[export] int8: true or false is needed, not 1"),
        ("[export]\nint8 = 'maybe'\n", '[export] int8: true or false is needed, not "maybe"'),
        ("[export]\nmax-drop = 'a'\n", "[export] max-drop: 'a' is not a valid float."),
        ("[export]\nmax-drop = true\n", "[export] max-drop: a value is needed, not true"),
        ("[export]\nint9 = true\n", "[export] has no option 'int9'; did you mean 'int8'?"),
        ("[exprot]\nint8 = true\n", "[exprot] is not a command; did you mean 'export'?"),
        ("int8 = true\n", "'int8' stands in no table; put it under a command's, such as [train-student]"),
        ("export = 3\n", "'export' stands in no table"),
    ],
)
def test_what_distill_toml_cannot_say_is_told_in_one_line(tmp_path, monkeypatch, run, content, told):
    monkeypatch.chdir(tmp_path)
    Path("distill.toml").write_text(content)
    result = run("export")
    assert result.exit_code == 2 and f"distill.toml: {told}" in result.output.replace("\n", " ")


def test_paths_and_numbers_may_be_written_plainly(tmp_path, monkeypatch, run):
    monkeypatch.chdir(tmp_path)
    Path("distill.toml").write_text("[export]\noutput = 3\nmax-drop = 2\nint8 = false\nprovider = ['cpu']\n")
    result = run("export")
    assert result.exit_code == 1 and "runs/student" in result.output
