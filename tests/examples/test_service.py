import asyncio
import math
import time

import numpy as np
import pytest
from conftest import make_rows

pytest.importorskip("fastapi")
from distill.examples.embedding import service
from distill.examples.embedding.service import Batcher, Overloaded, Settings, create_app
from fastapi.testclient import TestClient

from distill import Classifier, DistillError

TEXTS = [text for text, _ in make_rows(20, seed=6)]


@pytest.fixture(scope="module")
def client(chain):
    with TestClient(create_app(Settings(bundle=str(chain.export), provider="cpu"))) as client:
        yield client


def test_predictions_are_those_of_the_classifier(chain, client):
    answers = client.post("/predict", json={"texts": TEXTS}).json()["predictions"]
    classifier = Classifier(chain.export)
    assert [answer["label"] for answer in answers] == classifier.predict(TEXTS)
    found = [[answer["probabilities"][label] for label in classifier.labels] for answer in answers]
    np.testing.assert_allclose(found, classifier.predict_proba(TEXTS))
    assert all(answer["score"] == max(answer["probabilities"].values()) for answer in answers)


def test_a_bundle_of_pairs_is_refused(chain, monkeypatch):
    monkeypatch.setattr("distill.runtime.second_column", lambda data: "second")
    with pytest.raises(DistillError, match="trained on pairs of texts"):
        create_app(Settings(bundle=str(chain.export), provider="cpu"))


def test_health_and_metrics(client):
    health = client.get("/health").json()
    assert health["status"] == "ok" and health["provider"] == "cpu" and health["waiting"] == 0
    before = client.get("/metrics").text
    client.post("/predict", json={"texts": ["lovely"]})
    client.post("/predict", json={"texts": []})
    after = client.get("/metrics").text

    def value(text, name):
        return next((float(line.split()[-1]) for line in text.splitlines() if line.startswith(name)), 0.0)

    assert value(after, "distill_texts_total") >= 1
    for status in ("200", "422"):
        name = f'distill_requests_total{{status="{status}"}}'
        assert value(after, name) == value(before, name) + 1
    assert value(after, "distill_texts_waiting") == 0


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"texts": []}, 422),
        ({"texts": "a string"}, 422),
        ({"texts": [1]}, 422),
        ({"texts": ["x"] * 129}, 422),
        ({"texts": ["x" * 20_001]}, 422),
        ({}, 422),
        ({"texts": [""]}, 200),
        ({"texts": ["x" * 20_000]}, 200),
    ],
)
def test_sizes_have_limits(client, body, status):
    assert client.post("/predict", json=body).status_code == status


def test_a_body_that_is_too_large_is_refused_before_it_is_read(client):
    assert client.post("/predict", content=b"x" * (service.MAX_BYTES + 1)).status_code == 413
    assert client.post("/predict", content=iter([b"{}"])).status_code == 411
    answer = client.post("/predict", content=b"not JSON")
    assert answer.status_code == 422 and "content-type" in answer.json()["detail"]


def test_limits_hold_behind_a_proxy_and_in_another_application(chain):
    app = create_app(Settings(bundle=str(chain.export), provider="cpu"))
    with TestClient(app, root_path="/api") as client:
        assert client.post("/api/predict", json={"texts": ["lovely"]}).status_code == 200
        assert client.post("/api/predict", content=b"x" * (service.MAX_BYTES + 1)).status_code == 413
        assert client.post("/api/predict", content=iter([b"{}"])).status_code == 411
        counted = client.get("/api/metrics").text
    assert all(f'distill_requests_total{{status="{status}"}} 1.0' in counted for status in (200, 411, 413))


def test_bodies_have_a_budget_and_a_time(client, monkeypatch):
    async def app(scope, receive, send):
        read.append((await receive())["body"])
        await service.JSONResponse({})(scope, receive, send)

    async def ask(watch, receive):
        await watch(scope, receive, sent.append_later)

    class Sent(list):
        async def append_later(self, message):
            self.append(message.get("status"))

    async def whole():
        return {"type": "http.request", "body": b"{}", "more_body": False}

    async def never():
        await asyncio.sleep(60)

    async def gone():
        return {"type": "http.disconnect"}

    scope = {
        "type": "http", "method": "POST", "path": "/predict", "headers": [(b"content-length", b"40")],
        "app": client.app,
    }  # fmt: skip
    read, sent = [], Sent()
    watch = service.Watch(app, timeout=0.05)
    monkeypatch.setattr(service, "MAX_BYTES_AT_ONCE", 100)

    async def work():
        slow = [asyncio.create_task(ask(watch, never)) for _ in range(2)]
        await asyncio.sleep(0.01)
        await ask(watch, whole)  # no room beside them
        await asyncio.gather(*slow)
        await ask(watch, whole)
        await ask(watch, gone)

    asyncio.run(work())
    assert [status for status in sent if status] == [503, 408, 408, 200]
    assert read == [b"{}"] and watch._bytes == 0


