import asyncio
import itertools
import json
import os
import pickle
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow
import pytest
from conftest import make_rows

from distill import Classifier, DistillError
from distill.artifact import read_manifest
from distill.bundle import open_bundle
from distill.runtime import cores

TEXTS = [text for text, _ in make_rows(50, seed=3)]


@pytest.fixture(scope="module")
def classifier(chain):
    return Classifier(chain.export)


@pytest.fixture(scope="module")
def pipeline(chain):
    # Optimum does not import under transformers 5.
    ORTModelForSequenceClassification = pytest.importorskip(
        "optimum.onnxruntime.modeling", exc_type=ImportError
    ).ORTModelForSequenceClassification
    from transformers import AutoTokenizer
    from transformers import pipeline as build

    model = ORTModelForSequenceClassification.from_pretrained(
        chain.export, subfolder="onnx", file_name="model_quantized.onnx"
    )
    return build("text-classification", model=model, tokenizer=AutoTokenizer.from_pretrained(chain.export))


def test_a_process_that_predicts_loads_neither_torch_nor_transformers(chain, tmp_path):
    code = (
        "import sys, distill\n"
        f"print(distill.Classifier({str(chain.export)!r}).predict(['a lovely phone']))\n"
        "heavy = {'torch', 'transformers', 'datasets', 'pyarrow', 'sklearn', 'optimum', 'onnx', 'pandas', 'rich'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


def test_optimum_and_transformers_give_the_same_answers_for_single_texts(chain, classifier, pipeline):
    uncalibrated = Classifier(chain.export, calibrated=False)
    for text in TEXTS:
        mine, theirs = uncalibrated(text)[0], pipeline(text)[0]
        assert classifier(text)[0]["label"] == theirs["label"]
        assert mine["label"] == theirs["label"]
        assert mine["score"] == pytest.approx(theirs["score"], abs=1e-5)


@pytest.mark.parametrize("options", [{}, {"top_k": None}, {"top_k": 1}, {"top_k": 2}])
@pytest.mark.parametrize("texts", ["a lovely phone", ["a lovely phone"], TEXTS[:3]])
def test_a_call_has_the_shape_of_a_pipelines_answer(classifier, pipeline, texts, options):
    def shape(answer):
        return [shape(item) for item in answer] if isinstance(answer, list) else answer["label"]

    assert shape(classifier(texts, **options)) == shape(pipeline(texts, **options))


def test_probabilities_sum_to_one_and_agree_with_labels(classifier):
    probabilities = classifier.predict_proba(TEXTS)
    assert probabilities.shape == (50, 3)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1)
    assert [classifier.labels[i] for i in probabilities.argmax(axis=1)] == classifier.predict(TEXTS)


def test_the_temperature_of_the_bundle_is_applied_and_can_be_switched_off(chain, classifier):
    from scipy.special import softmax

    fitted = read_manifest(chain.export, "export").details["temperature"]
    assert set(fitted) == {"onnx/model.onnx", "onnx/model_quantized.onnx"}
    temperature = fitted["onnx/model_quantized.onnx"]
    assert temperature != 1
    logits = classifier.predict_logits(TEXTS).astype(float)
    np.testing.assert_allclose(classifier.predict_proba(TEXTS), softmax(logits / temperature, axis=1))
    plain = Classifier(chain.export, calibrated=False)
    np.testing.assert_allclose(plain.predict_proba(TEXTS), softmax(logits, axis=1))
    assert plain.predict(TEXTS) == classifier.predict(TEXTS)


def test_many_threads_sharing_a_classifier_get_what_one_alone_gets(chain):
    shared = Classifier(chain.export, threads=2)
    alone = Classifier(chain.export, threads=1).predict_logits(TEXTS)
    with ThreadPoolExecutor(8) as pool:
        for found in pool.map(shared.predict_logits, [TEXTS] * 16):
            np.testing.assert_array_equal(found, alone)


def test_coroutines_get_the_same_answers(chain, classifier):
    async def ask():
        shared = Classifier(chain.export, threads=2)
        return await asyncio.gather(*(shared.apredict(TEXTS[i : i + 5]) for i in range(0, 50, 5)),
                                    shared.apredict_proba(TEXTS))  # fmt: skip

    *labels, probabilities = asyncio.run(ask())
    assert sum(labels, []) == classifier.predict(TEXTS)
    np.testing.assert_array_equal(probabilities, classifier.predict_proba(TEXTS))


