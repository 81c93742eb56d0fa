"""The shape that a speed allows."""

from dataclasses import replace

import pytest
import torch
import transformers
from conftest import make_configs
from distill.student import building, training
from distill.student.heads import keep_heads
from distill.student.neurons import keep_neurons
from distill.student.options import StudentOptions
from distill.student.shape import Goal, Shape, _largest, shapes

from distill import DistillError, train_student
from distill.models import load_model

WHOLE = [Shape(layers) for layers in range(7)]
SOME = WHOLE[1:]


@pytest.mark.parametrize(("speedup", "layers"), [(40, 6), (41, 5), (80, 3), (121, 1)])
def test_the_largest_student_that_is_fast_enough_is_found(speedup, layers):
    tried = []

    def time_of(shape):
        tried.append(shape)
        return 60.0, 0.25 * shape.layers

    assert _largest(SOME, time_of, Goal(speedup=speedup)) == Shape(layers)
    assert len(tried) <= 3


def test_a_goal_out_of_reach_is_refused_with_what_is_in_reach():
    with pytest.raises(DistillError, match="--speedup 400: with one layer this student is 300 times as fast"):
        _largest(SOME, lambda shape: (60.0, 0.2 * shape.layers), Goal(speedup=400))
    with pytest.raises(
        DistillError, match="--latency-budget 0.1ms: with one layer a text takes 0.20 ms; allow 0.20ms"
    ):
        _largest(SOME, lambda shape: (None, 0.2 * shape.layers), Goal(milliseconds=0.1))
    with pytest.raises(
        DistillError, match="--latency-budget 0.01ms: without layers a text takes 0.05 ms; allow 0.05ms"
    ):
        _largest(WHOLE, lambda shape: (None, 0.05 + 0.2 * shape.layers), Goal(milliseconds=0.01))


def test_narrower_layers_are_no_advice_to_a_student_without():
    for first, said in ((Shape(0), False), (Shape(1), True)):
        with pytest.raises(DistillError) as error:
            _largest([first, Shape(3, 6, 2)], lambda shape: (60.0, 1.0), Goal(speedup=400))
        assert ("--intermediate-size" in str(error.value)) is said


def test_no_layers_are_the_last_resort():
    assert _largest(WHOLE, lambda shape: (60.0, 0.05 + 0.2 * shape.layers), Goal(speedup=400)) == Shape(0)
    assert _largest(WHOLE, lambda shape: (60.0, 0.05 + 0.2 * shape.layers), Goal(speedup=200)) == Shape(1)


def _build(model):
    """Makes a shape, but for its layers."""

    def build(shape):
        built = keep_neurons(model, shape.neurons, [], None) if shape.neurons else model
        return keep_heads(built, shape.heads, [], None) if shape.heads else built

    return build


def _shapes(name, monkeypatch, **how):
    model = transformers.AutoModelForSequenceClassification.from_config(make_configs(layers=6)[name])
    for module in ("neurons", "heads"):
        monkeypatch.setattr(
            f"distill.student.{module}.activation_norms",
            lambda model, modules, *_: [torch.ones(module.in_features) for module in modules],
        )
    asked = how.pop("asked", Shape())
    return [(one.layers, one.neurons, one.heads) for one in shapes(model, asked, _build(model), **how)]


def test_narrow_layers_come_between_few_and_many(monkeypatch):
    narrow = [(layers, 6, 2) for layers in range(2, 7)]
    whole = [(layers, None, None) for layers in range(7)]
    assert _shapes("bert", monkeypatch) == [whole[0], *narrow[1:], *whole[3:]]
    assert _shapes("bert", monkeypatch, layerless=False) == [whole[1], *narrow, *whole[3:]]
    # Export leaves no heads out where it cannot fuse attention.
    assert _shapes("mpnet", monkeypatch) == [whole[0], *whole[2:]]
    assert _shapes("mpnet", monkeypatch, layerless=False) == whole[1:]


def test_what_is_asked_for_is_kept(monkeypatch):
    assert _shapes("bert", monkeypatch, asked=Shape(heads=3)) == [(n, None, 3) for n in range(1, 7)]


def test_a_checkpoint_that_cannot_be_narrowed_keeps_whole_layers():
    config = transformers.BertConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=32
    )
    model = transformers.AutoModelForSequenceClassification.from_config(config)
    assert shapes(model, Shape(), _build(model)) == [WHOLE[0], *WHOLE[2:4]]


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
    from distill.student.shape import choose_shape
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(checkpoint, num_hidden_layers=1)
    pairs = [("a question", "an answer")]
    goal = Goal(milliseconds=1e6)
    assert choose_shape(
        lambda shape: model, [Shape(1)], make_tokenizer(), ["no", "yes"], pairs, goal, tmp_path
    ) == Shape(1)


def test_a_narrow_shape_is_built_and_goes_on_as_such(chain, tmp_path, monkeypatch):
    options = StudentOptions(
        teacher=chain.teacher,
        student=str(chain.checkpoint),
        output=tmp_path / "s",
        latency_budget=1e6,
        max_steps=2,
    )
    monkeypatch.setattr(building, "choose_shape", lambda *rest: Shape(2, 16, 3))
    monkeypatch.setattr(training, "publish", lambda *rest: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train_student(options)
    monkeypatch.undo()
    monkeypatch.setattr(building, "choose_shape", lambda *rest: 1 / 0)
    manifest = train_student(replace(options, resume=True))
    assert [manifest.details[name] for name in ("layers", "neurons", "heads")] == [2, 16, 3]
    layers = load_model(str(tmp_path / "s"), manifest.labels).bert.encoder.layer
    assert [layer.intermediate.dense.out_features for layer in layers] == [16, 16]
    for layer in layers:
        by_head = layer.attention.self.value.weight.detach().unflatten(0, (4, -1))
        assert by_head.any(dim=(1, 2)).sum() == 3


def test_a_student_without_layers_has_no_heads_to_keep(chain, run, tmp_path):
    done = _train(run, chain, tmp_path, "--layers", 0, "--overwrite")
    assert done.exit_code == 0, done.output
    done = run(
        "train-student", "--teacher", chain.teacher, "--student", tmp_path / "student", "--latency-budget", 9,
        "--attention-heads", 5, "--output", tmp_path / "other",
    )  # fmt: skip
    assert done.exit_code == 1
    assert "--attention-heads 5: the student's checkpoint has no layers; leave it out" in done.output


def test_a_checkpoint_that_does_not_say_how_many_layers_it_has_is_kept_whole(chain, tmp_path, monkeypatch):
    monkeypatch.setattr(building, "depth", lambda model: 0)
    monkeypatch.setattr(building, "average_tokens", lambda *rest: 1 / 0)
    options = StudentOptions(
        teacher=chain.teacher, student=str(chain.checkpoint), output=tmp_path / "s", max_steps=1
    )
    train_student(options)
    assert load_model(str(tmp_path / "s"), ["no", "yes"]).config.num_hidden_layers == 4
