"""Texts longer than a model reads: what is read of them, and that every stage reads the same."""

import random

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import FILLER, WORDS, make_rows, train_tokenizer, write_csv
from distill.explain.versions import open_for_explanation, open_for_latency, read_versions
from distill.export.bundle import ExportOptions
from distill.student.corpus import in_windows
from distill.student.options import StudentOptions
from distill.teacher.training import TeacherOptions
from tokenizers import Tokenizer, models, normalizers, trainers

from distill import Classifier, DistillError, export_student, train_student, train_teacher
from distill.artifact import read_manifest
from distill.cli import cli
from distill.data import load_unlabeled
from distill.long_texts import WAYS, Reader, pooled
from distill.models import load_tokenizer
from distill.predictions import read_predictions
from distill.sources import Columns

LENGTH = 16  # tokens that the models here read
SPECIAL = ["[UNK]", "[PAD]", "[CLS]", "[SEP]"]


def long_rows(count, seed=0):
    """Texts of 60 words, in which those that tell stand together, anywhere."""
    generator = random.Random(seed)
    rows = {}
    while len(rows) < count:
        label = sorted(WORDS)[len(rows) % 3]
        words = generator.choices(FILLER, k=52)
        place = generator.randrange(len(words))
        words[place:place] = generator.choices(WORDS[label], k=8)
        rows[" ".join(words)] = label
    return list(rows.items())


@pytest.fixture(scope="module")
def corpus():
    return [text for text, _ in make_rows(60)]


@pytest.mark.parametrize("kind", ["wordpiece", "byte-level bpe", "unigram"])
def test_windows_hold_all_of_a_text_and_fit(kind, corpus):
    tokenizer = train_tokenizer(kind, corpus, SPECIAL)
    reader = Reader(tokenizer, 64, "windows")
    text = "  ".join(corpus) + " ünïcödé 漢字漢字 end"
    pieces = reader.pieces(text)
    reached = 0
    for piece in pieces:
        start = text.find(piece, max(0, reached - len(piece)))
        assert 0 <= start <= reached, "nothing is left out between two windows"
        assert len(tokenizer.encode(piece, add_special_tokens=False).ids) <= 64
        reached = start + len(piece)
    assert reached == len(text)
    words = tokenizer.encode(text, add_special_tokens=False).ids
    assert len(pieces) == 1 + -(-(len(words) - 64) // 48), "each shares a quarter with the next"


@pytest.mark.parametrize("kind", ["wordpiece", "byte-level bpe", "unigram"])
def test_head_and_tail_are_a_quarter_and_the_rest(kind, corpus):
    tokenizer = train_tokenizer(kind, corpus, SPECIAL)
    whole = " ".join(corpus)
    (piece,) = Reader(tokenizer, 40, "head-tail").pieces(whole)
    ids = [tokenizer.encode(text, add_special_tokens=False).ids for text in (whole, piece)]
    assert 30 <= len(ids[1]) <= 40
    assert ids[1][:6] == ids[0][:6]
    assert ids[1][-25:] == ids[0][-25:]


@pytest.mark.parametrize("way", WAYS[1:])
def test_short_texts_and_texts_without_blanks(way, corpus):
    tokenizer = train_tokenizer("byte-level bpe", corpus, SPECIAL)
    reader = Reader(tokenizer, 12, way)
    for text in ("", " ", "lovely"):
        assert reader.pieces(text) == [text]
    endless = "xyz" * 200
    for piece in reader.pieces(endless):
        assert len(tokenizer.encode(piece, add_special_tokens=False).ids) <= 12
    assert max(map(len, reader.pieces(endless))) < 60


def test_a_tokenizer_for_which_a_text_is_one_word_cuts_at_blanks_and_loses_no_token(corpus):
    """As those of Llama 2, which turn blanks into a letter and split nothing beforehand."""
    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=80, special_tokens=SPECIAL))
    reader = Reader(tokenizer, 60, "windows")
    text = " ".join(corpus)
    pieces = reader.pieces(text)
    assert text.startswith(pieces[0]) and text.endswith(pieces[-1])
    for piece in pieces:
        assert len(tokenizer.encode(piece, add_special_tokens=False).ids) <= 60
        assert reader.pieces(piece) == [piece], "a window is not cut again"
    between = [text[text.index(piece) - 1] == " " or piece[0] == " " for piece in pieces[1:]]
    assert sum(between) >= len(between) - 1, "only the last may have lost a first token"


def test_windows_without_a_character_are_left_out(corpus):
    tokenizer = train_tokenizer("byte-level bpe", corpus, SPECIAL)
    pieces = Reader(tokenizer, 12, "windows").pieces("lovely" + "\n" * 300 + "box")
    assert 2 <= len(pieces) <= 4 and all(piece.strip() for piece in pieces)
    assert len(Reader(tokenizer, 12, "windows").pieces("\n" * 300)) == 1


def test_a_length_that_holds_no_text_is_refused(corpus):
    with pytest.raises(DistillError, match="--max-length 3: too short for --long-texts windows"):
        Reader(train_tokenizer("wordpiece", corpus, SPECIAL), 3, "windows")


