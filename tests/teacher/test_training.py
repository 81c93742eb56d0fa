import numpy as np
import pytest
import torch
from distill.teacher.losses import balanced_weights, teacher_loss
from distill.teacher.training import TeacherOptions, train_teacher
from sklearn.utils.class_weight import compute_class_weight
from torch.nn import functional as F
from transformers import TrainingArguments

from distill.artifact import read_manifest, verify
from distill.callbacks import ProgressCallback
from distill.errors import DistillError
from distill.metrics import score
from distill.models import load_model
from distill.predictions import read_predictions

LABELS = np.array([0] * 10 + [1] * 3 + [2] * 7)


def _options(tmp_path, data_file, checkpoint, **changes):
    common = {"epochs": 3, "learning_rate": 3e-3, "precision": "fp32", "batch_size": 16}
    return TeacherOptions(
        output=tmp_path / "runs" / "t", data=str(data_file), model=str(checkpoint), **{**common, **changes}
    )


def test_class_weights_equal_scikit_learns_balanced_weights():
    expected = compute_class_weight("balanced", classes=np.arange(3), y=LABELS)
    np.testing.assert_allclose(balanced_weights(LABELS, 3).numpy(), expected, rtol=1e-6)
    assert balanced_weights(LABELS, 4)[3] == 0


def test_the_loss_is_torchs_weighted_and_smoothed_cross_entropy():
    logits, labels = torch.randn(20, 3), torch.tensor(LABELS)
    weights = balanced_weights(LABELS, 3)
    # Over all labels the balanced weights are 1 on average, so PyTorch's mean is the same.
    expected = F.cross_entropy(logits, labels, weight=weights, label_smoothing=0.1)
    torch.testing.assert_close(teacher_loss(logits, labels, weights, 0.1, 0.0), expected)


@pytest.mark.parametrize("gamma", [0.0, 2.0])
def test_a_step_in_parts_has_the_gradient_of_the_whole(gamma):
    logits, labels = torch.randn(20, 3, requires_grad=True), torch.tensor(LABELS)
    weights = balanced_weights(LABELS, 3)
    (whole,) = torch.autograd.grad(teacher_loss(logits, labels, weights, 0.0, gamma), logits)
    parts = [
        teacher_loss(logits[row : row + 1], labels[row : row + 1], weights, 0.0, gamma) / 20
        for row in range(20)
    ]
    (summed,) = torch.autograd.grad(sum(parts), logits)
    torch.testing.assert_close(summed, whole)


