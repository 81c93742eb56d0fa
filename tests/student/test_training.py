import numpy as np
import pytest
import torch
from conftest import make_rows, write_csv
from distill.student import soft_labels
from distill.student import training as student_training
from distill.student.command import train_student as command
from distill.student.losses import distillation_loss
from distill.student.options import StudentOptions
from distill.student.soft_labels import teacher_logits
from distill.student.training import train_student
from transformers import BertConfig, BertModel, BertTokenizerFast

from distill.artifact import read_manifest
from distill.calibration import fit_temperature
from distill.callbacks import ProgressCallback
from distill.data import load_data
from distill.models import load_model
from distill.predictions import read_predictions
from distill.training import predict_logits


def _options(chain, output, **changes):
    common = {"max_steps": 4, "learning_rate": 3e-3, "precision": "fp32", "batch_size": 16}
    return StudentOptions(output=output, teacher=chain.teacher, **{**common, **changes})


@pytest.fixture
def teacher_calls(monkeypatch):
    """How many texts the teacher has been run on."""
    calls = []

    def counted(model, tokenizer, dataset, device, precision):
        calls.append(len(dataset))
        return predict_logits(model, tokenizer, dataset, device, precision)

    monkeypatch.setattr(soft_labels, "predict_logits", counted)
    return calls


def test_logits_belong_to_their_rows_and_are_computed_once(chain, tmp_path, teacher_calls):
    import shutil

    shutil.copytree(chain.teacher, tmp_path / "teacher")
    manifest = read_manifest(chain.teacher, "train-teacher")
    texts = load_data(str(chain.data), quiet=True).splits["train"].remove_columns("label")
    some = texts.select([5, 3, 5, 80, 3])
    found = teacher_logits(tmp_path / "teacher", manifest, some, "cpu", "fp32")
    model, tokenizer = (
        load_model(str(chain.teacher), manifest.labels),
        BertTokenizerFast.from_pretrained(chain.teacher),
    )
    for row, text in zip(found, some["text"], strict=True):
        with torch.no_grad():
            expected = model(**tokenizer(text, return_tensors="pt")).logits[0].numpy()
        np.testing.assert_allclose(row, expected, atol=1e-4)
    assert teacher_calls == [3]
    again = teacher_logits(tmp_path / "teacher", manifest, texts.select(range(10)), "cpu", "fp32")
    assert teacher_calls == [3, 8]  # rows 3 and 5 were known
    np.testing.assert_array_equal(again[[5, 3]], found[[0, 1]])


def test_the_teacher_runs_before_training_never_during_it_and_never_twice(
    chain, tmp_path, teacher_calls, monkeypatch
):
    write_csv(tmp_path / "more.csv", [(text,) for text, _ in make_rows(30, seed=5)], ("text",))
    before_training = []
    fit = student_training.fit

    def watched(*args, **kwargs):
        before_training.append(list(teacher_calls))
        with monkeypatch.context() as patch:
            patch.setattr(soft_labels, "load_model", None)
            trained = fit(*args, **kwargs)
        assert teacher_calls == before_training[-1]
        return trained

    monkeypatch.setattr(student_training, "fit", watched)
    options = {"unlabeled": str(tmp_path / "more.csv"), "layers": 1}
    manifest = train_student(_options(chain, tmp_path / "first", **options))
    assert sum(teacher_calls) == 30  # the labelled texts are known since the chain's own student
    assert manifest.data["unlabeled"] == 30
    train_student(_options(chain, tmp_path / "second", **options))
    assert sum(teacher_calls) == 30


def test_without_options_the_student_is_half_of_the_teachers_base_checkpoint(chain, tmp_path):
    manifest = train_student(_options(chain, tmp_path / "student", max_steps=1))
    assert manifest.details["layers"] == 2
    student = load_model(str(tmp_path / "student"), manifest.labels)
    base = BertModel.from_pretrained(chain.checkpoint)
    torch.testing.assert_close(
        student.bert.embeddings.position_embeddings.weight, base.embeddings.position_embeddings.weight,
        atol=0.01, rtol=0,
    )  # fmt: skip


def test_a_student_may_start_from_the_teachers_own_layers(chain, tmp_path):
    manifest = train_student(_options(chain, tmp_path / "student", student=str(chain.teacher), layers=3))
    assert manifest.details["layers"] == 3


def test_teacher_and_student_may_have_different_tokenizers(chain, tmp_path):
    words = sorted({word for text, _ in make_rows(300) for word in text.split()}, reverse=True)
    (tmp_path / "vocab.txt").write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words[::2]])
    )
    tokenizer = BertTokenizerFast(str(tmp_path / "vocab.txt"), model_max_length=32)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
    )  # fmt: skip
    BertModel(config).save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    manifest = train_student(_options(chain, tmp_path / "student", student=str(tmp_path / "other")))
    assert manifest.details["layers"] == 1
    assert manifest.max_length == 32