def test_pooled_logits_are_means():
    logits = np.arange(10, dtype=np.float32).reshape(5, 2)
    assert pooled(logits, [0, 1, 1, 1, 2]).tolist() == [[0, 1], [4, 5], [8, 9]]
    assert pooled(logits, range(5)) is logits


@pytest.fixture(scope="module")
def runs(tmp_path_factory, checkpoint):
    """Teacher, student and bundle, for head-tail and for windows."""
    root = tmp_path_factory.mktemp("long")
    data = write_csv(root / "data.csv", long_rows(240))
    more = write_csv(root / "more.csv", [(text,) for text, _ in long_rows(20, seed=1)], ("text",))
    common = {"epochs": 6, "learning_rate": 3e-3, "precision": "fp32", "batch_size": 16, "max_length": LENGTH}
    for way in WAYS[1:]:
        place = root / way
        teacher = TeacherOptions(
            output=place / "teacher", data=str(data), model=str(checkpoint), long_texts=way, **common
        )
        train_teacher(teacher)
        student = StudentOptions(
            output=place / "student", teacher=place / "teacher", layers=2, unlabeled=str(more), augment="20",
            vocabulary=0, hidden_epochs=1, **common,
        )  # fmt: skip
        train_student(student)
        export = ExportOptions(
            student=place / "student", output=place / "export", int8=True, max_drop=50.0, single_file=True
        )
        export_student(export)
    return root


@pytest.mark.parametrize("way", WAYS[1:])
def test_every_stage_reads_alike(runs, way):
    folders = [runs / way / stage for stage in ("teacher", "student", "export")]
    stages = ("train-teacher", "train-student", "export")
    manifests = [read_manifest(*place, "--x") for place in zip(folders, stages, strict=True)]
    assert {manifest.long_texts for manifest in manifests} == {way}
    classifier = Classifier(folders[2], file="onnx/model.onnx")
    texts = [text for text, _ in long_rows(9, seed=2)]
    versions, bundle = read_versions(*folders)
    single = Classifier(folders[2] / "classifier.onnx")
    assert np.array_equal(single.predict_logits(texts), Classifier(folders[2]).predict_logits(texts))
    for version in versions[1:3]:  # student and fp32 ONNX: the same weights
        found = open_for_explanation(version, bundle.labels)(texts)
        assert np.allclose(found, version.decision.probabilities(classifier.predict_logits(texts)), atol=5e-3)
        one = [np.ravel(open_for_latency(version, bundle.labels)(text)) for text in texts]
        assert np.allclose(one, classifier.predict_logits(texts), atol=1e-4)
    tokenizer = load_tokenizer(str(folders[2]), bundle.max_length, "--x", way)
    pieces = [tokenizer.reader.pieces(text) for text in texts]
    assert max(map(len, pieces)) == (1 if way == "head-tail" else 6)
    by_hand = [classifier.predict_logits(own).mean(axis=0) for own in pieces]
    assert np.allclose(classifier.predict_logits(texts), by_hand, atol=1e-6)
    batched = classifier._engine.batched_logits([*texts, "the box"])
    assert np.allclose(batched, classifier.predict_logits([*texts, "the box"]), atol=1e-5)


def test_windows_find_what_the_beginning_does_not_tell(runs):
    manifest = read_manifest(runs / "windows" / "teacher", "train-teacher", "--teacher")
    assert manifest.metrics["test"]["macro_f1"] > 0.9
    assert (manifest.details["truncated_share"], manifest.details["in_windows_share"]) == (0, 1)
    assert manifest.data["rows"]["test"] == len(
        read_predictions(runs / "windows" / "teacher", "test")["teacher"].ids
    )
    head_tail = read_manifest(runs / "head-tail" / "teacher", "train-teacher", "--teacher")
    assert head_tail.details["truncated_share"] == 1


def test_a_student_learns_on_windows_of_which_each_is_labelled(runs):
    data = write_csv(runs / "few.csv", long_rows(5))
    tokenizer = load_tokenizer(str(runs / "windows" / "student"), LENGTH, "--student", "windows")
    texts = load_unlabeled(str(data), Columns("text"))
    windows = in_windows(texts, tokenizer)
    assert len(windows) == len(set(windows["id"])) == 5 * 6
    assert all(len(tokenizer(text)["input_ids"]) <= LENGTH for text in windows["text"])
    tokenizer.reader = None
    assert in_windows(texts, tokenizer) is texts


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"columns": Columns(text_pair="b"), "long_texts": "windows"}, "not for pairs"),
        ({"columns": Columns(text_pair="b"), "long_texts": "head-tail"}, "not for pairs"),
        ({"folds": 2, "long_texts": "windows"}, "not with --folds"),
        ({"long_texts": "tail"}, "use head, head-tail, windows"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path, checkpoint, options, told):
    data = write_csv(tmp_path / "data.csv", make_rows(30))
    with pytest.raises(DistillError, match=told):
        train_teacher(TeacherOptions(output=tmp_path / "t", data=str(data), model=str(checkpoint), **options))


def test_the_command_line_knows_the_ways():
    shown = CliRunner().invoke(cli, ["train-teacher", "--help"]).output
    assert "--long-texts [head|head-tail|windows]" in shown
