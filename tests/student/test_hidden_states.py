import shutil
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import transformers
from conftest import make_configs, make_rows, make_tokenizer, train_tokenizer
from distill.student import building, hidden_states
from distill.student.hidden_states import (
    Reading,
    TeacherStates,
    refuse_two_stacks,
    spans_of,
    teacher_hidden_states,
)
from distill.student.options import StudentOptions
from distill.student.shape import Shape
from distill.student.training import train_student
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast

from distill.artifact import read_manifest
from distill.callbacks import ProgressCallback
from distill.data import load_data
from distill.errors import DistillError
from distill.models import load_model, load_tokenizer


def _options(chain, output, **changes):
    common = {"max_steps": 4, "learning_rate": 3e-3, "precision": "fp32", "batch_size": 16, "layers": 2}
    return StudentOptions(output=output, teacher=chain.teacher, **{**common, **changes})


def _other_tokenizer(kind):
    special = {"unk_token": "[UNK]", "pad_token": "[PAD]"}
    tokenizer = train_tokenizer(kind, [text for text, _ in make_rows(200)], list(special.values()))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, **special)


def test_of_one_tokenizer_every_token_stands_where_it_stands():
    texts = ["the phone was great", "awful", ""]
    spans, own, theirs = spans_of(texts, make_tokenizer(), make_tokenizer())
    assert own.tolist() == theirs.tolist() == [6, 3, 2]
    np.testing.assert_array_equal(spans, np.stack([np.arange(11), np.arange(1, 12)], axis=1))


@pytest.mark.parametrize("kind", ["wordpiece", "byte-level bpe", "unigram"])
def test_of_two_tokenizers_tokens_stand_where_their_characters_do(kind):
    texts = ["the phone was great, and ordered on tuesday", "perfect naïve box"]
    mine, other = _other_tokenizer(kind), make_tokenizer()
    spans, own, theirs = spans_of(texts, mine, other)
    offsets = [pair for text in texts for pair in mine(text).encodings[0].offsets]
    of_text = np.repeat(np.arange(len(texts)), own)
    starts = np.concatenate([[0], np.cumsum(theirs)])
    assert len(offsets) == len(spans)
    for (begin, end), (first, last), text in zip(offsets, spans, of_text, strict=True):
        encoding = other(texts[text]).encodings[0]
        expected = {
            int(starts[text]) + place
            for place, (left, right) in enumerate(encoding.offsets)
            if left < end and right > begin
        }
        assert set(range(first, last)) == expected


def test_texts_of_a_pair_are_told_apart_and_the_teachers_cut_end_is_unknown():
    short = make_tokenizer()
    short.model_max_length = 6
    pair = ("the phone", "the box is black")
    spans, own, theirs = spans_of([pair], make_tokenizer(), short)
    assert own.tolist() == [9] and theirs.tolist() == [6]
    assert short(*pair, truncation=True).tokens() == ["[CLS]", "the", "[SEP]", "the", "box", "[SEP]"]
    assert spans[[0, 1, 3, 4, 5, 8], 0].tolist() == [0, 1, 2, 3, 4, 5]
    assert (spans[[2, 6, 7], 0] == spans[[2, 6, 7], 1]).all()


def test_states_are_means_over_what_stands_there():
    values = np.arange(12, dtype=np.float16).reshape(6, 2)
    states = TeacherStates(values, np.array([[0, 1], [1, 3], [0, 0], [4, 6], [5, 6]]), np.array([0, 3, 5]))
    found, known = states.of([1, 0], 4)
    torch.testing.assert_close(
        found,
        torch.tensor([[[9.0, 10], [10, 11], [0, 0], [0, 0]], [[0, 1], [3, 4], [0, 0], [0, 0]]]),
    )
    assert known.tolist() == [[True, True, False, False], [True, True, False, False]]
    shifted, known = states.of([1, 0], 4, left=True)
    assert known.tolist() == [[False, False, True, True], [False, True, True, False]]
    torch.testing.assert_close(shifted[known], found[:, :2].flatten(end_dim=1))


