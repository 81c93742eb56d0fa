import random

import pytest
from conftest import make_rows, train_tokenizer
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors

from distill import word_table
from distill.word_table import WordTable

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
# Blanks, controls, marks, what normalization changes, scripts without blanks, special tokens and their like.
ODD = [
    *"  \t\n\r\x0b\x0c\x1c\x1f\x85\xa0\u2028\u3000\u200b\ufeff\x00\x7f\xad'’\"!?.,-_[]#@ΣςİıßÅé\u0301\u0338≠ＡﬁŒ中国の가\u1100👍🏽"
]
WORDS = [
    *SPECIAL,
    "[mask]",
    "  ",
    "don't",
    "a\x7fABC",
    "abc",
    "I'LL",
    "##ly",
    "x" * 120,
    "é" * 101,
    "love",
    "Phone",
    "Lovely,",
]


def _tokenizer(kind: str = "wordpiece", **normalizer: bool) -> Tokenizer:
    corpus = [text for text, _ in make_rows(200)] + ["don't I'LL 0123 abc XYZ é Σ 中 the-end ! ? , ."]
    tokenizer = train_tokenizer(kind, corpus, SPECIAL)
    if kind == "wordpiece":
        tokenizer.normalizer = normalizers.BertNormalizer(**normalizer)
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.enable_truncation(16)
    return tokenizer


def _changed(kind: str, change) -> Tokenizer:
    tokenizer = _tokenizer(kind)
    change(tokenizer)
    return tokenizer


def _without_a(model) -> Tokenizer:
    tokenizer = Tokenizer(model)
    wordpiece = isinstance(model, models.WordPiece)
    if wordpiece:
        tokenizer.normalizer = normalizers.BertNormalizer()
    splitters = pre_tokenizers.BertPreTokenizer(), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = splitters[0 if wordpiece else 1]
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.enable_truncation(16)
    return tokenizer


def _texts(count: int) -> list[str]:
    generator = random.Random(0)
    kinds = [
        lambda: generator.choice(ODD),
        lambda: generator.choice(WORDS),
        lambda: chr(
            generator.choice([generator.randrange(0x20, 0xD800), generator.randrange(0xE000, 0x20000)])
        ),
        lambda: " " + generator.choice(WORDS),
        lambda: generator.choice("abcXYZ019 "),
    ]
    made = ["".join(generator.choice(kinds)() for _ in range(generator.randrange(14))) for _ in range(count)]
    return made + [f"{text} {text.title()}!" for text, _ in make_rows(50, seed=1)]


@pytest.mark.parametrize(
    "tokenizer",
    [
        _tokenizer(),
        _tokenizer(lowercase=False),
        _tokenizer(lowercase=False, strip_accents=True),
        _tokenizer(strip_accents=False, clean_text=False),
        _tokenizer(lowercase=False, strip_accents=False, clean_text=False, handle_chinese_chars=False),
        _changed("wordpiece", lambda one: one.add_tokens([AddedToken("Phone,", normalized=True), "[love]"])),
        _changed("wordpiece", lambda one: one.add_tokens([AddedToken("abc", normalized=False)])),
        _tokenizer("byte-level bpe"),
    ],
)
def test_a_table_gives_what_the_tokenizer_gives(tokenizer, monkeypatch):
    monkeypatch.setattr(word_table, "SIZE", 500)  # so that it is emptied now and then
    table, told, cut = WordTable(tokenizer), 0, 0
    for text in _texts(4000):
        tokens, encoding = table.tokens(text), tokenizer.encode(text)
        if tokens is not None:
            assert tokens.ids == encoding.ids, text
            assert tokens.cut == bool(encoding.overflowing)
            assert tokens.type_ids is None and not any(encoding.type_ids)
            told, cut = told + 1, cut + tokens.cut
    assert told > 500 and cut > 5
    assert len(table) <= 500 and max(map(len, table)) <= word_table.LONGEST


def test_a_word_is_asked_for_once(monkeypatch):
    table = WordTable(_tokenizer())
    first = table.tokens("lovely phone"), table.tokens("a Phone, lovely")
    monkeypatch.setattr(table, "_model", None)
    monkeypatch.setattr(table, "_tokenizer", None)
    assert (table.tokens("Lovely phone"), table.tokens("a phone, lovely")) == first
    assert table.tokens("") == ([2, 3], None, False)


def test_special_tokens_in_a_text_are_left_to_the_tokenizer():
    assert WordTable(_tokenizer()).tokens("a [MASK] phone") is None


@pytest.mark.parametrize(
    "tokenizer",
    [
        _tokenizer("unigram"),
        _changed("wordpiece", lambda one: setattr(one, "normalizer", normalizers.Lowercase())),
        _changed("wordpiece", lambda one: setattr(one, "pre_tokenizer", pre_tokenizers.Whitespace())),
        _changed("wordpiece", lambda one: one.add_tokens([AddedToken("très phone", normalized=True)])),
        _changed("wordpiece", lambda one: one.enable_truncation(16, strategy="only_first")),
        _changed("byte-level bpe", lambda one: setattr(one, "post_processor", None)),
        _without_a(models.WordPiece({"[PAD]": 0, "b": 1, "[CLS]": 2, "[SEP]": 3})),
        _without_a(models.BPE({"[PAD]": 0, "b": 1, "[CLS]": 2, "[SEP]": 3}, [])),
        _changed("wordpiece", lambda one: one.enable_truncation(16, direction="left")),
        _changed("wordpiece", lambda one: one.enable_truncation(2)),
        _changed("byte-level bpe", lambda one: setattr(one.model, "dropout", 0.1)),
        _changed("byte-level bpe", lambda one: setattr(one, "pre_tokenizer", pre_tokenizers.ByteLevel())),
    ],
)
def test_other_tokenizers_have_none(tokenizer):
    assert WordTable.of(tokenizer) is None
