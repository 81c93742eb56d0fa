import csv
import json
import time
from pathlib import Path

import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from distill import tune as command
from distill import tuning
from distill.artifact import read_manifest
from distill.errors import DistillError
from distill.search_space import with_value
from distill.tuning import open_search, search

SPACE = {"rate": FloatDistribution(0.0, 1.0), "size": IntDistribution(1, 9)}
BEFORE = {"rate": 0.5, "size": 3}


def _study(tmp_path, **fixed):
    return open_search(f"sqlite:///{tmp_path}/study.db", "s", 1, BEFORE, SPACE, fixed)


def _search(opened, tmp_path, train, trials):
    return search(opened, train, tmp_path / "running", trials, None)


def test_the_first_trial_has_todays_settings_and_the_best_wins(tmp_path):
    seen = []

    def train(values, place):
        seen.append(values)
        return 1 - abs(values["rate"] - 0.8)

    found = _search(_study(tmp_path), tmp_path, train, 12)
    assert seen[0] == BEFORE and len(seen) == found.trials == 12
    assert found.before == pytest.approx(0.7) and found.improved
    assert found.score == pytest.approx(max(1 - abs(values["rate"] - 0.8) for values in seen))
    assert found.best in seen


def test_todays_settings_stand_where_nothing_is_better(tmp_path):
    found = _search(_study(tmp_path), tmp_path, lambda values, place: float(values == BEFORE), 4)
    assert not found.improved and found.best == BEFORE


def test_a_search_goes_on_where_it_stopped_and_counts_earlier_trials(tmp_path):
    calls = []
    train = lambda values, place: calls.append(values) or 0.5  # noqa: E731
    _search(_study(tmp_path), tmp_path, train, 3)
    assert _search(_study(tmp_path), tmp_path, train, 5).trials == 5
    assert _search(_study(tmp_path), tmp_path, train, 5).trials == 5
    assert len(calls) == 5 and len({json.dumps(one) for one in calls}) == 5


def test_an_interrupted_trial_is_tried_again_in_its_own_folder(tmp_path):
    places = []

    def train(values, place):
        places.append((values, place))
        if len(places) == 2:
            place.mkdir(parents=True)
            raise KeyboardInterrupt
        return 0.5

    with pytest.raises(KeyboardInterrupt):
        _search(_study(tmp_path), tmp_path, train, 3)
    assert places[1][1].is_dir()
    assert _search(_study(tmp_path), tmp_path, train, 3).trials == 3
    assert places[2] == places[1]
    assert not places[1][1].exists()


def test_a_trial_whose_worker_was_killed_is_tried_again(tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "HEARTBEAT", 1)
    study = _study(tmp_path).study
    killed = study.ask(SPACE)
    study._storage.record_heartbeat(killed._trial_id)
    time.sleep(4)  # the database counts whole seconds
    seen = []
    found = _search(_study(tmp_path), tmp_path, lambda values, place: seen.append(values) or 0.5, 3)
    assert found.trials == 3 and killed.params in seen
    assert found.before == 0.5 and not found.pending


def test_nothing_is_better_than_todays_settings_until_they_are_finished(tmp_path):
    other = _study(tmp_path).study
    todays = other.ask(SPACE)
    other._storage.record_heartbeat(todays._trial_id)
    found = _search(_study(tmp_path), tmp_path, lambda values, place: 0.5, 2)
    assert found.pending and not found.improved and found.before is None
    other.tell(todays, 0.4)
    found = _search(_study(tmp_path), tmp_path, lambda values, place: 0.5, 2)
    assert found.improved and found.before == 0.4


def test_todays_settings_of_a_lost_worker_are_tried_within_the_hours(tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "HEARTBEAT", 1)
    lost = _study(tmp_path).study
    todays = lost.ask(SPACE)
    lost._storage.record_heartbeat(todays._trial_id)
    assert _search(_study(tmp_path), tmp_path, lambda values, place: 0.5, 2).pending
    time.sleep(4)
    found = search(_study(tmp_path), lambda values, place: 0.5, tmp_path / "running", 2, 3600)
    assert not found.pending and found.before == 0.5


def test_a_poor_trial_is_stopped_and_todays_settings_never_are(tmp_path):
    from types import SimpleNamespace

    from distill.callbacks import Watch

    ended = []

    def train(values, place):
        score = 0.1 if values == BEFORE else values["rate"]
        for epoch in range(1, 28):
            Watch().on_evaluate(None, SimpleNamespace(epoch=epoch), None, {"eval_macro_f1": score})
        ended.append(values)
        return score

    found = _search(_study(tmp_path), tmp_path, train, 25)
    assert found.pruned > 0 and len(ended) + found.pruned == 25 and BEFORE in ended


def test_a_trial_that_fails_is_told_and_the_search_goes_on(tmp_path, caplog):
    calls = []

    def train(values, place):
        calls.append(values)
        if len(calls) in (2, 3, 5):
            raise RuntimeError("out of memory")
        return 0.5

    assert _search(_study(tmp_path), tmp_path, train, 4).trials == 4
    assert len(calls) == 7 and caplog.text.count("failed: out of memory") == 3


