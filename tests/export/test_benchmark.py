import json

import numpy as np
import pytest
from distill.export import benchmark
from distill.export.benchmark import (
    BenchmarkOptions,
    Subject,
    measure_rounds,
    run_benchmark,
    told_apart,
)
from distill.export.benchmark_rendering import render
from distill.export.cold_start import cold_start

from distill import DistillError
from distill.artifact import read_manifest


class Clock:
    """Stands for the module `time`; only work takes any of it."""

    now = 0.0

    def perf_counter(self):
        return self.now

    def work(self, seconds):
        self.now += seconds


@pytest.fixture
def fast(monkeypatch):
    """Versions of a known speed, and no processes."""
    clock = Clock()

    def opened(self, labels, threads):
        pause = {"teacher": 0.004, "student": 0.002}.get(self.name, 0.0005)
        return (lambda text: clock.work(pause)), (lambda texts: clock.work(pause * len(texts) / 2))

    monkeypatch.setattr(benchmark, "time", clock)
    monkeypatch.setattr(Subject, "open", opened)
    started = []

    def cold_start(folder, file, provider, texts):
        started.append(folder / file)
        return [9.0, 3.5, 4.5, 4.0][started.count(folder / file) - 1], 100.0

    monkeypatch.setattr(benchmark, "cold_start", cold_start)
    return started


def _options(chain, tmp_path, **changes):
    folders = {"export": chain.export, "teacher": chain.teacher, "student": chain.student}
    return BenchmarkOptions(**{**folders, "output": tmp_path / "b", "texts": 12, "rounds": 6, **changes})


def test_every_version_is_measured_and_published(chain, tmp_path, fast):
    result = run_benchmark(_options(chain, tmp_path))
    rows = {row["version"]: row for row in result["versions"]}
    assert list(rows) == ["teacher", "student", "onnx-fp32", "int8"]
    assert rows["teacher"]["speedup"]["median"] == 1
    assert rows["student"]["speedup"] == pytest.approx({"median": 2, "low": 2, "high": 2})
    assert rows["teacher"]["latency_ms"]["p50"] == pytest.approx(4)
    assert rows["teacher"]["texts_per_second"]["median"] == pytest.approx(500)
    assert rows["int8"]["bytes"] == (chain.export / "onnx" / "model_quantized.onnx").stat().st_size
    # A first process is not counted, and the versions take turns.
    assert rows["int8"]["cold_start_s"] == {"median": 4.0, "low": 3.5, "high": 4.5}
    assert rows["int8"]["peak_memory_mb"] == {"median": 100, "low": 100, "high": 100}
    turns = [fast[start : start + 4] for start in range(0, 16, 4)]
    assert len(fast) == 16 and all(len(set(turn)) == 4 for turn in turns)
    assert turns[0] == turns[1][::-1] == turns[2]
    assert json.loads((tmp_path / "b" / "benchmark.json").read_text()) == result
    assert (tmp_path / "b" / "benchmark.svg").read_text().startswith("<?xml")
    table = (tmp_path / "b" / "benchmark.txt").read_text()
    assert table == render(result) and "12 texts, 6 rounds" in table


def test_versions_of_the_same_speed_are_said_to_be_so(chain, tmp_path, fast, monkeypatch):
    times = iter(np.tile([1.0, 2.0, 2.0, 1.0], 3))

    def equal(runs, texts, rounds):
        found = {name: (np.full((rounds, len(texts)), 5.0), np.ones(rounds)) for name in runs}
        for name in ("onnx-fp32", "int8"):
            found[name] = (np.array([[next(times)] * len(texts) for _ in range(rounds)]), np.ones(rounds))
        return found

    monkeypatch.setattr(benchmark, "measure_rounds", equal)
    result = run_benchmark(_options(chain, tmp_path))
    equal = {name: sorted(map(sorted, pairs)) for name, pairs in result["not_told_apart"].items()}
    assert equal["latency"] == [["int8", "onnx-fp32"], ["student", "teacher"]]
    assert len(equal["texts_per_second"]) == 3
    for what in ("latency", "texts/s"):
        assert f"cannot be told apart by {what}: neither was faster in every round" in render(result)


def test_what_ran_on_the_cpu_beside_cuda_is_said(chain, tmp_path, fast):
    result = run_benchmark(_options(chain, tmp_path))
    assert "On the CPU" not in render(result)
    for row in result["versions"][2:]:
        row["runs_on"] = "cuda"
    assert "On the CPU, in PyTorch: teacher, student; the others on CUDA." in render(result)


def test_two_versions_differ_only_if_one_is_faster_in_every_round():
    slow = np.array([2.0, 2.1, 1.9, 2.0, 2.2, 2.0])
    assert told_apart(slow, slow - 0.1) and told_apart(slow - 0.1, slow)
    assert not told_apart(slow, slow - np.array([0.1, 0.1, -0.1, 0.1, 0.1, 0.1]))
    assert not told_apart(slow, slow)