def test_a_service_that_answers_no_more_is_not_healthy(chain):
    with TestClient(create_app(Settings(bundle=str(chain.export), provider="cpu"))) as client:
        client.portal.call(client.app.state.worker.cancel)
        answer = client.get("/health")
        assert answer.status_code == 503 and "start the service again" in answer.json()["detail"]


class _Slow:
    """A classifier that takes its time and remembers its batches."""

    def __init__(self, seconds=0.05):
        self.seconds, self.batches = seconds, []

    async def apredict_logits(self, texts):
        self.batches.append(list(texts))
        await asyncio.sleep(self.seconds)
        if "bad" in texts:
            raise ValueError("bad")
        return np.array([[len(text), 0.0] for text in texts])


async def _with_batcher(batcher, work):
    worker = asyncio.create_task(batcher.run())
    try:
        return await work()
    finally:
        worker.cancel()


def test_what_waits_is_answered_together_and_each_gets_its_own():
    classifier = _Slow()
    batcher = Batcher(classifier, max_waiting=1000, timeout=5)

    async def work():
        return await asyncio.gather(*(batcher.classify(["x" * n] * n) for n in range(1, 9)))

    answers = asyncio.run(_with_batcher(batcher, work))
    for n, answer in enumerate(answers, start=1):
        assert answer.shape == (n, 2) and (answer[:, 0] == n).all()
    assert len(classifier.batches) <= 2 and batcher.waiting == 0


def test_a_batch_has_a_limit_but_a_request_is_never_split(monkeypatch):
    monkeypatch.setattr(service, "MAX_BATCH", 10)
    classifier = _Slow(0.01)
    batcher = Batcher(classifier, max_waiting=1000, timeout=5)

    async def work():
        await asyncio.gather(*(batcher.classify(["x"] * n) for n in (4, 4, 4, 12, 1)))

    asyncio.run(_with_batcher(batcher, work))
    assert [len(batch) for batch in classifier.batches] == [8, 4, 12, 1]


def test_a_full_queue_sheds_at_once_and_recovers():
    batcher = Batcher(_Slow(0.3), max_waiting=5, timeout=5)

    async def work():
        first = [asyncio.create_task(batcher.classify(["x"])) for _ in range(5)]
        await asyncio.sleep(0)
        started = time.perf_counter()
        with pytest.raises(Overloaded, match="5 texts are waiting"):
            await batcher.classify(["y"], 80)
        with pytest.raises(Overloaded, match="5 texts are waiting"):
            await batcher.classify(["yyyyyyyy"], 90)
        assert time.perf_counter() - started < 0.15 and batcher.refused == 80
        await asyncio.gather(*first)
        await asyncio.sleep(0)
        assert batcher.refused == math.inf
        return await batcher.classify(["yy"])

    assert asyncio.run(_with_batcher(batcher, work))[0, 0] == 2


def test_no_more_texts_wait_than_can_be_answered_in_time(monkeypatch):
    monkeypatch.setattr(service, "MEASURED", 1)
    batcher = Batcher(_Slow(0.2), max_waiting=1000, timeout=1)

    async def work():
        await batcher.classify(["x"])  # 5 a second: not quite 4 within most of the time
        first = [asyncio.create_task(batcher.classify(["x"])) for _ in range(3)]
        await asyncio.sleep(0)
        with pytest.raises(Overloaded, match="3 texts are waiting"):
            await batcher.classify(["y"], 80)
        assert batcher.refused == 80
        await asyncio.gather(*first)
        return await batcher.classify(["z"] * 9)  # what finds nothing before it is always tried

    assert len(asyncio.run(_with_batcher(batcher, work))) == 9


def test_a_few_texts_do_not_say_how_fast_the_service_is():
    batcher = Batcher(_Slow(0.2), max_waiting=1000, timeout=1)

    async def work():
        await batcher.classify(["x"])  # 5 a second
        return await asyncio.gather(*(batcher.classify(["x"] * 9) for _ in range(9)))

    assert len(asyncio.run(_with_batcher(batcher, work))) == 9


def test_a_service_that_has_become_faster_again_takes_more():
    classifier = _Slow(0.5)
    batcher = Batcher(classifier, max_waiting=1000, timeout=0.6)

    async def work():
        await batcher.classify(["x"] * 32)  # 64 a second: 30 within most of the time
        classifier.seconds = 0.01
        for _ in range(20):
            await batcher.classify(["x"] * 8)
        return await asyncio.gather(*(batcher.classify(["x"] * 20) for _ in range(9)))

    assert len(asyncio.run(_with_batcher(batcher, work))) == 9