def test_a_text_that_fails_is_reported_and_leaves_the_classifier_usable(chain, monkeypatch):
    shared = Classifier(chain.export, threads=3)
    answer = shared._engine.logits

    def fail(text):
        if text == "broken":
            raise ValueError("boom")
        return answer(text)

    monkeypatch.setattr(shared._engine, "logits", fail)
    with pytest.raises(ValueError, match="boom"):
        shared.predict(["lovely", "broken", *TEXTS])
    assert shared.predict(TEXTS) == Classifier(chain.export).predict(TEXTS)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_process_that_was_forked_goes_on_answering(chain):
    code = (
        f"import asyncio, os, distill\nc = distill.Classifier({str(chain.export)!r}, threads=2)\n"
        "texts = ['a lovely phone', 'awful'] * 20\n"
        "before = c.predict(texts)\n"
        "stream = lambda: [c.labels[p.argmax()] for p in c.stream_proba(texts)]\n"
        "assert stream() == before == asyncio.run(c.apredict(texts))\n"
        "child = os.fork()\n"
        "if not child: os._exit(0 if c.predict(texts) == stream() == asyncio.run(c.apredict(texts)) == before else 3)\n"
        "raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_stream_gives_probabilities_in_order(chain, classifier):
    answers = list(Classifier(chain.export, threads=3).stream_proba(iter(TEXTS)))
    np.testing.assert_array_equal(np.stack(answers), classifier.predict_proba(TEXTS))


def test_threads_change_neither_order_nor_result(chain):
    one, four = Classifier(chain.export, threads=1), Classifier(chain.export, threads=4)
    np.testing.assert_array_equal(one.predict_logits(TEXTS), four.predict_logits(TEXTS))


def test_no_texts_give_no_answers(classifier):
    assert classifier.predict([]) == []
    assert classifier.predict_proba([]).shape == (0, 3)


def test_a_single_string_and_other_types_are_refused(classifier):
    with pytest.raises(DistillError, match="give a list"):
        classifier.predict("lovely")
    with pytest.raises(DistillError, match="give a list"):
        next(classifier.stream_proba("lovely"))
    with pytest.raises(DistillError, match=r"texts\[1\]: int"):
        classifier.predict(["a", ("a", 3)])
    with pytest.raises(DistillError, match=r"texts\[0\]: half of a character"):
        classifier.predict(["\ud800 hello"])
    with pytest.raises(DistillError, match=r"texts\[3\]: NoneType"):
        list(classifier.stream_logits(["a", "b", "c", None]))
    for one in (None, "\ud800 hello", ("a", None)):
        with pytest.raises(DistillError, match=r"text: (NoneType|half of a character)"):
            classifier.logits(one)
    with pytest.raises(DistillError, match="texts: NoneType instead of a list"):
        classifier.predict(None)
    for table in ({"text": "lovely"}, pyarrow.table({"text": ["lovely"]})):
        for ask in (classifier, classifier.predict, lambda texts: next(classifier.stream_logits(texts))):
            with pytest.raises(
                DistillError, match=r"texts: (dict|Table) instead of a list .* give its column"
            ):
                ask(table)
    assert classifier("lovely", truncation=True) == classifier("lovely")
    assert repr(classifier).startswith("Classifier(onnx/model_quantized.onnx on cpu, labels negative, ")
    for top_k in (0, -1, "all"):
        with pytest.raises(DistillError, match=f"top_k={top_k}: must be at least 1"):
            classifier("lovely", top_k=top_k)
    for threads in (0, True):
        with pytest.raises(DistillError, match=rf"threads={threads}: must be a whole number of at least 1"):
            Classifier("anywhere", threads=threads)
    with pytest.raises(TypeError, match="open the bundle in each process"):
        pickle.dumps(classifier)
    with pytest.raises(DistillError, match=r"texts\[1\]: int"):
        classifier.predict(["lovely", 3])


def test_texts_may_come_from_a_generator(classifier):
    assert classifier.predict(text for text in TEXTS) == classifier.predict(TEXTS)


def test_a_text_without_tokens_is_answered(chain, tmp_path):
    shutil.copytree(chain.export, tmp_path / "b")
    path = tmp_path / "b" / "tokenizer.json"
    settings = json.loads(path.read_text())
    settings["post_processor"] = None
    path.write_text(json.dumps(settings))
    assert np.isfinite(Classifier(open_bundle(tmp_path / "b", sealed=False)).logits("")).all()


def test_long_and_empty_texts_are_answered(classifier):
    assert len(classifier.predict(["lovely " * 10_000, ""])) == 2


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("cuda", [False, True])
def test_a_stream_that_breaks_off_answers_what_came_before(chain, threads, cuda, monkeypatch):
    def texts():
        yield from TEXTS[:3]
        raise OSError("the connection was lost")

    classifier = Classifier(chain.export, provider="cpu", file="onnx/model.onnx", threads=threads)
    if cuda:
        monkeypatch.setattr(classifier, "provider", "cuda")  # batches, on the CPU
    found = []
    with pytest.raises(OSError, match="the connection was lost"):
        for logits in classifier.stream_logits(texts()):
            found.append(logits)
    expected = Classifier(chain.export, file="onnx/model.onnx").predict_logits(TEXTS[:3])
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("quota", "expected"),
    [("150000 100000", 2), ("10000 100000", 1), ("max 100000", 8), ("6400000 100000", 8)],
)
def test_a_containers_quota_counts(tmp_path, monkeypatch, quota, expected):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(8), raising=False)
    monkeypatch.setattr("distill.runtime.CPU_QUOTA", tmp_path / "cpu.max")
    assert cores() == 8
    (tmp_path / "cpu.max").write_text(f"{quota}\n")
    assert cores() == expected


