"""The embedding table trains the rows that the texts read, and nothing else changes."""

from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import make_configs, make_rows, make_tokenizer
from datasets import Dataset
from distill.teacher.training import TeacherOptions, train_teacher
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification, AutoTokenizer, LlamaConfig

from distill import DistillError, training
from distill.averaging import AveragingConfig
from distill.trainer import Collator, LossTrainer, tokenize
from distill.used_tokens import used_tokens_only

ROWS = 400  # of the tables here; the tokenizer has fewer than 70


def _model(config, **settings):
    torch.manual_seed(0)
    config.update({"vocab_size": ROWS, "pad_token_id": 0, **settings})
    return AutoModelForSequenceClassification.from_config(config).eval()


def _tokenizer():
    tokenizer = make_tokenizer()
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    return tokenizer


def _texts(count=8):
    texts = [text for text, _ in make_rows(count)]
    rows = {"id": [str(row) for row in range(count)], "text": [*texts[:-1], "good"], "label": [0] * count}
    return tokenize(Dataset.from_dict(rows), _tokenizer())


def _step(model, batch):
    """Logits, and the weights after a step of AdamW without decay."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], weight_decay=0.0)
    labels = batch.pop("labels")
    logits = model(**batch).logits
    F.cross_entropy(logits, labels).backward()
    optimizer.step()
    return logits.detach()


@pytest.mark.parametrize("family", make_configs(2))
def test_logits_and_trained_weights_are_those_of_the_whole_table(family, tmp_path):
    texts, tokenizer = _texts(), _tokenizer()
    one, other = (_model(make_configs(2)[family]) for _ in range(2))
    expected = _step(one, Collator(tokenizer)(list(texts)))
    table = other.get_input_embeddings()
    with used_tokens_only(other, tokenizer, [texts], "cpu", tmp_path / "t.npy") as new_ids:
        assert len(table.weight) == table.num_embeddings < 70
        used = sorted({token for row in texts["input_ids"] for token in row})
        assert set(np.flatnonzero(new_ids >= 0)) == {0, *range(other.config.eos_token_id or 0), *used}
        found = _step(other, Collator(tokenizer, new_ids)(list(texts)))
    torch.testing.assert_close(found, expected)
    assert table.num_embeddings == len(table.weight) == ROWS
    for (name, weight), trained in zip(other.named_parameters(), one.parameters(), strict=True):
        torch.testing.assert_close(weight, trained, msg=name, atol=1e-6, rtol=1e-4)


def test_a_model_that_has_bigrams_finds_its_rows_itself(tmp_path):
    texts, tokenizer = _texts(), _tokenizer()
    models = []
    for _ in range(2):
        models.append(_model(AveragingConfig(hidden_size=32, bigrams=2)))
        models[-1].know_bigrams([tuple(texts["input_ids"][0][1:3]), (2, 5)])
    one, other = models
    expected = _step(one, Collator(tokenizer)(list(texts)))
    with used_tokens_only(other, tokenizer, [texts], "cpu", tmp_path / "t.npy") as new_ids:
        assert new_ids is None and len(other.tokens.weight) < 70
        found = _step(other, Collator(tokenizer)(list(texts)))
    torch.testing.assert_close(found, expected)
    assert other.rows is None and other.bigrams.weight[1].any()
    for (name, weight), trained in zip(other.named_parameters(), one.parameters(), strict=True):
        torch.testing.assert_close(weight, trained, msg=name, atol=1e-6, rtol=1e-4)


def test_a_token_may_be_read_in_bigrams_as_one_that_no_text_has(tmp_path):
    texts, tokenizer = _texts(), _tokenizer()
    model = _model(AveragingConfig(hidden_size=32, bigrams=1))
    model.know_bigrams([(300, 300)])
    model.share(torch.full((ROWS,), 300))
    model.bigrams.weight.data[1].normal_()
    batch = Collator(tokenizer)(list(texts))
    labels = batch.pop("labels")
    expected = model(**batch).logits
    with used_tokens_only(model, tokenizer, [texts], "cpu", tmp_path / "t.npy"):
        assert len(model.tokens.weight) < 70 and len(labels)
        torch.testing.assert_close(model(**batch).logits, expected)


def _shared():
    model = _model(make_configs(1)["bert"])
    model.again = torch.nn.Linear(32, ROWS, bias=False)
    model.again.weight = model.get_input_embeddings().weight
    return model


def _frozen():
    model = _model(make_configs(1)["bert"])
    model.get_input_embeddings().weight.requires_grad_(False)
    return model


def _reads_an_id():
    model = _model(make_configs(1)["bert"])
    inside = model.forward
    model.forward = lambda input_ids, **named: inside(input_ids=input_ids, **named) if (
        input_ids == 300
    ).any() else inside(input_ids=torch.ones_like(input_ids), **named)  # fmt: skip
    return model


@pytest.mark.parametrize(
    "make",
    [
        _shared,
        _frozen,
        lambda: _model(make_configs(1)["bert"], vocab_size=len(_tokenizer())),
        lambda: _model(LlamaConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
                                   intermediate_size=48), pad_token_id=ROWS - 1),
    ],
    ids=["shared", "frozen", "nearly all used", "padding at the end"],
)  # fmt: skip
def test_other_tables_are_left_as_they_are(make, tmp_path):
    model = make()
    table = model.get_input_embeddings()
    weight = table.weight
    with used_tokens_only(model, _tokenizer(), [_texts(200)], "cpu", tmp_path / "t.npy") as new_ids:
        assert new_ids is None
        assert table.weight is weight
    assert not any(tmp_path.iterdir())


def test_a_model_that_looks_for_an_id_of_its_own_is_left_as_it_is(tmp_path):
    texts = _texts()
    texts = texts.map(lambda row: {"input_ids": [*row["input_ids"][:-1], 300]})
    model = _reads_an_id()
    table = model.get_input_embeddings()
    before = table.weight.detach().clone()
    with used_tokens_only(model, _tokenizer(), [texts], "cpu", tmp_path / "t.npy") as new_ids:
        assert new_ids is None
    torch.testing.assert_close(table.weight.detach(), before, atol=0, rtol=0)


def test_the_table_is_whole_after_an_error(tmp_path):
    model = _model(make_configs(1)["bert"])
    with (
        pytest.raises(KeyboardInterrupt),
        used_tokens_only(model, _tokenizer(), [_texts()], "cpu", tmp_path / "t.npy"),
    ):
        raise KeyboardInterrupt
    assert len(model.get_input_embeddings().weight) == ROWS


def test_the_tokenizer_may_pad_with_another_id_than_the_model_names(tmp_path):
    model, tokenizer, texts = _model(make_configs(1)["bert"]), _tokenizer(), _texts()
    tokenizer.pad_token = "[MASK]"
    assert model.config.pad_token_id != tokenizer.pad_token_id
    with used_tokens_only(model, tokenizer, [texts], "cpu", tmp_path / "t.npy") as new_ids:
        assert new_ids is not None and new_ids[tokenizer.pad_token_id] >= 0


def test_a_model_that_fails_with_a_smaller_table_is_left_as_it_is(tmp_path):
    model = _model(make_configs(1)["bert"])
    inside, table = model.forward, model.get_input_embeddings()

    def forward(**named):
        assert len(table.weight) == ROWS
        return inside(**named)

    model.forward = forward
    with used_tokens_only(model, _tokenizer(), [_texts()], "cpu", tmp_path / "t.npy") as new_ids:
        assert new_ids is None
        assert len(table.weight) == ROWS


@pytest.fixture
def large(tmp_path, data_file, checkpoint):
    """Options of a teacher whose table has more rows than the text has tokens."""
    model = AutoModelForSequenceClassification.from_pretrained(checkpoint)
    model.resize_token_embeddings(ROWS, mean_resizing=False)
    model.save_pretrained(tmp_path / "large")
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(tmp_path / "large")
    return TeacherOptions(
        output=tmp_path / "whole", data=str(data_file), model=str(tmp_path / "large"), epochs=2, dropout=0.0,
        weight_decay=0.0, precision="fp32",
    )  # fmt: skip


def _weights(folder):
    return load_file(folder / "model.safetensors")


def test_a_training_ends_with_the_weights_that_it_had_without(tmp_path, large, monkeypatch):
    train_teacher(replace(large, output=tmp_path / "short"))
    monkeypatch.setattr(training, "used_tokens_only", lambda *_, **__: nullcontext())
    train_teacher(large)
    start = _weights(tmp_path / "large")["bert.embeddings.word_embeddings.weight"]
    short, whole = _weights(tmp_path / "short"), _weights(tmp_path / "whole")
    table = short["bert.embeddings.word_embeddings.weight"]
    assert table.shape == start.shape
    assert not torch.equal(table[:60], start[:60])
    torch.testing.assert_close(table[100:], start[100:], atol=0, rtol=0)
    for name, weight in short.items():
        torch.testing.assert_close(weight, whole[name], atol=1e-5, rtol=1e-4)


class _Killed(BaseException):
    pass


def _killed(options, monkeypatch):
    """Train until something kills it in the second epoch."""
    step = LossTrainer.training_step

    def training_step(self, *rest):
        if self.state.epoch and self.state.epoch > 1.4:
            raise _Killed
        return step(self, *rest)

    with monkeypatch.context() as patch, pytest.raises(_Killed):
        patch.setattr(LossTrainer, "training_step", training_step)
        train_teacher(options)


def test_a_killed_training_goes_on_with_the_rows_that_it_had(tmp_path, large, monkeypatch):
    train_teacher(large)
    killed = replace(large, output=tmp_path / "killed")
    _killed(killed, monkeypatch)
    record = killed.checkpoints / "tokens.npy"
    saved = load_file(next(killed.checkpoints.glob("checkpoint-*")) / "model.safetensors")
    assert len(saved["bert.embeddings.word_embeddings.weight"]) == len(np.load(record)) < 70
    train_teacher(replace(killed, resume=True))
    for name, weight in _weights(tmp_path / "killed").items():
        torch.testing.assert_close(weight, _weights(tmp_path / "whole")[name], atol=0, rtol=0)


def test_a_training_that_began_with_the_whole_table_goes_on_with_it(tmp_path, large, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(training, "used_tokens_only", lambda *_, **__: nullcontext())
        _killed(large, monkeypatch)
    assert not (large.checkpoints / "tokens.npy").exists()
    train_teacher(replace(large, resume=True))
    assert _weights(tmp_path / "whole")["bert.embeddings.word_embeddings.weight"].shape[0] == ROWS


def test_tokens_that_a_resumed_training_did_not_have_before_are_told(tmp_path):
    model, record = _model(make_configs(1)["bert"]), tmp_path / "t.npy"
    np.save(record, np.arange(7))
    with (
        pytest.raises(DistillError, match="tokens that they did not have .*--overwrite"),
        used_tokens_only(model, _tokenizer(), [_texts()], "cpu", record, resumed=True),
    ):
        pass
