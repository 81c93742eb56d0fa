"""The page: self-contained, harmless whatever the texts hold, and small."""

import json
import random
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from distill.explain.agreement import OTHER_REASONS
from distill.explain.attribution import Attribution
from distill.explain.browser import browse
from distill.explain.page import render_page
from distill.explain.reasons import Reasons
from distill.explain.report import ReportOptions, compile_report
from distill.explain.versions import Version
from distill.explain.words import split_words

from distill.decision import Decision
from distill.predictions import Predictions

ATTACKS = [
    "<script>alert(1)</script>",
    "</script><img src=x onerror=alert(1)>",
    "<!-- </style> {{ 7*7 }} {% raw %} ${1}",
]


class Parser(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.references = [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        for name, value in attributes:
            if name in ("src", "href", "srcset", "action", "data", "poster"):
                self.references.append(value)
            assert not name.startswith("on"), f"{tag} has {name}"


def _parse(page):
    parser = Parser()
    parser.feed(page)
    return parser


@pytest.fixture(scope="module")
def compiled(chain):
    report, browsed, _ = compile_report(
        ReportOptions(chain.teacher, chain.student, chain.export, texts=2, explain=3)
    )
    return report, browsed


def test_the_page_asks_the_network_for_nothing(compiled):
    page = render_page(*compiled)
    parser = _parse(page)
    assert all(reference.startswith(("#", "data:")) for reference in parser.references)
    assert parser.tags.count("script") == 2 and "link" in parser.tags
    assert not re.search(r"https?://|@import|url\(", page.replace("http://www.w3.org/2000/svg", ""))


def test_the_verdict_and_all_versions_stand_on_the_page(compiled):
    report, browsed = compiled
    page = render_page(report, browsed)
    assert f"<h1>{report['verdict']['headline']}</h1>" in page
    for row in report["versions"]:
        assert f"{row['scores']['macro_f1']:.4f}" in page
    for section in ("versions", "classes", "confusions", "confidence", "reasons", "texts"):
        assert f'<section id="{section}"' in page


def test_labels_and_texts_cannot_break_out(compiled):
    report = json.loads(json.dumps(compiled[0]).replace('"negative"', json.dumps(ATTACKS[0])))
    browsed = {
        **compiled[1],
        "labels": ATTACKS,
        "rows": [{"n": 1, "y": [0], "a": [[[0], 0.5]] * 3, "t": " ".join(ATTACKS)}],
    }
    page = render_page(report, browsed)
    parser = _parse(page)
    assert parser.tags.count("script") == 2 and "img" not in parser.tags
    assert "<script>alert(1)" not in page
    payload = re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.S)[1]
    assert json.loads(payload)["rows"][0]["t"] == " ".join(ATTACKS)


def _versions(count, classes, generator, tmp_path):
    labels = generator.integers(0, classes, size=count)
    versions = []
    for name in ("teacher", "student", "int8"):
        logits = generator.normal(size=(count, classes)).astype(np.float32)
        logits[np.arange(count), labels] += 1.5
        answers = Predictions([str(n) for n in range(count)], labels, logits)
        versions.append(Version(name, tmp_path, "x.onnx", 1, 64, answers, answers, Decision()))
    return versions


def _attribution(text, classes, generator):
    words = split_words(text)
    values = generator.normal(0, 0.1, size=(len(words.segments), classes))
    base = np.full(classes, 1 / classes)
    return Attribution(words, values, base, base + values.sum(axis=0))


@pytest.mark.parametrize("classes", [3, 150])
def test_two_thousand_texts_make_at_most_five_megabytes(compiled, classes, tmp_path):
    generator = np.random.default_rng(0)
    shuffled = random.Random(0)
    texts = [" ".join(f"word{shuffled.randint(0, 999)}" for _ in range(60)) for _ in range(1998)]
    texts += [ATTACKS[0], "x" * 10_000]
    versions = _versions(2000, classes, generator, tmp_path)
    last = versions[0].test
    last.logits[-1, (last.labels[-1] + 1) % classes] = 99  # the longest text is one that a version got wrong
    explained = [
        {version.name: _attribution(texts[row], classes, generator) for version in versions}
        for row in range(300)
    ]
    labels = [f"class {n}" for n in range(classes)]
    browsed = browse(versions, texts, labels, Reasons(list(range(300)), 200, explained))
    page = render_page(compiled[0], browsed)
    assert len(page.encode()) <= 5_000_000
    listed = {row["n"]: row for row in browsed["rows"]}
    assert listed[2000]["t"].endswith("(10,000 characters)")


@pytest.mark.parametrize("text", ["<b>&amp;</b> " * 125, "x" * 100_000, "語 " * 3_000])
def test_long_texts_full_of_markup_stay_within_five_megabytes_too(compiled, text, tmp_path):
    generator = np.random.default_rng(0)
    versions = _versions(2000, 3, generator, tmp_path)
    texts = [f"{n} {text}" for n in range(2000)]
    explained = [
        {version.name: _attribution(texts[row], 3, generator) for version in versions} for row in range(60)
    ]
    browsed = browse(versions, texts, ["a", "b", "c"], Reasons(list(range(60)), 40, explained))
    page = render_page(compiled[0], browsed)
    assert len(page.encode()) <= 5_000_000
    assert f"of {browsed['found']} texts" in page or len(browsed["rows"]) == browsed["found"]


def test_the_browser_lists_explained_then_disputed_then_wrong_texts(tmp_path):
    generator = np.random.default_rng(1)
    versions = _versions(100, 3, generator, tmp_path)
    texts = [f"text number {n}" for n in range(100)]
    found = {version.name: _attribution(texts[7], 3, generator) for version in versions}
    browsed = browse(versions, texts, ["a", "b", "c"], Reasons([7], 1, [found]))
    rows = browsed["rows"]
    assert rows[0]["n"] == 8 and rows[0]["w"] == ["text", " number", " 7"]
    values = found["int8"].values
    np.testing.assert_allclose(rows[0]["v"][2], values[:, rows[0]["c"]].T, atol=5e-4)
    chosen = rows[0]["c"].index(found["teacher"].predicted)
    assert rows[0]["o"] == [r[chosen][0] is not None and r[chosen][0] < OTHER_REASONS for r in rows[0]["r"]]
    predicted = np.stack([version.answers for version in versions])
    truth = versions[0].test.labels
    wanted = {n for n in range(100) if (predicted[:, n] != truth[n]).any()} | {7}
    assert {row["n"] - 1 for row in rows} == wanted
    disputed = [len({tuple(labels) for labels, _ in row["a"]}) > 1 for row in rows[1:]]
    assert disputed == sorted(disputed, reverse=True)