def test_unlabelled_texts_that_test_or_validation_hold_are_dropped(chain, tmp_path):
    splits = load_data(str(chain.data), quiet=True).splits
    rows = [(splits["test"]["text"][0],), (splits["validation"]["text"][0],), ("a text of its own",)]
    write_csv(tmp_path / "more.csv", rows, ("text",))
    manifest = train_student(
        _options(chain, tmp_path / "s", unlabeled=str(tmp_path / "more.csv"), max_steps=1)
    )
    assert manifest.data["unlabeled"] == 1


def test_the_student_names_its_teacher_and_its_predictions_are_the_teachers_texts(chain):
    from distill.artifact import manifest_hash
    from distill.predictions import read_predictions

    manifest = read_manifest(chain.student, "train-student")
    assert manifest.parents == [{"path": str(chain.teacher), "manifest_sha256": manifest_hash(chain.teacher)}]
    teacher, student = read_predictions(chain.teacher, "test"), read_predictions(chain.student, "test")
    assert teacher["teacher"].ids == student["student"].ids


def test_a_student_learns_from_the_probabilities_that_the_teacher_should_have_given(
    chain, tmp_path, monkeypatch
):
    answers = read_predictions(chain.teacher, "validation")["teacher"]
    temperature = fit_temperature(answers.logits, answers.labels)
    seen = []

    def watched(model, tokenizer, train, *rest):
        seen.append(np.asarray(train["teacher_logits"]))
        return fit(model, tokenizer, train, *rest)

    fit = student_training.fit
    monkeypatch.setattr(student_training, "fit", watched)
    manifest = train_student(_options(chain, tmp_path / "s", layers=1))
    assert manifest.details["teacher_temperature"] == pytest.approx(temperature)
    teacher = read_manifest(chain.teacher, "train-teacher")
    texts = load_data(str(chain.data), quiet=True).splits["train"].remove_columns("label")
    raw = teacher_logits(chain.teacher, teacher, texts, "cpu", "fp32")
    np.testing.assert_allclose(seen[0], raw / temperature, rtol=1e-5)


@pytest.mark.parametrize(("alpha", "measure"), [(0.9, "loss"), (0.0, "macro_f1")])
def test_the_best_weights_are_those_of_the_lowest_loss_or_without_a_teacher_of_the_best_score(
    chain, tmp_path, monkeypatch, alpha, measure
):
    seen = []

    def evaluated(self, args, state, control, metrics=None, **kwargs):
        seen.append({name: metrics[f"eval_{name}"] for name in ("loss", "macro_f1")})

    monkeypatch.setattr(ProgressCallback, "on_evaluate", evaluated)
    options = _options(chain, tmp_path / "s", max_steps=-1, epochs=4, learning_rate=2e-2, alpha=alpha)
    fitted = student_training._fit(options)
    sign = -1 if measure == "loss" else 1
    best = max(seen, key=lambda one: sign * one[measure])
    assert fitted.trained.score == best["macro_f1"]
    if measure == "loss":
        teacher = torch.from_numpy(read_predictions(chain.teacher, "validation")["teacher"].logits)
        rows = fitted.data.splits["validation"]
        found = torch.from_numpy(predict_logits(fitted.trained.model, fitted.tokenizer, rows, "cpu", "fp32"))
        loss = distillation_loss(
            found, teacher / fitted.teacher_temperature, torch.tensor(rows["label"]), alpha=alpha
        )
        assert best["loss"] == pytest.approx(float(loss), rel=1e-4)


def test_a_library_user_gets_the_commands_defaults():
    defaults = StudentOptions()
    for name, value in command.make_context("train-student", []).params.items():
        # The least number of steps is for users who have not said how many epochs; in the library they have.
        if hasattr(defaults, name) and name != "min_steps":
            assert value == getattr(defaults, name), name


def test_an_interrupted_student_goes_on_as_if_nothing_had_happened(chain, tmp_path, monkeypatch):
    from distill import train_student

    def options(folder, **more):
        recipe = {"augment": "1x", "vocabulary": 0, "latency_budget": 1000.0, "epochs": 3, "batch_size": 16}
        return StudentOptions(
            output=tmp_path / folder / "s",
            teacher=chain.teacher,
            student=str(chain.checkpoint),
            **recipe,
            **more,
        )

    def interrupt(self, args, state, control, **kwargs):
        if state.epoch and state.epoch > 1:
            raise KeyboardInterrupt

    whole = train_student(options("whole"))
    with monkeypatch.context() as patch:
        patch.setattr(ProgressCallback, "on_evaluate", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train_student(options("cut"))
    with monkeypatch.context() as patch:  # neither is the shape measured again
        patch.setattr("distill.student.building.choose_shape", None)
        resumed = train_student(options("cut", resume=True))
    assert resumed.metrics == whole.metrics
    assert resumed.details == whole.details