def test_the_teacher_reads_every_text_once_and_its_states_are_its_own(chain, tmp_path, monkeypatch):
    folder = tmp_path / "teacher"
    shutil.copytree(chain.teacher, folder)
    manifest = read_manifest(folder, "train-teacher")
    texts = load_data(str(chain.data), quiet=True).splits["train"].select(range(30))
    tokenizer = load_tokenizer(str(folder), 64, "--teacher")
    monkeypatch.setattr(hidden_states, "BATCH_TOKENS", 40)
    monkeypatch.setattr(hidden_states, "TEXTS", 7)
    states = teacher_hidden_states(folder, manifest, texts, tokenizer, "cpu", "fp32")
    monkeypatch.setattr(hidden_states, "load_model", None)
    again = teacher_hidden_states(folder, manifest, texts, tokenizer, "cpu", "fp32")
    model = load_model(str(folder), manifest.labels).eval()
    for row in (0, 7, 29):
        encoded = tokenizer(texts[row]["text"], return_tensors="pt")
        with torch.no_grad():
            expected = model.bert(**encoded, output_hidden_states=True).hidden_states[3][0]
        expected = F.layer_norm(expected, expected.shape[-1:])
        for found, known in (one.of([row], len(expected)) for one in (states, again)):
            torch.testing.assert_close(found[0], expected, atol=5e-3, rtol=0)
            assert known.all()


def test_of_students_that_start_together_one_has_the_teacher_read(chain, tmp_path, monkeypatch):
    folder = tmp_path / "teacher"
    shutil.copytree(chain.teacher, folder)
    texts = load_data(str(chain.data), quiet=True).splits["train"].select(range(30))
    tokenizer, manifest = load_tokenizer(str(folder), 64), read_manifest(folder, "train-teacher")
    read, seen = hidden_states._read, []

    def slowly(*given):
        seen.append(given[0])
        time.sleep(0.2)
        read(*given)

    monkeypatch.setattr(hidden_states, "_read", slowly)
    with ThreadPoolExecutor(2) as pool:
        given = (folder, manifest, texts, tokenizer, "cpu", "fp32")
        both = [pool.submit(teacher_hidden_states, *given) for _ in range(2)]
    assert len(seen) == 1
    np.testing.assert_array_equal(*(one.result().values for one in both))


