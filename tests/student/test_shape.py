"""The number of layers that a speed allows."""

import pytest
from distill.student.shape import Goal, _most

from distill import DistillError


@pytest.mark.parametrize(("speedup", "layers"), [(40, 6), (41, 5), (80, 3), (121, 1)])
def test_the_deepest_student_that_is_fast_enough_is_found(speedup, layers):
    tried = []

    def time_of(layers):
        tried.append(layers)
        return 60.0, 0.25 * layers

    assert _most(range(1, 7), time_of, Goal(speedup=speedup)) == layers
    assert len(tried) <= 3


def test_a_goal_out_of_reach_is_refused_with_what_is_in_reach():
    with pytest.raises(DistillError, match="--speedup 400: with one layer this student is 300 times as fast"):
        _most(range(1, 7), lambda layers: (60.0, 0.2 * layers), Goal(speedup=400))
    with pytest.raises(
        DistillError, match="--latency-budget 0.1ms: with one layer a text takes 0.20 ms; allow 0.20ms"
    ):
        _most(range(1, 7), lambda layers: (None, 0.2 * layers), Goal(milliseconds=0.1))
    with pytest.raises(
        DistillError, match="--latency-budget 0.01ms: without layers a text takes 0.05 ms; allow 0.05ms"
    ):
        _most(range(7), lambda layers: (None, 0.05 + 0.2 * layers), Goal(milliseconds=0.01))


def test_no_layers_are_the_last_resort():
    assert _most(range(7), lambda layers: (60.0, 0.05 + 0.2 * layers), Goal(speedup=400)) == 0
    assert _most(range(7), lambda layers: (60.0, 0.05 + 0.2 * layers), Goal(speedup=200)) == 1


def _train(run, chain, tmp_path, *options):
    where = ("--teacher", chain.teacher, "--student", chain.checkpoint, "--output", tmp_path / "student")
    return run("train-student", *where, "--max-steps", 1, "--json", *options)


@pytest.mark.parametrize("options", [("--speedup", 0.01), ("--latency-budget", "1000ms")])
def test_a_goal_that_all_layers_meet_keeps_them(run, chain, tmp_path, options):
    import json

    done = _train(run, chain, tmp_path, *options)
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "student" / "distill.json").read_text())["details"]["layers"] == 4


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (("--speedup", 1e9), "--speedup 1e+09: without layers this student is"),
        (("--layers", 1, "--speedup", 2), "--speedup: chooses the number of layers, as --layers does"),
        (
            ("--latency-budget", 1, "--speedup", 2),
            "--latency-budget: chooses the number of layers, as --speedup",
        ),
    ],
)
def test_a_goal_that_cannot_be_met_is_one_line_and_leaves_nothing(run, chain, tmp_path, options, line):
    done = _train(run, chain, tmp_path, *options)
    assert done.exit_code == 1
    assert line in done.output and "Traceback" not in done.output
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("wrong", ["fast", "-1ms", "0", "inf"])
def test_a_budget_is_a_time(run, chain, tmp_path, wrong):
    done = _train(run, chain, tmp_path, f"--latency-budget={wrong}")
    assert done.exit_code == 2
    assert "is not a time above 0 in milliseconds; give one as 0.5ms" in done.output


def test_a_pair_is_timed_as_one_text(checkpoint, tmp_path):
    from conftest import make_tokenizer
    from distill.student.shape import choose_layers
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(checkpoint, num_hidden_layers=1)
    pairs = [("a question", "an answer")]
    goal = Goal(milliseconds=1e6)
    assert (
        choose_layers(
            lambda layers: model, range(1, 2), make_tokenizer(), ["no", "yes"], pairs, goal, tmp_path
        )
        == 1
    )
