import pytest
import torch
from conftest import make_rows, train_tokenizer
from distill.student.vocabulary import _in_order, trim_vocabulary
from tokenizers import Tokenizer, models, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    MPNetConfig,
    MPNetForSequenceClassification,
    PreTrainedTokenizerFast,
)

from distill import DistillError

CORPUS = [text for text, _ in make_rows(200)]
OTHER = ["unheard zebras quarrel over lovelier telephones", "ylevol enohp", "batteries, batteries! (again)"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]


def _tokenizer(kind):
    tokenizer = train_tokenizer(kind, CORPUS + OTHER, SPECIAL)
    ends = [(token, tokenizer.token_to_id(token)) for token in ("[SEP]", "[CLS]")]
    tokenizer.post_processor = (
        processors.BertProcessing(*ends)
        if kind == "wordpiece"
        else processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, **names)


def _model(tokenizer, config=BertConfig, model=BertForSequenceClassification):
    torch.manual_seed(0)
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    sizes = {"vocab_size": len(tokenizer), "initializer_range": 0.5, "pad_token_id": tokenizer.pad_token_id}
    return model(config(**small, **sizes, num_labels=3)).eval()


def _logits(model, tokenizer, text):
    with torch.inference_mode():
        return model(**tokenizer(text, return_tensors="pt", return_token_type_ids=False)).logits


def _spelt(tokens):
    return "".join(token.removeprefix("##") for token in tokens).replace("\u2581", "")


def test_the_limits_in_a_tokenizers_own_file_do_not_hide_tokens(tokenizer):
    own = tokenizer.backend_tokenizer
    own.enable_truncation(4)
    own.enable_padding(length=8)
    trimmed = trim_vocabulary(_model(tokenizer), tokenizer, [(OTHER[0], CORPUS[0])])
    for text in (OTHER[0], CORPUS[0]):
        assert trimmed.tokenize(text) == tokenizer.tokenize(text)


@pytest.fixture(params=["wordpiece", "byte-level bpe", "unigram"])
def tokenizer(request):
    return _tokenizer(request.param)


@pytest.mark.parametrize("size", [None, 30])
def test_a_text_whose_tokens_are_kept_gets_the_same_answer(tokenizer, size):
    model = _model(tokenizer)
    texts = CORPUS + OTHER
    before = {text: (tokenizer.tokenize(text), _logits(model, tokenizer, text)) for text in texts}
    trimmed = trim_vocabulary(model, tokenizer, CORPUS, size)
    assert len(trimmed) < len(tokenizer) and model.config.vocab_size == len(trimmed)
    assert model.get_input_embeddings().num_embeddings == len(trimmed)
    kept = trimmed.get_vocab()
    same = [text for text in texts if all(token in kept for token in before[text][0])]
    assert len(same) >= (len(CORPUS) if size is None else 10)
    for text in same:
        assert trimmed.tokenize(text) == before[text][0]
        torch.testing.assert_close(_logits(model, trimmed, text), before[text][1], rtol=0, atol=0)


def test_what_could_be_spelt_before_can_be_spelt_now(tokenizer):
    trimmed = trim_vocabulary(_model(tokenizer), tokenizer, CORPUS[:3], 5)
    for text in OTHER:
        before, after = tokenizer.tokenize(text), trimmed.tokenize(text)
        assert tokenizer.unk_token not in before + after
        assert _spelt(after) == _spelt(before)
    assert any(len(trimmed.tokenize(text)) > len(tokenizer.tokenize(text)) for text in OTHER)
    assert len(trim_vocabulary(_model(tokenizer), tokenizer, CORPUS, 5)) < len(
        trim_vocabulary(_model(tokenizer), tokenizer, CORPUS)
    )


def test_room_that_the_corpus_leaves_goes_to_the_first_of_the_vocabulary(tokenizer):
    corpus, ids = CORPUS[:3], tokenizer.get_vocab()
    used = {token for text in corpus for token in tokenizer.tokenize(text, add_special_tokens=True)}
    first = sorted(ids.keys() - used, key=ids.__getitem__)[:12]
    more = trim_vocabulary(_model(tokenizer), tokenizer, corpus, len(used) + 12).get_vocab()
    assert more.keys() >= used | set(first)
    assert len(more) < len(ids)
    whole = trim_vocabulary(_model(tokenizer), tokenizer, corpus, len(ids))
    assert whole.get_vocab() == ids


def test_pieces_that_bert_leaves_unused_take_no_room():
    content = {"model": {"type": "WordPiece", "vocab": {"[PAD]": 0, "[unused0]": 1, "b": 3, "a": 2}}}
    assert _in_order(content) == [0, 2, 3]


def test_special_tokens_keep_their_places_and_survive_saving(tokenizer, tmp_path):
    model = _model(tokenizer)
    trimmed = trim_vocabulary(model, tokenizer, CORPUS, 20)
    assert model.config.pad_token_id == trimmed.pad_token_id
    assert trimmed.convert_ids_to_tokens(trimmed("lovely")["input_ids"])[::len(trimmed("lovely")["input_ids"]) - 1] == [
        "[CLS]", "[SEP]",
    ]  # fmt: skip
    trimmed.save_pretrained(tmp_path)
    again = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert again(CORPUS[0])["input_ids"] == trimmed(CORPUS[0])["input_ids"]
    assert again.model_max_length == 64
    assert len(Tokenizer.from_file(str(tmp_path / "tokenizer.json")).get_vocab()) == len(trimmed)


def test_positions_that_count_from_the_padding_token_stay(tmp_path):
    tokenizer = _tokenizer("wordpiece")
    model = _model(tokenizer, MPNetConfig, MPNetForSequenceClassification)
    expected, padding = _logits(model, tokenizer, CORPUS[0]), model.get_input_embeddings().padding_idx
    trimmed = trim_vocabulary(model, tokenizer, CORPUS)
    torch.testing.assert_close(_logits(model, trimmed, CORPUS[0]), expected, rtol=0, atol=0)
    assert model.get_input_embeddings().padding_idx == padding


def test_a_kind_that_cannot_be_trimmed_is_named(tokenizer):
    plain = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]")),
        unk_token="[UNK]",
    )
    with pytest.raises(DistillError, match=r"--vocabulary: a tokenizer of kind WordLevel cannot be trimmed"):
        trim_vocabulary(_model(tokenizer), plain, CORPUS)


def test_a_student_is_trained_and_exported_with_its_own_vocabulary(chain, tmp_path):
    from distill.export.bundle import ExportOptions
    from distill.student.training import StudentOptions

    from distill import Classifier, export_student, train_student

    manifest = train_student(
        StudentOptions(
            output=tmp_path / "s",
            teacher=chain.teacher,
            layers=1,
            vocabulary=8,
            max_steps=2,
            precision="fp32",
        )
    )
    assert 8 <= manifest.details["vocabulary"] < 33
    export_student(ExportOptions(student=tmp_path / "s", output=tmp_path / "e", int8=True, max_drop=100.0))
    assert Classifier(tmp_path / "e").predict(["a lovely phone"])[0] in manifest.labels
