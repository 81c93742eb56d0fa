"""The scripts of benchmarks/ are run by hand; here they are at least imported."""

import importlib.util
from pathlib import Path

import pytest
from click.testing import CliRunner

SCRIPTS = sorted((Path(__file__).resolve().parents[1] / "benchmarks").glob("*.py"))


def load(path, monkeypatch):
    monkeypatch.syspath_prepend(path.parent)  # as Python does for a script
    spec = importlib.util.spec_from_file_location(f"script_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_finds_what_it_imports(path, monkeypatch):
    module = load(path, monkeypatch)
    assert module.__doc__ and "Usage: python benchmarks/" in module.__doc__


def test_pareto_begins_with_the_teacher_in_an_empty_folder(tmp_path, monkeypatch):
    pareto = load(next(path for path in SCRIPTS if path.stem == "pareto"), monkeypatch)
    monkeypatch.setattr(pareto, "RESULTS", tmp_path)
    monkeypatch.chdir(tmp_path)
    ran = []

    def fail(*arguments, **_):
        ran.append(arguments[0])
        raise RuntimeError

    monkeypatch.setattr(pareto, "_run", fail)
    CliRunner().invoke(pareto.main, [str(tmp_path), "--set", "snips", "--work", str(tmp_path / "work")])
    assert ran == ["train-teacher"]