def test_a_search_that_cannot_succeed_ends(tmp_path):
    def train(values, place):
        raise RuntimeError("broken")

    with pytest.raises(DistillError, match="3 trials in a row have failed, the last one: broken"):
        _search(_study(tmp_path), tmp_path, train, 20)


def test_wrong_options_end_the_search_and_wrong_values_only_their_trial(tmp_path):
    def refuses(values, place):
        raise DistillError("--data nope.csv: no such file")

    with pytest.raises(DistillError, match="no such file"):
        _search(_study(tmp_path, data="nope.csv"), tmp_path, refuses, 3)

    calls = []

    def train(values, place):
        calls.append(values)
        if len(calls) == 2:
            raise DistillError("--layers 99: too many")
        return 0.5

    # What went wrong before anything was finished binds nobody, and today's settings come first again.
    found = _search(_study(tmp_path, data="d.csv"), tmp_path, train, 3)
    assert calls[0] == BEFORE and found.trials == 3 and found.before == 0.5


def test_two_workers_have_folders_of_their_own_even_with_the_same_values(tmp_path):
    places = []

    def outer(values, place):
        place.mkdir(parents=True)
        places.append(place)
        if len(places) == 1:
            _search(_study(tmp_path), tmp_path, lambda values, inner: places.append(inner) or 0.1, 1)
        assert place.is_dir()
        return 0.5

    _search(_study(tmp_path), tmp_path, outer, 3)
    assert len(set(places)) == len(places)


def test_values_that_have_been_tried_are_not_trained_with_again(tmp_path):
    space, calls = {"size": CategoricalDistribution([1, 2, 3])}, []
    opened = open_search(f"sqlite:///{tmp_path}/study.db", "s", 1, {"size": 3}, space, {})
    found = _search(opened, tmp_path, lambda values, place: calls.append(values["size"]) or 0.1, 12)
    assert sorted(calls) == [1, 2, 3] and found.trials == 12


def test_a_search_goes_on_in_its_own_space_when_todays_settings_have_changed(tmp_path):
    url, space = f"sqlite:///{tmp_path}/study.db", {"size": CategoricalDistribution([8, 16])}
    train = lambda values, place: values["size"] / 100  # noqa: E731
    first = open_search(url, "s", 1, {"size": 32}, {"size": with_value(space["size"], 32)}, {})
    assert _search(first, tmp_path, train, 3).best == {"size": 32}
    again = open_search(url, "s", 1, {"size": 16}, space, {})
    assert _search(again, tmp_path, train, 6).before == 0.32


def test_a_worker_with_other_options_is_refused(tmp_path):
    _search(_study(tmp_path, data="a.csv", batch_size=8), tmp_path, lambda values, place: 0.5, 1)
    with pytest.raises(DistillError, match=r"the study s has batch-size 8, and now it is 16"):
        _study(tmp_path, data="a.csv", batch_size=16)


def test_a_storage_that_cannot_be_opened_is_one_line(tmp_path):
    with pytest.raises(DistillError, match="--storage: the database cannot be opened"):
        open_search(f"sqlite:///{tmp_path}/none/study.db", "s", 1, BEFORE, SPACE, {})
    with pytest.raises(DistillError) as error:
        open_search("postgresql://me:secret@nowhere/x", "s", 1, BEFORE, SPACE, {})
    assert "secret" not in str(error.value)


def test_the_rest_of_distill_toml_stays_as_it_is(tmp_path):
    path = tmp_path / "distill.toml"
    path.write_text(
        "# ours\n[train-student]\nlayers = 3  # enough\nlearning_rate = 1e-4\n\n[export]\nint8 = true\n"
    )
    command.write_options(path, "train-student", {"learning_rate": 3e-4, "batch_size": 16})
    assert path.read_text() == (
        "# ours\n[train-student]\nlayers = 3  # enough\nlearning_rate = 0.0003\nbatch-size = 16\n\n[export]\nint8 = true\n"
    )


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_what_cannot_be_searched_is_refused_in_one_line(run, here, chain):
    base = ("tune", "train-student", "--teacher", str(chain.teacher))
    for more, reason in {
        ("--search", "layer=2,3"): "--search layer=2,3: give an option of train-student",
        ("--search", "layers=2,x"): "'x' is not a valid integer",
        ("--search", "layers=2..3", "--layers", "2"): "--layers is given too",
        ("--speedup", "100"): "give --layers",
    }.items():
        result = run(*base, *more)
        assert result.exit_code == 1 and reason in result.stderr, result.stderr
    assert not Path("runs").exists()


