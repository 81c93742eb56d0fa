"""Words of a text, in any script, with the blanks before them: joined, they are the text, byte for byte."""

import regex

# A web address; one ideograph or kana (scripts without blanks); letters with inner apostrophes, hyphens and
# dots and perhaps a leading @ or #; a run of anything else (punctuation, emoji with their joiners).
WORD = regex.compile(
    r"https?://\S+"
    r"|[\p{Han}\p{Hiragana}\p{Katakana}]"
    r"|[@#]?(?:(?![\p{Han}\p{Hiragana}\p{Katakana}])[\p{L}\p{M}\p{N}_])+"
    r"(?:['’.\-](?:(?![\p{Han}\p{Hiragana}\p{Katakana}])[\p{L}\p{M}\p{N}_])+)*"
    r"|(?:(?![\p{L}\p{N}_])\S)+"
    r"|\S"
)


def segments(text: str) -> list[str]:
    """Cut a text into words, each with the blanks before it; the last one also has the blanks at the end."""
    ends = [match.end() for match in WORD.finditer(text)]
    if not ends:
        return [text] if text else []
    starts = [0, *ends[:-1]]
    ends[-1] = len(text)
    return [text[start:end] for start, end in zip(starts, ends, strict=True)]
