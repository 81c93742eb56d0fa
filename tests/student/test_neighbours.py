"""Words that are alike by a table of embeddings."""

import pytest
import torch
from conftest import train_tokenizer
from distill.student.neighbours import similar_words
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

WORDS = ["good", "great", "bad", "awful", "plot", "actor"]
SPECIAL = ["[PAD]", "[UNK]"]


@pytest.fixture(params=["wordpiece", "byte-level bpe", "unigram"])
def tokenizer(request):
    text = [" ".join(WORDS), " ".join(reversed(WORDS))] * 50
    if request.param == "unigram":
        pieces = [*((token, 0.0) for token in SPECIAL), *((f"\u2581{word}", -2.0) for word in WORDS)]
        trained = Tokenizer(models.Unigram(pieces, unk_id=1))
        trained.pre_tokenizer, trained.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    else:
        trained = train_tokenizer(request.param, text, SPECIAL)
    trained.enable_padding(length=20)  # as the files of sentence encoders come
    return PreTrainedTokenizerFast(tokenizer_object=trained, pad_token="[PAD]", unk_token="[UNK]")


def _model(tokenizer, groups):
    """Words of a group have nearly the same embedding."""
    config = BertConfig(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                        intermediate_size=16)  # fmt: skip
    torch.manual_seed(0)
    model = BertForSequenceClassification(config)
    with torch.no_grad():
        for group in groups:
            meaning = torch.randn(16)
            for word in group:
                for blank in ("", " "):
                    ids = tokenizer(blank + word, add_special_tokens=False)["input_ids"]
                    if len(ids) == 1:
                        model.get_input_embeddings().weight[ids[0]] = meaning + 0.01 * torch.randn(16)
    return model


def test_a_word_stands_with_those_of_the_corpus_that_it_is_most_like(tokenizer):
    model = _model(tokenizer, [("good", "great"), ("bad", "awful")])
    found = similar_words(["good", "awful", "good"], model, tokenizer, count=1)
    # Each of the six with one of the corpus, and none with itself.
    assert set(found) == {"good", "awful"}
    assert found["good"][0] == "great" and found["awful"][0] == "bad"
    others = {"great", "bad", "plot", "actor"}
    assert others <= {*found["good"], *found["awful"]} and "good" not in found["good"]
    assert "awful" in found["good"] and "good" in found["awful"]
    both = similar_words(["good", "awful"], model, tokenizer)
    assert others <= set(both["good"]) and others <= set(both["awful"])


def test_words_of_any_script_that_have_marks_or_stand_without_blanks():
    pieces = [*((token, 0.0) for token in SPECIAL), ("\u2581", -3.0)]
    pieces += [(word, -2.0) for word in ("\u2581हिन्दी", "\u2581தமிழ்", "好", "坏")]
    trained = Tokenizer(models.Unigram(pieces, unk_id=1))
    trained.pre_tokenizer, trained.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=trained, pad_token="[PAD]", unk_token="[UNK]")
    found = similar_words(["हिन्दी", "好"], _model(tokenizer, []), tokenizer)
    assert set(found["हिन्दी"]) == {"தமிழ்", "好", "坏"}
    assert set(found["好"]) == {"தமிழ்", "हिन्दी", "坏"}


def test_words_of_several_tokens_or_none_are_left_out(tokenizer):
    assert similar_words(["goodactor", "", "!?"], _model(tokenizer, []), tokenizer) == {}