@pytest.mark.slow
def test_a_teacher_is_tuned_on_validation_alone_and_train_teacher_takes_what_was_found(
    run, here, data_file, checkpoint, monkeypatch
):
    from distill.teacher import training

    Path("distill.toml").write_text(
        '[train-teacher]\nlearning-rate = 1e-6\nprecision = "fp32"\n[tune]\ntrials = 3\n'
    )
    monkeypatch.setattr(training, "predict_logits", None)  # would be called for the test split
    base = ("--data", str(data_file), "--model", str(checkpoint), "--epochs", "2")
    search = ("--search", "learning-rate=1e-3..5e-3", "--search", "batch-size=8,16")
    result = run("tune", "train-teacher", *base, *search, "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["trials"] == 3 and found["improved"] and "epochs" not in found["best"]
    rows = list(csv.DictReader(Path("runs/tune/train-teacher/trials.csv").read_text().splitlines()))
    assert float(rows[0]["learning-rate"]) == 1e-6 and len(rows) == 3
    assert "history.svg" in Path("runs/tune/train-teacher/report.md").read_text()
    assert not Path("runs/tune/train-teacher/running").exists() or not any(
        Path("runs/tune/train-teacher/running").iterdir()
    )
    monkeypatch.undo()
    monkeypatch.chdir(here)
    result = run("train-teacher", *base)
    assert result.exit_code == 0, result.stderr
    manifest = read_manifest(Path("runs/teacher"), "train-teacher")
    assert manifest.options["learning_rate"] == pytest.approx(found["best"]["learning_rate"])
    assert manifest.options["batch_size"] == found["best"]["batch_size"]
    assert manifest.metrics["validation"]["macro_f1"] == pytest.approx(found["score"], abs=1e-6)


@pytest.mark.parametrize(
    ("settings", "steps"), [("", 200), ("epochs = 3\n", 0), ("epochs = 3\nmin-steps = 50\n", 50)]
)
def test_trials_have_the_least_number_of_steps_of_today_and_distill_toml_gets_it(
    run, here, data_file, monkeypatch, settings, steps
):
    seen = []

    def train(**options):
        seen.append(options)
        return len(seen) / 10

    monkeypatch.setattr("distill.teacher.training.tune_teacher", train)
    Path("distill.toml").write_text(f"[train-teacher]\n{settings}")
    command = ("tune", "train-teacher", "--data", str(data_file), "--model", "m", "--trials", "3")
    result = run(*command)
    assert result.exit_code == 0, result.stderr
    assert seen[0]["epochs"] == 3 and [one["min_steps"] for one in seen] == [steps] * 3
    written = Path("distill.toml").read_text()
    assert "epochs = " in written and (f"min-steps = {steps}" in written) == bool(steps)
    result = run(*command[:-1], "4")  # goes on: what was written is the same for its trials
    assert result.exit_code == 0, result.stderr
    assert seen[-1]["min_steps"] == steps and len(seen) == 4
    if steps:  # what is typed is as good as what is written
        assert f"| min-steps | {steps} |" in Path("runs/tune/train-teacher/report.md").read_text()
        result = run(*command, "--min-steps", "0", "--output", "other")
        assert result.exit_code == 0 and seen[-1]["min_steps"] == 0, result.stderr
        assert "min-steps = 0" in Path("distill.toml").read_text()


@pytest.mark.slow
def test_a_student_is_tuned(run, here, chain):
    result = run(
        "tune", "train-student", "--teacher", str(chain.teacher), "--student", str(chain.checkpoint),
        "--trials", "2", "--max-steps", "4", "--search", "layers=1,2", "--precision", "fp32",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    # The first trial leaves out --layers, as today.
    assert "trials" in result.stdout and "nothing to hold it against" not in result.stdout
    assert "macro_f1" in Path("runs/tune/train-student/trials.csv").read_text()
    assert "temperature" in Path("runs/tune/train-student/trials.csv").read_text()


@pytest.mark.slow
def test_a_search_over_data_that_has_changed_is_refused(run, here, chain):
    Path("d.csv").write_text(chain.data.read_text())
    base = (
        "tune",
        "train-teacher",
        "--data",
        "d.csv",
        "--model",
        str(chain.checkpoint),
        "--trials",
        "1",
        "--max-steps",
        "1",
    )
    assert run(*base).exit_code == 0
    Path("d.csv").write_text(chain.data.read_text() + "one more lovely phone,positive\n")
    result = run(*base)
    assert result.exit_code == 1 and "has content of data" in result.stderr


def test_a_database_that_another_worker_is_making_is_opened_once_it_is_there(tmp_path, monkeypatch):
    from optuna import storages
    from sqlalchemy.exc import IntegrityError

    opening, attempts = storages.RDBStorage.__init__, []

    def while_tables_are_made(self, *args, **kwargs):
        attempts.append(1)
        if len(attempts) == 1:
            raise IntegrityError("INSERT INTO alembic_version", {}, Exception("UNIQUE constraint failed"))
        opening(self, *args, **kwargs)

    monkeypatch.setattr(storages.RDBStorage, "__init__", while_tables_are_made)
    monkeypatch.setattr("distill.tuning.time.sleep", lambda seconds: None)
    assert _study(tmp_path).study.trials and len(attempts) == 2