@pytest.mark.parametrize("weighted", [False, True])
def test_the_focal_loss_is_its_papers_and_differentiable(weighted):
    logits = torch.randn(20, 3, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor(LABELS)
    weights = balanced_weights(LABELS, 3).double() if weighted else None
    probability = torch.softmax(logits, dim=1)[range(20), labels]
    share = weights[labels] if weighted else torch.ones(20, dtype=torch.float64)
    expected = -(share * (1 - probability) ** 2 * probability.log()).mean()
    torch.testing.assert_close(teacher_loss(logits, labels, weights, 0.0, 2.0), expected)
    assert torch.autograd.gradcheck(lambda z: teacher_loss(z, labels, weights, 0.1, 2.0), (logits,))


SEVERAL = np.arange(60).reshape(20, 3) % 4 == 0


def test_the_loss_of_several_labels_is_torchs_summed_over_the_labels():
    logits, labels = torch.randn(20, 3), torch.tensor(SEVERAL).long()
    expected = F.binary_cross_entropy_with_logits(logits, labels.float(), reduction="sum") / 20
    torch.testing.assert_close(teacher_loss(logits, labels, None, 0.0, 0.0), expected)
    weights = balanced_weights(SEVERAL, 3)
    for label in range(3):
        expected = compute_class_weight("balanced", classes=np.array([False, True]), y=SEVERAL[:, label])
        np.testing.assert_allclose(weights[:, label].numpy(), expected, rtol=1e-6)


def test_the_focal_loss_of_several_labels_is_its_papers_and_differentiable():
    logits = torch.randn(20, 3, dtype=torch.float64, requires_grad=True)
    labels, weights = torch.tensor(SEVERAL).long(), balanced_weights(SEVERAL, 3).double()
    p = torch.sigmoid(logits)
    right = p * labels + (1 - p) * (1 - labels)
    share = weights[1] * labels + weights[0] * (1 - labels)
    expected = -(share * (1 - right) ** 2 * right.log()).sum() / 20
    torch.testing.assert_close(teacher_loss(logits, labels, weights, 0.0, 2.0), expected)
    assert torch.autograd.gradcheck(lambda z: teacher_loss(z, labels, weights, 0.1, 2.0), (logits,))


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
def test_a_text_that_is_surely_right_has_no_gradient_and_not_nan(gamma):
    logits = torch.tensor([[30.0, 0.0]], requires_grad=True)
    teacher_loss(logits, torch.tensor([0]), None, 0.0, gamma).backward()
    assert logits.grad.abs().max() < 1e-6


def test_the_manifest_says_what_was_done_and_the_files_match_it(chain):
    manifest = read_manifest(chain.teacher, "train-teacher")
    verify(chain.teacher, manifest)
    assert manifest.labels == ["negative", "neutral", "positive"]
    assert manifest.data["rows"] == {"train": 240, "validation": 30, "test": 30}
    assert manifest.options["model"] == str(chain.checkpoint)
    assert manifest.parameters > 0 and manifest.wall_seconds > 0
    assert {"torch", "transformers"} <= manifest.versions.keys()
    assert {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "predictions.parquet",
    } <= manifest.files.keys()
    assert not any(name.endswith((".bin", ".pt", ".pkl")) for name in manifest.files)


@pytest.mark.parametrize("split", ["validation", "test"])
def test_saved_predictions_give_the_manifests_scores(chain, split):
    saved = read_predictions(chain.teacher, split)["teacher"]
    found = score(saved.labels, saved.logits.argmax(axis=1), 3)
    assert found.summary() == read_manifest(chain.teacher, "train-teacher").metrics[split]


@pytest.mark.slow
def test_the_weights_with_the_best_validation_score_are_kept(tmp_path, data_file, checkpoint, monkeypatch):
    seen = []

    def evaluated(self, args, state, control, metrics=None, **kwargs):
        seen.append(metrics["eval_macro_f1"])

    monkeypatch.setattr(ProgressCallback, "on_evaluate", evaluated)
    manifest = train_teacher(_options(tmp_path, data_file, checkpoint, epochs=4, learning_rate=2e-2))
    assert len(seen) == 4
    assert manifest.metrics["validation"]["macro_f1"] == pytest.approx(max(seen), abs=1e-6)


@pytest.mark.slow
def test_an_interrupted_run_leaves_no_folder_and_resumes(
    tmp_path, data_file, checkpoint, monkeypatch, caplog
):
    caplog.set_level("INFO")
    options = _options(tmp_path, data_file, checkpoint)
    whole = train_teacher(_options(tmp_path / "whole", data_file, checkpoint))

    def interrupt(self, args, state, control, **kwargs):
        if state.epoch and state.epoch > 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ProgressCallback, "on_evaluate", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train_teacher(options)
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["checkpoints"]

    with pytest.raises(DistillError, match="--resume goes on"):
        train_teacher(options)
    with pytest.raises(DistillError, match="learning-rate was 0.003"):
        train_teacher(_options(tmp_path, data_file, checkpoint, resume=True, learning_rate=1e-3))
    resumed = train_teacher(_options(tmp_path, data_file, checkpoint, resume=True))
    assert "Resuming from" in caplog.text
    assert resumed.metrics == whole.metrics
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["t"]
    a, b = (
        read_predictions(path, "test")["teacher"].logits
        for path in (tmp_path / "runs" / "t", tmp_path / "whole" / "runs" / "t")
    )
    np.testing.assert_allclose(a, b, atol=1e-4)


def _interrupted_at(step, monkeypatch, options):
    def interrupt(self, args, state, control, **kwargs):
        if state.global_step == step:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ProgressCallback, "on_step_end", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train_teacher(options)


def test_a_run_interrupted_inside_an_epoch_goes_on_to_the_same_weights(
    tmp_path, data_file, checkpoint, monkeypatch
):
    monkeypatch.setattr("distill.callbacks.SAVE_SECONDS", 0)
    short = {"epochs": 2, "batch_size": 60, "dropout": 0.1}
    train_teacher(_options(tmp_path / "whole", data_file, checkpoint, **short))
    options = _options(tmp_path, data_file, checkpoint, **short)
    _interrupted_at(6, monkeypatch, options)  # 4 steps an epoch
    train_teacher(_options(tmp_path, data_file, checkpoint, resume=True, **short))
    a, b = (
        read_predictions(path, "test")["teacher"].logits
        for path in (tmp_path / "runs" / "t", tmp_path / "whole" / "runs" / "t")
    )
    np.testing.assert_allclose(a, b, atol=1e-5)


def test_a_checkpoint_cut_short_is_passed_over(tmp_path, data_file, checkpoint, monkeypatch):
    options = _options(tmp_path, data_file, checkpoint, epochs=3, batch_size=120)
    _interrupted_at(5, monkeypatch, options)
    cut = options.checkpoints / "checkpoint-99"
    cut.mkdir()
    (cut / "model.safetensors").write_bytes(b"half")
    train_teacher(_options(tmp_path, data_file, checkpoint, epochs=3, batch_size=120, resume=True))
    assert options.output.is_dir() and not cut.exists()


def test_a_resumed_run_has_the_patience_that_was_left(tmp_path, data_file, checkpoint, monkeypatch):
    seen = []

    def evaluated(self, args, state, control, metrics=None, **kwargs):
        seen.append(round(state.epoch))
        if len(seen) == 3 and not again:
            raise KeyboardInterrupt

    again = True
    still = {"epochs": 6, "patience": 3, "learning_rate": 0.0}  # no epoch after the first is better
    monkeypatch.setattr(ProgressCallback, "on_evaluate", evaluated)
    train_teacher(_options(tmp_path / "whole", data_file, checkpoint, **still))
    whole, again = list(seen), False
    seen.clear()
    with pytest.raises(KeyboardInterrupt):
        train_teacher(_options(tmp_path, data_file, checkpoint, **still))
    again = True
    train_teacher(_options(tmp_path, data_file, checkpoint, resume=True, **still))
    assert whole == [1, 2, 3, 4] and seen[-1] == 4


@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_of_the_users_where_checkpoints_would_go_is_left_alone(
    tmp_path, data_file, checkpoint, resume
):
    options = _options(tmp_path, data_file, checkpoint, resume=resume, overwrite=not resume)
    thesis = options.checkpoints / "checkpoint-500" / "thesis.pt"
    thesis.parent.mkdir(parents=True)
    thesis.touch()
    with pytest.raises(DistillError, match="choose another --output"):
        train_teacher(options)
    assert thesis.exists()


def test_frozen_embeddings_and_gradient_checkpointing_train_the_layers(tmp_path, data_file, checkpoint):
    from safetensors.torch import load_file

    options = _options(
        tmp_path, data_file, checkpoint, max_steps=2, freeze_embeddings=True, gradient_checkpointing=True
    )
    train_teacher(options)
    before, after = (load_file(f / "model.safetensors") for f in (checkpoint, options.output))
    name = "encoder.layer.0.output.dense.weight"
    assert not torch.equal(after[f"bert.{name}"], before[name])


@pytest.mark.slow
def test_class_weights_smoothing_accumulation_and_checkpointing_run_together(tmp_path, data_file, checkpoint):
    manifest = train_teacher(
        _options(
            tmp_path, data_file, checkpoint, max_steps=2, class_weights=True, label_smoothing=0.1,
            gradient_accumulation=2, gradient_checkpointing=True, scheduler="cosine",
        )
    )  # fmt: skip
    assert manifest.options["gradient_accumulation"] == 2


def test_frozen_embeddings_stay_and_everything_else_is_trained(tmp_path, data_file, checkpoint):
    from safetensors.torch import load_file

    options = _options(tmp_path, data_file, checkpoint, max_steps=2, freeze_embeddings=True, dropout=0.0)
    train_teacher(options)
    before, after = (
        load_file(checkpoint / "model.safetensors"),
        load_file(options.output / "model.safetensors"),
    )
    name = "embeddings.word_embeddings.weight"
    torch.testing.assert_close(after[f"bert.{name}"], before[name], rtol=0, atol=0)
    other = "encoder.layer.0.output.dense.weight"
    assert not torch.equal(after[f"bert.{other}"], before[other])


def test_dropout_replaces_every_dropout_of_the_checkpoint(checkpoint):
    config = load_model(str(checkpoint), ["a", "b"], dropout=0.25).config
    assert config.hidden_dropout_prob == config.attention_probs_dropout_prob == 0.25
    assert load_model(str(checkpoint), ["a", "b"]).config.hidden_dropout_prob == 0.1


def test_batches_hold_texts_of_similar_length(tmp_path):
    from datasets import Dataset

    from distill.trainer import LossTrainer

    lengths = np.random.default_rng(0).integers(5, 100, size=640).tolist()
    train = Dataset.from_dict({"length": lengths})
    arguments = TrainingArguments(str(tmp_path), per_device_train_batch_size=16, report_to=[], use_cpu=True)
    trainer = LossTrainer(
        torch.nn.Linear(1, 1), arguments, train_dataset=train, loss=lambda logits, batch: logits
    )
    order = list(trainer._get_train_sampler())
    assert sorted(order) == list(range(640))
    spread = [np.ptp([lengths[row] for row in order[start : start + 16]]) for start in range(0, 640, 16)]
    assert np.median(spread) < 10


@pytest.mark.slow
def test_a_decoder_without_a_padding_token_is_fine_tuned(tmp_path, data_file):
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import GPT2Config, GPT2Model, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        [], trainers.BpeTrainer(special_tokens=["<end>"], initial_alphabet=alphabet)
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", model_max_length=64)
    fast.save_pretrained(tmp_path / "gpt")
    config = GPT2Config(vocab_size=len(fast), n_embd=16, n_layer=1, n_head=2, n_positions=64, eos_token_id=0)
    GPT2Model(config).save_pretrained(tmp_path / "gpt")
    options = _options(tmp_path, data_file, tmp_path / "gpt", max_steps=2)
    train_teacher(options)
    assert PreTrainedTokenizerFast.from_pretrained(options.output).pad_token == "<end>"
    assert GPT2Config.from_pretrained(options.output).pad_token_id == 0


def test_a_decoder_answers_the_same_in_a_batch_and_alone(tmp_path, checkpoint):
    from transformers import AutoTokenizer, Qwen2Config, Qwen2Model

    # The tokenizer pads with [PAD], number 0; the model's configuration names no padding token.
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    tokenizer.save_pretrained(tmp_path)
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64, eos_token_id=3,
    )  # fmt: skip
    Qwen2Model(config).save_pretrained(tmp_path)
    model = load_model(str(tmp_path), ["a", "b"]).eval()
    assert model.config.pad_token_id == tokenizer.pad_token_id == 0
    texts = ["lovely phone", "it was a great phone and I love it"]
    with torch.no_grad():
        alone = model(**tokenizer(texts[0], return_tensors="pt")).logits[0]
        padded = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits[0]
    torch.testing.assert_close(padded, alone, atol=1e-5, rtol=1e-4)