def test_versions_take_turns_and_each_is_first_at_times():
    order = []
    runs = {name: ((lambda text, name=name: order.append(name)), (lambda texts: None)) for name in "abc"}
    measured = measure_rounds(runs, ["x"], 6)
    rounds = [order[3 + 3 * n : 6 + 3 * n] for n in range(6)]  # after the warm-up
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds)
    assert {one[0] for one in rounds} == {"a", "b", "c"} and len({tuple(one) for one in rounds}) >= 4
    assert measured["a"][0].shape == (6, 1) and measured["a"][1].shape == (6,)


def test_without_teacher_and_student_the_bundle_is_measured_alone(chain, tmp_path, fast, caplog):
    caplog.set_level("INFO", logger="distill")
    options = _options(chain, tmp_path, teacher=tmp_path / "none", student=tmp_path / "none")
    assert [subject.name for subject in benchmark.subjects(options)] == ["onnx-fp32", "int8"]
    assert caplog.messages == [f"No folder {tmp_path / 'none'}: student and teacher are left out"]
    assert [row["version"] for row in run_benchmark(options)["versions"]] == ["onnx-fp32", "int8"]


def test_own_texts_are_taken_from_a_file(chain, tmp_path, fast):
    (tmp_path / "own.csv").write_text("id,review\n1,lovely\n2,awful\n")
    options = _options(chain, tmp_path, source=tmp_path / "own.csv")
    assert run_benchmark(options)["texts"] == 2


def test_data_that_has_moved_can_be_replaced_by_a_file_of_texts(chain, tmp_path):
    bundle = read_manifest(chain.export, "export")
    before = bundle.data["source"]
    for local in (True, False):
        bundle.data |= {"source": str(tmp_path / "gone.csv"), "local": local}
        with pytest.raises(
            DistillError, match=r"^/.*gone\.csv: .*, or was read in another folder, name a file with texts\)$"
        ):
            benchmark._texts(_options(chain, tmp_path), bundle)
    bundle.data |= {"source": before, "fingerprint": "other"}
    with pytest.raises(
        DistillError, match=r"^/.*its rows are not those.*; bring .* back, name a file with texts"
    ):
        benchmark._texts(_options(chain, tmp_path), bundle)


def test_a_provider_that_cannot_be_used_ends_it_before_anything_is_measured(chain, tmp_path, monkeypatch):
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    monkeypatch.setattr(benchmark, "_texts", lambda *_: pytest.fail("went on"))
    with pytest.raises(DistillError, match="provider 'cuda': this onnxruntime has only CPU"):
        run_benchmark(_options(chain, tmp_path, provider="cuda"))


@pytest.mark.slow
def test_cold_start_and_memory_come_from_a_process_of_its_own(chain):
    seconds, megabytes = cold_start(chain.export, "onnx/model_quantized.onnx", "cpu", ["lovely", "bad"])
    assert 0.05 < seconds < 20 and 30 < megabytes < 1000
    with pytest.raises(
        DistillError,
        match=r"none\.onnx: could not be run in a process of its own: [^:]*none\.onnx: not a file of",
    ):
        cold_start(chain.export, "onnx/none.onnx", "cpu", ["lovely"])
    seconds, megabytes = cold_start(chain.student, "model.safetensors", "pytorch", ["lovely", ("a", "b")])
    assert 0.5 < seconds < 60 and 100 < megabytes < 3000


@pytest.mark.slow
def test_a_process_starts_from_bytecode_whatever_the_environment_says(chain, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    monkeypatch.setenv("PYTHONPYCACHEPREFIX", str(tmp_path))
    cold_start(chain.export, "onnx/model_quantized.onnx", "cpu", ["lovely"])
    assert list(tmp_path.rglob("onnxruntime/**/*.pyc"))


@pytest.mark.slow
def test_the_command_prints_the_table(chain, tmp_path, run):
    arguments = ["--export", chain.export, "--teacher", tmp_path / "none", "--student", tmp_path / "none"]
    result = run("benchmark", *arguments, "--texts", 3, "--rounds", 6, "--output", tmp_path / "b")
    assert result.exit_code == 0, result.output
    assert "version" in result.stdout and "int8" in result.stdout and "benchmark.svg" in result.stdout
    again = run("benchmark", *arguments, "--output", tmp_path / "b")
    assert again.exit_code == 1 and "--overwrite" in again.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["none.csv"], ["none.csv", "no such file"]),
        (["--export", "none"], ["--export none", "distill export"]),
        (["empty.csv"], ["empty.csv", "no text"]),
        (["odd.csv"], ["odd.csv", "--text-column"]),
    ],
)
def test_bad_input_is_one_line(chain, tmp_path, run, arguments, words, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.csv").write_text("text\n")
    (tmp_path / "odd.csv").write_text("a,b\n1,2\n")
    if "--export" not in arguments:
        arguments = [*arguments, "--export", chain.export]
    result = run("benchmark", *arguments)
    assert result.exit_code == 1, result.output
    last = result.output.strip().splitlines()[-1]
    assert all(word in last.lower() for word in words), last