def test_streaming_reads_only_a_little_ahead(chain):
    taken = itertools.count()
    answers = Classifier(chain.export, threads=2).stream_logits(
        f"lovely {next(taken)}" for _ in range(10_000)
    )
    for _ in range(20):
        next(answers)
    assert next(taken) < 60


def test_the_words_of_a_text_are_looked_up(chain):
    one = Classifier(chain.export)
    one.predict(["lovely phone"])
    assert {"lovely", "phone"} <= one._engine._words.keys()


def test_pairs_are_encoded_as_pairs(chain):
    classifier = Classifier(chain.export)
    single = classifier.logits("lovely phone awful")
    classifier.pairs = True
    pair = classifier.logits(("lovely phone", "awful"))
    assert not np.allclose(single, pair)


def test_a_bundle_of_pairs_answers_no_single_text_and_the_other_way_round(chain):
    classifier = Classifier(chain.export)
    assert not classifier.pairs
    with pytest.raises(
        DistillError, match=r"texts\[1\]: a pair, and this bundle was trained on single texts"
    ):
        classifier.predict(["lovely", ("lovely phone", "awful")])
    classifier.pairs = True
    with pytest.raises(DistillError, match=r"texts\[0\]: one text, and this bundle was trained on pairs"):
        classifier.predict_proba(["lovely"])
    for answer in (classifier.logits, classifier.outputs, lambda text: next(classifier.stream_proba([text]))):
        with pytest.raises(DistillError, match="one text"):
            answer("lovely")
    assert len(classifier.predict([("lovely phone", "awful")])) == 1


def test_auto_says_what_it_chose_and_why(chain, caplog):
    caplog.set_level("INFO", logger="distill")
    Classifier(chain.export, provider="cpu")
    assert not caplog.messages
    Classifier(chain.export)
    said = f"{chain.export}: onnx/model_quantized.onnx on cpu: this onnxruntime has no CUDA provider"
    assert caplog.messages == [said]


@pytest.mark.parametrize("bundle", [None, 3, ["runs/export"]])
def test_what_is_no_bundle_is_refused(bundle):
    with pytest.raises(
        DistillError,
        match="bundle: [a-zA-Z]+ instead of a path; name what `distill export` wrote",
    ):
        Classifier(bundle)


def test_a_set_has_no_order_to_answer_in(classifier):
    with pytest.raises(DistillError, match="texts: a set; give a list"):
        classifier.predict({"lovely", "awful"})


def test_an_unknown_provider_is_refused(chain):
    with pytest.raises(DistillError, match="unknown; use auto, cpu or cuda"):
        Classifier(chain.export, provider="tpu")


def test_a_session_that_falls_back_from_cuda_is_refused(chain, monkeypatch):
    import onnxruntime

    session = onnxruntime.InferenceSession

    def fallen_back(path, options, providers, **kwargs):
        return session(path, options, providers=["CPUExecutionProvider"])

    monkeypatch.setattr(
        onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
    )
    monkeypatch.setattr(onnxruntime, "InferenceSession", fallen_back)
    with pytest.raises(DistillError, match="fell back to CPUExecutionProvider"):
        Classifier(chain.export, provider="cuda")
    assert Classifier(chain.export).provider == "cpu"  # nobody asked for CUDA, so the CPU will do