@pytest.mark.parametrize("family", ["bert", "distilbert", "roberta", "mpnet", "electra", "modernbert"])
def test_a_student_of_any_family_reads_states_of_the_teachers_width(family):
    student = AutoModelForSequenceClassification.from_config(make_configs(2)[family])
    reading = Reading(student, 48)
    ids = torch.arange(10).reshape(2, 5)
    assert reading(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.shape == (2, 5, 48)


def _distance(student, chain):
    """From the teacher's states to the nearest linear map of a student's, over validation text."""
    manifest = read_manifest(chain.teacher, "train-teacher")
    texts = load_data(str(chain.data), quiet=True).splits["validation"]
    model, tokenizer = load_model(str(student), manifest.labels).eval(), load_tokenizer(str(student), 64)
    states = teacher_hidden_states(chain.teacher, manifest, texts, tokenizer, "cpu", "fp32")
    pairs = []
    for row, text in enumerate(texts["text"]):
        encoded = tokenizer(text, return_tensors="pt")
        with torch.no_grad():
            own = model(**encoded, output_hidden_states=True).hidden_states[-1][0]
        pairs.append((own, states.of([row], len(own))[0][0]))
    own, expected = (torch.cat(column) for column in zip(*pairs, strict=True))
    own = torch.cat([own, torch.ones(len(own), 1)], dim=1)
    return (own @ torch.linalg.lstsq(own, expected).solution - expected).pow(2).mean().item()


def test_a_student_comes_nearer_to_the_teachers_states(chain, tmp_path):
    folder = tmp_path / "teacher"  # states are kept beside it
    shutil.copytree(chain.teacher, folder)
    found = {}
    for epochs in (0.0, 4.0):
        output = tmp_path / f"student_{epochs:g}"
        options = {"teacher": folder, "hidden_epochs": epochs, "max_steps": -1, "epochs": 0.1}
        train_student(StudentOptions(**{**vars(_options(chain, output)), **options}))
        found[epochs] = _distance(output, chain)
        assert read_manifest(output, "train-student").options["hidden_epochs"] == epochs
    assert found[4.0] < 0.9 * found[0.0]
    assert not (tmp_path / "checkpoints").exists()


def _losses(caplog):
    """Of the hidden states of validation text, after each epoch."""
    told = [record.getMessage() for record in caplog.records]
    return [float(one.split()[-1]) for one in told if one.startswith("Student's states: epoch")]


@pytest.mark.parametrize("changes", [{"layers": 0}, {"vocabulary": 8}, {"alpha": 0.0}])
def test_it_goes_with_other_options(chain, tmp_path, changes, caplog):
    changes = {"hidden_epochs": 3.0, "max_steps": -1, "epochs": 0.1, **changes}
    with caplog.at_level("INFO", "distill"):
        train_student(_options(chain, tmp_path / "student", **changes))
    losses = _losses(caplog)
    assert len(losses) == 3 and losses[2] < losses[0]


def _checkpoint(tokenizer, folder):
    """A tiny encoder that reads by this tokenizer."""
    config = transformers.BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=64, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_without_layers_the_rows_in_use_are_trained_alone(chain, tmp_path, caplog):
    other = _checkpoint(make_tokenizer(unused=400), tmp_path / "other")
    changes = {"student": other, "layers": 0, "hidden_epochs": 1.0}
    with caplog.at_level("DEBUG", "distill"):
        train_student(_options(chain, tmp_path / "student", **changes))
    told = [one for one in caplog.messages if one.startswith("Training ") and "rows of the embedding" in one]
    assert len(told) == 2


def test_it_goes_with_another_tokenizer(chain, tmp_path, caplog):
    other = _checkpoint(_other_tokenizer("byte-level bpe"), tmp_path / "other")
    changes = {"student": other, "hidden_epochs": 3.0, "max_steps": -1, "epochs": 0.1}
    with caplog.at_level("INFO", "distill"):
        train_student(_options(chain, tmp_path / "student", **changes))
    losses = _losses(caplog)
    assert len(losses) == 3 and losses[2] < losses[0]


@pytest.mark.parametrize("during", ["hidden states", "labels"])
def test_an_interrupted_student_goes_on_in_either_part(chain, tmp_path, monkeypatch, during):
    changes = {"hidden_epochs": 2.0, "max_steps": -1, "epochs": 2.0}
    whole = train_student(_options(chain, tmp_path / "whole", **changes))
    title = "Student's states" if during == "hidden states" else "Student"
    seen = ProgressCallback.on_evaluate

    def interrupt(self, args, state, control, **kwargs):
        seen(self, args, state, control, **kwargs)
        if self.title == title and state.epoch > 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ProgressCallback, "on_evaluate", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train_student(_options(chain, tmp_path / "cut", **changes))
    with pytest.raises(DistillError, match="--resume goes on"):
        train_student(_options(chain, tmp_path / "cut", **changes))
    resumed = train_student(_options(chain, tmp_path / "cut", resume=True, **changes))
    assert resumed.metrics == whole.metrics
    assert not (tmp_path / "checkpoints").exists()


def test_a_shape_that_was_measured_is_kept_from_either_part(chain, tmp_path, monkeypatch):
    changes = {"hidden_epochs": 2.0, "layers": None, "latency_budget": 1e6}
    seen = ProgressCallback.on_evaluate

    def interrupt(self, args, state, control, **kwargs):
        seen(self, args, state, control, **kwargs)
        if state.epoch > 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(building, "choose_shape", lambda *_: Shape(1))
        patch.setattr(ProgressCallback, "on_evaluate", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train_student(_options(chain, tmp_path / "student", **changes))
    monkeypatch.setattr(building, "choose_shape", lambda *_: 1 / 0)
    resumed = train_student(_options(chain, tmp_path / "student", resume=True, **changes))
    assert resumed.details["layers"] == 1


def test_another_run_of_any_name_is_left_alone(chain, tmp_path):
    train_student(_options(chain, tmp_path / "student_hidden_states", max_steps=1))
    train_student(_options(chain, tmp_path / "student", max_steps=1, hidden_epochs=0.1))
    assert (tmp_path / "student_hidden_states").is_dir()


def test_a_limit_of_steps_is_one_of_labels(chain, tmp_path, caplog):
    with caplog.at_level("INFO", "distill"):
        train_student(_options(chain, tmp_path / "student", max_steps=2, hidden_epochs=2.0))
    assert len(_losses(caplog)) == 2


def test_two_stacks_are_refused(chain):
    config = transformers.BartConfig(vocab_size=60, d_model=16, encoder_layers=1, decoder_layers=1)
    with pytest.raises(DistillError, match="--hidden-epochs: the student has a decoder"):
        refuse_two_stacks(1.0, chain.teacher, config)
    refuse_two_stacks(0.0, chain.teacher, config)
    with pytest.raises(DistillError, match="--hidden-epochs -1"):
        train_student(_options(chain, chain.root / "none", hidden_epochs=-1.0))
