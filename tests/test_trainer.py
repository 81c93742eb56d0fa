import os
from dataclasses import replace

import pytest
import torch
import transformers
from conftest import make_configs, make_tokenizer
from datasets import Dataset

from distill import options as options_module
from distill.arguments import EVALUATIONS, OPTIMIZERS, TrainingOptions, length_of, training_arguments
from distill.memory import Plan
from distill.trainer import LossTrainer, is_new, tokenize
from distill.training import _tell_long

FAMILIES = make_configs(layers=2)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_head_is_what_the_pre_trained_encoder_does_not_have(family):
    model = transformers.AutoModelForSequenceClassification.from_config(FAMILIES[family])
    pretrained = transformers.AutoModel.from_config(FAMILIES[family]).state_dict()
    prefix = model.base_model_prefix
    head = {name for name, _ in model.named_parameters() if is_new(name, prefix)}
    body = {f"{prefix}.{name}" for name in pretrained if "pooler" not in name}
    assert head and head == {name for name, _ in model.named_parameters()} - body


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_is_trained_once_and_the_head_at_its_own_rate(family, tmp_path):
    model = transformers.AutoModelForSequenceClassification.from_config(FAMILIES[family])
    model.get_input_embeddings().weight.requires_grad_(False)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), learning_rate=1e-4, weight_decay=0.1, report_to=[], use_cpu=True
    )
    trainer = LossTrainer(model=model, args=arguments, loss=None)
    groups = trainer.create_optimizer().param_groups
    trained = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(trained) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    decayed = trainer.get_decay_parameter_names(model)
    rates = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    decays = {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert rates[id(parameter)] == (1e-3 if is_new(name, model.base_model_prefix) else 1e-4)
            assert decays[id(parameter)] == (0.1 if name in decayed else 0.0)
    assert isinstance(trainer.optimizer, torch.optim.AdamW)


def test_embeddings_keep_32_bits_beside_an_8_bit_optimizer(tmp_path, monkeypatch):
    kept = []
    monkeypatch.setattr("distill.trainer._keep_tables_at_32_bits", kept.append)
    model = transformers.AutoModelForSequenceClassification.from_config(FAMILIES["bert"])
    for kind in OPTIMIZERS.values():
        arguments = transformers.TrainingArguments(str(tmp_path), optim=kind, report_to=[], use_cpu=True)
        trainer = LossTrainer(model=model, args=arguments, loss=None)
        monkeypatch.setattr(
            trainer, "get_optimizer_cls_and_kwargs", lambda *given: (torch.optim.AdamW, {"lr": 1e-4})
        )
        trainer.create_optimizer()
    assert kept == [model]


def test_rows_in_a_file_are_memory_mapped_and_tokenized_once(tmp_path):
    rows = Dataset.from_dict({"id": ["a", "b"], "text": ["good film", "bad plot of old"], "label": [0, 1]})
    rows = rows.add_column("teacher_logits", [[0.5, 1.5], [2.5, 3.5]])
    file = tmp_path / "train.arrow"
    first = tokenize(rows, make_tokenizer(), file)
    assert [entry["filename"] for entry in first.cache_files] == [str(file)]
    again = tokenize(rows, None, file)
    assert again[:] == first[:] == tokenize(rows, make_tokenizer())[:]
    assert first["teacher_logits"][:] == [[0.5, 1.5], [2.5, 3.5]]


def test_a_tracker_is_told_through_the_trainer_and_is_no_part_of_the_recipe(tmp_path):
    options = TrainingOptions(output=tmp_path / "runs" / "t", report_to=("tensorboard",))
    arguments = training_arguments(options, Plan(32, 1), "fp32", "cpu", 1000)
    assert arguments.report_to == ["tensorboard"] and arguments.logging_strategy == "steps"
    logs = (
        getattr(arguments, "logging_dir", None) or os.environ["TENSORBOARD_LOGGING_DIR"]
    )  # transformers 4, 5
    assert logs == str(tmp_path / "runs" / "logs" / "t")
    assert options.recipe() == TrainingOptions(output=options.output, resume=True).recipe()


def test_a_tracker_that_is_not_installed_is_refused(run, tmp_path, monkeypatch):
    monkeypatch.setattr(options_module, "find_spec", lambda name: None)
    result = run("train-teacher", "--data", "x.csv", "--model", "m", "--report-to", "wandb")
    assert result.exit_code == 1 and "pip install wandb" in result.stderr


@pytest.mark.parametrize(
    ("texts", "epochs", "least", "steps"),
    [(64, 3.0, 200, 200), (64, 5.0, 201, 205), (6400, 3.0, 200, None), (100, 0.5, 200, 200), (9, 0.5, 2, 5)],
)
def test_few_texts_get_enough_steps_and_evaluations(tmp_path, texts, epochs, least, steps):
    options = TrainingOptions(output=tmp_path / "t", epochs=epochs, min_steps=least)
    length = length_of(options, Plan(32, 1), texts)
    if steps is None:
        assert length["num_train_epochs"] == epochs and length["eval_strategy"] == "epoch"
    else:
        assert length["max_steps"] == steps == EVALUATIONS * length["eval_steps"]
        assert length["save_steps"] == length["eval_steps"]
    assert length_of(replace(options, max_steps=7), Plan(32, 1), texts)["max_steps"] == 7


@pytest.mark.parametrize(
    ("given", "steps"),
    [
        ((), 200),
        (("--epochs", 2), 0),
        (("--min-steps", 50), 50),
        (("--epochs", 2, "--min-steps", 50), 50),
    ],
)
def test_the_least_number_of_steps_counts_where_it_or_no_epochs_are_given(
    run, tmp_path, monkeypatch, given, steps
):
    seen = []
    monkeypatch.setattr("distill.teacher.training.train_teacher", lambda options: seen.append(options))
    monkeypatch.setattr("distill.teacher.command.show_stage", lambda *_: None)
    result = run("train-teacher", "--data", "x.csv", "--model", "m", "--output", tmp_path / "t", *given)
    assert result.exit_code == 0, result.output
    assert seen[0].min_steps == steps


def test_texts_that_are_cut_are_counted_and_told(tmp_path, caplog):
    rows = Dataset.from_dict({"id": list("abcd"), "text": ["good film", "a b c", "good " * 9, "good " * 6]})
    tokenizer = make_tokenizer()
    tokenizer.model_max_length = 8
    encoded = tokenize(rows, tokenizer)
    assert encoded["cut"][:] == [False, False, True, False]
    assert _tell_long(encoded, tokenizer, "Teacher") == {"truncated_share": 0.25}
    assert "25.0 % of the texts are longer than 8 tokens" in caplog.text


def test_precision_is_what_is_asked_for_whatever_an_earlier_training_or_launcher_left(tmp_path, monkeypatch):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    arguments = training_arguments(TrainingOptions(tmp_path / "run"), Plan(2, 1), "fp32", "cpu", 10)
    assert arguments.device.type == "cpu"
    assert Accelerator(cpu=True).mixed_precision == "no"
    AcceleratorState._reset_state(reset_partial_state=True)