def test_a_queue_that_nobody_waits_for_any_more_is_not_full():
    batcher = Batcher(_Slow(0.3), max_waiting=2, timeout=0.1)

    async def work():
        first = [asyncio.create_task(batcher.classify([text])) for text in "xy"]
        await asyncio.sleep(0.05)
        with pytest.raises(Overloaded):
            await batcher.classify(["z"], 80)
        await asyncio.gather(*first, return_exceptions=True)
        await asyncio.sleep(0.4)

    asyncio.run(_with_batcher(batcher, work))
    assert batcher.waiting == 0 and batcher.refused == math.inf


def test_a_request_that_waits_too_long_is_shed_and_not_classified():
    classifier = _Slow(0.2)
    batcher = Batcher(classifier, max_waiting=100, timeout=0.1)

    async def work():
        first = asyncio.create_task(batcher.classify(["first"]))
        await asyncio.sleep(0.05)
        with pytest.raises(Overloaded, match=r"no answer within 0\.1 s"):
            await batcher.classify(["second"])
        with pytest.raises(Overloaded):
            await first
        await asyncio.sleep(0.2)

    asyncio.run(_with_batcher(batcher, work))
    assert classifier.batches == [["first"]]
    assert batcher.waiting == 0


def test_one_failing_request_fails_neither_those_beside_it_nor_the_next():
    batcher = Batcher(_Slow(0.01), max_waiting=100, timeout=5)

    async def work():
        first = asyncio.create_task(batcher.classify(["first"]))
        await asyncio.sleep(0)
        both = [batcher.classify(["bad"]), batcher.classify(["good"])]
        found = await asyncio.gather(*both, return_exceptions=True)  # in one batch
        await first
        return *found, await batcher.classify(["later"])

    bad, good, later = asyncio.run(_with_batcher(batcher, work))
    assert isinstance(bad, ValueError) and good[0, 0] == 4 and later[0, 0] == 5
    assert batcher.waiting == 0


def test_overload_is_503_with_a_hint_when_to_come_again(client, monkeypatch):
    monkeypatch.setattr(client.app.state.batcher, "_max_waiting", 2)
    assert client.post("/predict", json={"texts": ["x"] * 3}).status_code == 413  # will never fit
    monkeypatch.setattr(client.app.state.batcher, "waiting", 1)
    answer = client.post("/predict", json={"texts": ["x"] * 2})
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert "waiting" in answer.json()["detail"]
    # Until a batch has been answered, bodies no shorter than that one are not even read.
    answer = client.post("/predict", content=b"no JSON" * 9)
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert client.post("/predict", content=b"no JSON").status_code == 422
    client.app.state.batcher.refused = math.inf
    assert client.post("/predict", content=b"no JSON" * 9).status_code == 422


def test_what_is_no_text_is_refused_and_failures_are_counted(client, monkeypatch):
    json_type = {"content-type": "application/json"}
    answer = client.post("/predict", content=b'{"texts": ["\\ud800 hello"]}', headers=json_type)
    assert answer.status_code == 422 and "texts.0" in answer.json()["detail"]
    typed = {"content-type": "application/json; charset=utf-8"}
    assert "content-type" not in client.post("/predict", content=b"{}", headers=typed).json()["detail"]
    chunked = {"content-length": "2", "transfer-encoding": "chunked"}
    assert client.post("/predict", content=b"{}", headers=chunked).status_code == 411

    async def fail(texts):
        raise RuntimeError("broken")

    monkeypatch.setattr(client.app.state.classifier, "apredict_logits", fail)
    with pytest.raises(RuntimeError, match="broken"):
        client.post("/predict", json={"texts": ["x"]})
    assert 'distill_requests_total{status="500"} 1.0' in client.get("/metrics").text


@pytest.mark.parametrize(
    ("name", "value"),
    [("THREADS", "two"), ("THREADS", "1.5"), ("TIMEOUT", "0"), ("TIMEOUT", "inf"), ("MAX_WAITING", "-1")],
)
def test_a_setting_that_makes_no_sense_is_named(monkeypatch, name, value):
    monkeypatch.setenv(f"DISTILL_{name}", value)
    with pytest.raises(DistillError, match=f"DISTILL_{name}={value}: not a number above 0"):
        Settings()


def test_a_server_that_asks_for_the_application_is_told_in_one_line_what_is_wrong(monkeypatch):
    monkeypatch.setenv("DISTILL_BUNDLE", "nowhere")
    with pytest.raises(SystemExit, match=r"nowhere: no such folder.*DISTILL_BUNDLE=nowhere"):
        _ = service.app
    monkeypatch.setenv("DISTILL_TIMEOUT", "soon")
    with pytest.raises(SystemExit, match=r"^DISTILL_TIMEOUT=soon: not a number above 0; leave it out for 5$"):
        _ = service.app


def test_the_service_says_what_it_runs(chain, caplog):
    caplog.set_level("INFO", logger="uvicorn.error")
    with TestClient(create_app(Settings(bundle=str(chain.export)))):
        pass
    assert caplog.messages[-1] == f"{chain.export}: onnx/model_quantized.onnx on cpu"


def test_other_methods_are_told_so(client):
    assert client.get("/predict").status_code == 405
