import random

import numpy as np
import pytest
from distill.explain.words import MAX_WORDS, split_words

PARTS = [
    "good", "day", "café", "naïve", "e\u0301te\u0301", "don't", "x-ray", "3.14", "@bob", "#win", "ROFL",
    "👍", "👍🏽👍🏽", "👩‍👩‍👧‍👦", "🇫🇷", ":-)", "!!!", "…", "“quoted”", "'", '"', "<b>", "&amp;", "\\n",
    "今日はいい天気", "世界", "안녕하세요", "สวัสดี", "नमस्ते", "سلام", "שלום", "https://x.y/a?b=1&c=%20#z", "www.example.com",
    "\u200b", "\u00a0", "\ufeff", "a\u0300\u0301", "\x1f", "½", "①", "ﬁ", "İ", "ß",
]  # fmt: skip
BLANKS = [" ", "  ", "\t", "\n\n", " \u3000", "", "\r\n"]


def _texts(count=200):
    generator = random.Random(0)
    for _ in range(count):
        words = generator.choices(PARTS, k=generator.randint(1, 40))
        yield "".join(generator.choice(BLANKS) + word for word in words) + generator.choice(BLANKS)


def test_with_nothing_masked_every_text_comes_back_byte_for_byte():
    for text in _texts():
        words = split_words(text)
        rebuilt = words.keep(np.ones(len(words.segments), dtype=bool))
        assert rebuilt.encode() == text.encode()
        assert len(words.segments) <= MAX_WORDS


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("It's a #great day, @bob!!!", ["It's", "a", "#great", "day", ",", "@bob", "!!!"]),
        ("see https://x.y/z?a=1 👩‍👩‍👧‍👦👍🏽 ok", ["see", "https://x.y/z?a=1", "👩‍👩‍👧‍👦👍🏽", "ok"]),
        ("今日は good", ["今", "日", "は", "good"]),
        ("cafe\u0301 x", ["cafe\u0301", "x"]),
        ("", []),
    ],
)
def test_words_are_what_a_reader_would_call_words(text, expected):
    assert split_words(text).words == expected


def test_a_masked_word_goes_with_the_blank_before_it():
    words = split_words("a  good day ")
    assert words.keep(np.array([True, False, True])) == "a day "
    assert words.keep(np.zeros(3, dtype=bool)) == ""


def test_long_texts_are_cut_into_a_bounded_number_of_segments():
    text = " ".join(f"word{n}" for n in range(10_000))
    words = split_words(text)
    assert MAX_WORDS // 2 <= len(words.segments) <= MAX_WORDS
    assert "".join(words.segments) == text


def test_pairs_stay_pairs():
    words = split_words(("is it good", "yes it is"))
    assert words.first == 3
    assert words.keep(np.ones(6, dtype=bool)) == ("is it good", "yes it is")
    assert words.keep(np.array([1, 1, 0, 0, 1, 1], dtype=bool)) == ("is it", " it is")
