"""The texts that the report's page can be searched for: errors, disagreements and explained texts."""

import json
from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
from distill.explain.agreement import OTHER_REASONS, compare
from distill.explain.attribution import Attribution
from distill.explain.reasons import Reasons
from distill.explain.versions import Version
from distill.explain.words import Text

from distill.decision import classes_in, same

MOST_ROWS = 2_000
MOST_BYTES = 1_500
"""Of one text that is not explained."""
MOST_CHARACTERS = 10_000
"""Of one explained text."""
ALL_BYTES = 4_000_000
"""Of all texts as the page holds them."""


def browse(
    versions: Sequence[Version], texts: Sequence[Text], labels: Sequence[str], reasons: Reasons | None
) -> dict[str, Any]:
    """What the page needs to list single texts, ready for JSON and kept small.

    Explained texts come first, then disagreements, then texts that every version got wrong; within each,
    those about which the versions were most certain. Long texts are cut, and there are no more rows than
    `MOST_ROWS` and `ALL_BYTES` allow.
    """
    truth = versions[0].test.labels
    answers = [version.answers for version in versions]
    certainties = [version.certainty for version in versions]
    explained = dict(zip(reasons.rows, reasons.attributions, strict=True)) if reasons else {}
    disputed = ~np.all([same(answers[0], other) for other in answers], axis=0)
    wrong = ~np.all([same(truth, other) for other in answers], axis=0)
    certainty = np.min(certainties, axis=0)
    rank = np.where([row in explained for row in range(len(truth))], 0, np.where(disputed, 1, 2))
    order = np.lexsort((-certainty, rank))
    listed = [row for row in order.tolist() if row in explained or disputed[row] or wrong[row]]
    rows: list[dict[str, Any]] = []
    left = ALL_BYTES
    for row in listed[:MOST_ROWS]:
        true = classes_in(truth[row])
        given = [classes_in(one[row]) for one in answers]
        sure = [round(float(one[row]), 3) for one in certainties]
        entry: dict[str, Any] = {"n": row + 1, "y": true, "a": list(zip(given, sure, strict=True))}
        if row in explained:
            entry |= _explanation(explained[row], [*true, *chain(*given)])
        else:
            entry["t"] = _shorten(texts[row])
        left -= len(embedded(entry).encode())
        if left < 0:
            break
        rows.append(entry)
    return {
        "labels": list(labels),
        "versions": [version.name for version in versions],
        "rows": rows,
        "found": len(listed),
        "texts": len(texts),
    }


def embedded(value: Any) -> str:
    """JSON that may stand inside a <script> element: no character in it can end the element."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _shorten(text: Text) -> str:
    joined = text if isinstance(text, str) else "\n".join(text)
    encoded = joined.encode("utf-8", "replace")
    if len(encoded) <= MOST_BYTES:
        return joined
    return f"{encoded[:MOST_BYTES].decode('utf-8', 'ignore')} … ({len(joined):,} characters)"


def _explanation(found: dict[str, Attribution], classes: list[int]) -> dict[str, Any]:
    """Segments and the classes worth showing; values and agreement with the first, by version and class."""
    first, *others = found.values()
    shown = list(dict.fromkeys([*classes, first.predicted]))
    agreements = [[compare(first, other, label) for label in shown] for other in others]
    chosen = shown.index(first.predicted)
    most = max(20, MOST_CHARACTERS // max(1, len(first.words.segments)))
    segments = [one if len(one) <= most else f"{one[:most]} …" for one in first.words.segments]
    if first.words.first:
        segments[first.words.first - 1] += "\n"
    return {
        "w": segments,
        "c": shown,
        "v": [np.round(one.values[:, shown].T, 3).tolist() for one in found.values()],
        "r": [
            [
                [
                    None if np.isnan(value) else round(value, 2)
                    for value in (one.rank_correlation, one.top_overlap, one.sign_flips)
                ]
                for one in by_class
            ]
            for by_class in agreements
        ],
        "o": [bool(by_class[chosen].rank_correlation < OTHER_REASONS) for by_class in agreements],
    }
