"""A tiny model, a tiny tokenizer and a tiny data set, built here: no test downloads anything."""

import csv
import os
import random
from dataclasses import dataclass
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

WORDS = {
    "negative": ["awful", "broken", "terrible", "hate", "refund", "slow"],
    "neutral": ["arrived", "tuesday", "box", "manual", "black", "ordered"],
    "positive": ["lovely", "great", "perfect", "love", "fast", "happy"],
}
FILLER = ["the", "a", "it", "was", "and", "my", "phone", "very", "this", "is"]


def make_rows(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """Texts that a bag of words can classify, all different."""
    generator = random.Random(seed)
    rows: dict[str, str] = {}
    while len(rows) < count:
        label = sorted(WORDS)[len(rows) % 3]
        words = generator.choices(FILLER, k=5) + generator.choices(WORDS[label], k=3)
        generator.shuffle(words)
        rows[" ".join(words)] = label
    return list(rows.items())


def write_csv(path: Path, rows: list[tuple[str, ...]], header: tuple[str, ...] = ("text", "label")) -> Path:
    """Write a CSV file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def make_tokenizer(unused: int = 0):
    """Build a WordPiece tokenizer over the words above, and as many that no text has."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *FILLER, *sum(WORDS.values(), [])]
    words += [f"unused{number}" for number in range(unused)]
    tokenizer = Tokenizer(
        models.WordPiece({word: index for index, word in enumerate(words)}, unk_token="[UNK]")
    )
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return BertTokenizerFast(tokenizer_object=tokenizer, model_max_length=64)


def train_tokenizer(kind: str, corpus: list[str], special: list[str]):
    """Train a small tokenizer: "wordpiece", "byte-level bpe" or "unigram"."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if kind == "wordpiece":
        tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=special)
    elif kind == "byte-level bpe":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=special, initial_alphabet=alphabet)
    else:
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=300, special_tokens=special, unk_token="[UNK]")
    tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer


def make_configs(layers: int) -> dict:
    """A tiny classifier's configuration of each family of encoders whose layers a student may keep."""
    import transformers

    small = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": layers, "num_attention_heads": 4,
             "intermediate_size": 48, "max_position_embeddings": 40, "num_labels": 3}  # fmt: skip
    distil = {
        "vocab_size": 60,
        "dim": 32,
        "n_layers": layers,
        "n_heads": 4,
        "hidden_dim": 48,
        "num_labels": 3,
    }
    modern = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
    return {
        "bert": transformers.BertConfig(**small),
        "distilbert": transformers.DistilBertConfig(**distil),
        "roberta": transformers.RobertaConfig(**small),
        "mpnet": transformers.MPNetConfig(**small),
        "electra": transformers.ElectraConfig(**small, embedding_size=32),
        "modernbert": transformers.ModernBertConfig(**small, **modern, reference_compile=False),
    }


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    """A randomly initialised BERT encoder (4 layers, hidden 32) with its tokenizer."""
    import torch
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=4, num_attention_heads=4,
        intermediate_size=64, max_position_embeddings=64,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("checkpoint")
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def data_file(tmp_path_factory) -> Path:
    """300 labelled texts in one CSV file."""
    return write_csv(tmp_path_factory.mktemp("data") / "reviews.csv", make_rows(300))


@dataclass
class Chain:
    """A finished chain of the three stages."""

    root: Path
    data: Path
    checkpoint: Path
    teacher: Path
    student: Path
    export: Path


@pytest.fixture(scope="session")
def chain(tmp_path_factory, checkpoint: Path, data_file: Path) -> Chain:
    """Teacher, student and INT8 bundle, trained through the library's functions. Read it, never write to it."""
    from distill.export.bundle import ExportOptions
    from distill.student.options import StudentOptions
    from distill.teacher.training import TeacherOptions

    from distill import export_student, train_student, train_teacher

    root = tmp_path_factory.mktemp("runs")
    chain = Chain(root, data_file, checkpoint, root / "teacher", root / "student", root / "export")
    # At the encoder's rate the head does not learn it all, so that the versions disagree about some texts.
    common = {
        "epochs": 8,
        "learning_rate": 3e-3,
        "head_learning_rate": 3e-3,
        "precision": "fp32",
        "batch_size": 16,
    }
    train_teacher(TeacherOptions(output=chain.teacher, data=str(data_file), model=str(checkpoint), **common))
    train_student(StudentOptions(output=chain.student, teacher=chain.teacher, layers=2, **common))
    export_student(ExportOptions(student=chain.student, output=chain.export, int8=True, max_drop=100.0))
    return chain


@pytest.fixture
def run():
    """Run the command line in this process: `run("report", "--texts", 5)` gives Click's result."""
    from click.testing import CliRunner

    from distill.cli import cli

    def invoke(*arguments: object, **options):
        return CliRunner().invoke(cli, [str(argument) for argument in arguments], **options)

    return invoke
