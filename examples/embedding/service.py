"""A classifier as a web service: `uvicorn distill.examples.embedding.service:app`.

Requests wait in one bounded queue, which holds no more than can be answered in time. Whatever waits when the
classifier is free is answered as one batch, so nothing is delayed to fill one. A full queue sheds load with
503 at once, and until the next batch is answered bodies no shorter than one that found no room are not even
read. Bodies that would take too much memory together are shed too, and a request that waited too long, whose
texts are not classified any more.

Settings, from the environment: DISTILL_BUNDLE (folder or single file), DISTILL_PROVIDER (auto, cpu or cuda),
DISTILL_THREADS, DISTILL_MAX_WAITING (texts in the queue), DISTILL_TIMEOUT (seconds, for a body to arrive, and
again for its answer).
"""

import asyncio
import logging
import math
import os
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from numpy.typing import NDArray
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)
from pydantic import BaseModel, Field
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from distill import Classifier, DistillError
from distill.runtime import cores

logger = logging.getLogger("uvicorn.error")  # where uvicorn says that it has started
Number = TypeVar("Number", int, float)
MAX_TEXTS = 128  # in a request
MAX_CHARACTERS = 20_000  # in a text
MAX_BYTES = 16_000_000  # of a request
MAX_BYTES_AT_ONCE = 64_000_000  # of all requests that are read or answered
MAX_BATCH = 256  # texts classified together
MEASURED = 32  # texts in a batch that says how slow the service is; fewer may not keep all threads busy


def _positive(name: str, default: Number, kind: Callable[[str], Number]) -> Number:
    given = os.environ.get(name)
    if not given:
        return default
    try:
        number = kind(given)
    except ValueError:
        number = kind("0")
    if not 0 < number < math.inf:
        raise DistillError(f"{name}={given}: not a number above 0; leave it out for {default:g}")
    return number


@dataclass
class Settings:
    """Of the service, from the environment."""

    bundle: str = field(default_factory=lambda: os.environ.get("DISTILL_BUNDLE", "runs/export"))
    provider: str = field(default_factory=lambda: os.environ.get("DISTILL_PROVIDER", "auto"))
    threads: int = field(default_factory=lambda: _positive("DISTILL_THREADS", cores(), int))
    max_waiting: int = field(default_factory=lambda: _positive("DISTILL_MAX_WAITING", 1024, int))
    timeout: float = field(default_factory=lambda: _positive("DISTILL_TIMEOUT", 5.0, float))


class Texts(BaseModel):
    """A request."""

    texts: list[Annotated[str, Field(max_length=MAX_CHARACTERS)]] = Field(min_length=1, max_length=MAX_TEXTS)


class Prediction(BaseModel):
    """The answer to one text, with calibrated probabilities; lists where a text may have several labels."""

    label: str | list[str]
    score: float | list[float]
    probabilities: dict[str, float]


class Predictions(BaseModel):
    """The answers to a request, in the order of its texts."""

    predictions: list[Prediction]


class TooMany(Exception):
    """A request with more texts than the queue ever holds."""


class Overloaded(Exception):
    """More texts wait than the service will hold, or a request waited too long."""


class Batcher:
    """Puts the texts of waiting requests together; one batch runs at a time, on all its threads.

    Attributes:
        waiting: texts in the queue or in work.
        refused: bytes of the shortest body that found no room since the last batch ended.
    """

    def __init__(self, classifier: Classifier, max_waiting: int, timeout: float) -> None:
        self._classifier, self._max_waiting, self._timeout = classifier, max_waiting, timeout
        self._requests: deque[tuple[list[str], asyncio.Future[NDArray]]] = deque()
        self._arrived = asyncio.Event()
        self._texts = self._seconds = 0.0  # of the latest large batches, each counted less than the next
        self.waiting = 0
        self.refused = math.inf

    async def classify(self, texts: list[str], size: float = math.inf) -> NDArray:
        """Logits, shape (n, classes).

        Args:
            texts: n of them.
            size: bytes of the request that has them.

        Raises:
            TooMany: if the queue could never hold them.
            Overloaded: if the queue is full, or the answer did not come in time.
        """
        if len(texts) > self._max_waiting:
            raise TooMany(f"{len(texts)} texts; the service takes {self._max_waiting} at once")
        if self.waiting and self.waiting + len(texts) > min(self._max_waiting, self._in_time()):
            self.refused = min(self.refused, size)
            raise Overloaded(f"{self.waiting} texts are waiting already; try again later")
        answer: asyncio.Future[NDArray] = asyncio.get_running_loop().create_future()
        self.waiting += len(texts)
        self._requests.append((texts, answer))
        self._arrived.set()
        try:
            return await asyncio.wait_for(answer, self._timeout)
        except TimeoutError:
            raise Overloaded(f"no answer within {self._timeout:g} s; try again later") from None

    def _in_time(self) -> float:
        """Texts that are answered within most of the timeout, at the speed of the latest large batches."""
        return 0.8 * self._timeout * self._texts / self._seconds if self._seconds else math.inf

    async def run(self) -> None:
        """Answer requests until cancelled."""
        while True:
            await self._arrived.wait()
            batch = self._take()
            if batch:
                await self._answer(batch)
            self.refused = math.inf

    def _take(self) -> list[tuple[list[str], asyncio.Future[NDArray]]]:
        """The oldest requests, up to a batch, without those that nobody waits for any more."""
        batch: list[tuple[list[str], asyncio.Future[NDArray]]] = []
        size = 0
        while self._requests and (not batch or size + len(self._requests[0][0]) <= MAX_BATCH):
            texts, answer = self._requests.popleft()
            if answer.done():
                self.waiting -= len(texts)
            else:
                batch.append((texts, answer))
                size += len(texts)
        if not self._requests:
            self._arrived.clear()
        return batch

    async def _answer(self, batch: list[tuple[list[str], asyncio.Future[NDArray]]]) -> None:
        texts = [text for texts, _ in batch for text in texts]
        started = time.perf_counter()
        try:
            found = await self._classifier.apredict_logits(texts)
        except Exception as error:
            if len(batch) > 1:  # one request must not fail the others
                for request in batch:
                    await self._answer([request])
                return
            self.waiting -= len(texts)
            if not batch[0][1].done():
                batch[0][1].set_exception(error)
            return
        self.waiting -= len(texts)
        taken = time.perf_counter() - started
        # Where few texts may wait, only small batches can tell that the service has become faster again.
        faster = len(texts) * self._seconds > self._texts * taken
        if len(texts) >= MEASURED or faster:
            self._texts = 0.8 * self._texts + len(texts)
            self._seconds = 0.8 * self._seconds + taken
        start = 0
        for texts, answer in batch:
            if not answer.done():
                answer.set_result(found[start : start + len(texts)])
            start += len(texts)


class Metrics:
    """What `/metrics` tells, in Prometheus' format."""

    def __init__(self, batcher: Batcher) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "distill_requests", "Requests answered, by status.", ["status"], registry=self.registry
        )
        self.texts = Counter(
            "distill_texts", "Texts classified, by label.", ["label"], registry=self.registry
        )
        self.seconds = Histogram(
            "distill_request_seconds",
            "From a request's arrival to its answer.",
            buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5),
            registry=self.registry,
        )
        waiting = Gauge("distill_texts_waiting", "Texts in the queue or in work.", registry=self.registry)
        waiting.set_function(lambda: batcher.waiting)


class Watch:
    """Reads what `/predict` is sent, unless it is too large or too slow; counts and times the answers."""

    def __init__(self, app: ASGIApp, timeout: float) -> None:
        self.app, self._timeout = app, timeout
        self._bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        # The path holds that under which the application is mounted, or which a proxy has put before it.
        path, root = scope.get("path", ""), scope.get("root_path", "")
        if path.startswith(f"{root}/"):
            path = path.removeprefix(root)
        if scope["type"] != "http" or path != "/predict" or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        started = time.perf_counter()
        metrics: Metrics = scope["app"].state.metrics

        async def watched(message: Message) -> None:
            if message["type"] == "http.response.start":
                metrics.requests.labels(message["status"]).inc()
                metrics.seconds.observe(time.perf_counter() - started)
            await send(message)

        headers = Headers(scope=scope)
        length = headers.get("content-length", "")
        if not length.isdigit() or "transfer-encoding" in headers:
            refusal = _problem(411, "send a Content-Length, and no Transfer-Encoding")
        elif int(length) > MAX_BYTES:
            refusal = _problem(413, f"{length} bytes; a request may have {MAX_BYTES}")
        elif int(length) >= scope["app"].state.batcher.refused:
            refusal = _shed("no room for more texts; try again later")
        elif self._bytes + int(length) > MAX_BYTES_AT_ONCE:
            refusal = _shed(f"requests of {self._bytes} bytes are in work already; try again later")
        else:
            self._bytes += int(length)
            try:
                await self._pass_on(scope, receive, watched)
            except Exception:  # answered with 500 further out
                metrics.requests.labels(500).inc()
                raise
            finally:
                self._bytes -= int(length)
            return
        await refusal(scope, receive, watched)

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            body = await asyncio.wait_for(_body(receive), self._timeout)
        except TimeoutError:
            problem = _problem(408, f"no whole body within {self._timeout:g} s", {"Connection": "close"})
            await problem(scope, receive, send)
            return
        if body is None:  # the client has gone
            return
        messages: deque[Message] = deque([{"type": "http.request", "body": body, "more_body": False}])

        async def again() -> Message:
            return messages.popleft() if messages else await receive()

        await self.app(scope, again, send)


async def _body(receive: Receive) -> bytes | None:
    """A request's body; None if the client went away before its end."""
    parts, more = [], True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        parts.append(message.get("body", b""))
        more = message.get("more_body", False)
    return b"".join(parts)


router = APIRouter()


@router.post("/predict", response_model=Predictions)
async def predict(given: Texts, request: Request) -> JSONResponse:
    """Classify up to 128 texts."""
    classifier, metrics = request.app.state.classifier, request.app.state.metrics
    predictions = []
    size = int(request.headers["content-length"])
    for row in await request.app.state.batcher.classify(given.texts, size):
        probabilities = dict(zip(classifier.labels, classifier.probabilities(row).tolist(), strict=True))
        label = classifier.answer(row)
        for one in [label] if isinstance(label, str) else label:
            metrics.texts.labels(one).inc()
        score = probabilities[label] if isinstance(label, str) else [probabilities[one] for one in label]
        predictions.append({"label": label, "score": score, "probabilities": probabilities})
    return JSONResponse({"predictions": predictions})


@router.get("/health")
async def health(request: Request) -> Any:
    """Say that requests are answered, and by which model."""
    classifier = request.app.state.classifier
    if request.app.state.worker.done():
        return _problem(503, "requests are not answered any more; start the service again")
    return {
        "status": "ok",
        "file": classifier.file,
        "provider": classifier.provider,
        "labels": classifier.labels,
        "waiting": request.app.state.batcher.waiting,
    }


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Give counters for Prometheus."""
    return Response(generate_latest(request.app.state.metrics.registry), media_type=CONTENT_TYPE_LATEST)


async def too_many(request: Request, error: Exception) -> JSONResponse:
    """Refuse what could not be answered later either."""
    return _problem(413, str(error))


async def refuse(request: Request, error: Exception) -> JSONResponse:
    """Say what is wrong with a request, without what it held: that may not even be text."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    hint = (
        ""
        if request.headers.get("content-type", "").split(";")[0].strip().lower() == "application/json"
        else "; send content-type: application/json"
    )
    return _problem(422, f"{'.'.join(map(str, first['loc']))}: {first['msg']}{hint}")


async def shed(request: Request, error: Exception) -> JSONResponse:
    """Answer a request for which there is no room."""
    return _shed(str(error))


def _shed(detail: str) -> JSONResponse:
    return _problem(503, detail, {"Retry-After": "1"})


def _problem(status: int, detail: str, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"detail": detail}, status, headers)


def create_app(settings: Settings | None = None) -> FastAPI:
    """Open the bundle and build the application.

    Raises:
        DistillError: if the bundle or a setting is wrong.
    """
    settings = settings or Settings()

    classifier = Classifier(settings.bundle, provider=settings.provider, threads=settings.threads)
    if classifier.pairs:
        raise DistillError(f"{settings.bundle}: trained on pairs of texts, and a request has single ones")
    classifier.predict(["warm up"])

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        batcher = Batcher(classifier, settings.max_waiting, settings.timeout)
        app.state.classifier, app.state.batcher, app.state.metrics = classifier, batcher, Metrics(batcher)
        app.state.worker = asyncio.create_task(batcher.run())
        logger.info("%s: %s on %s", settings.bundle, classifier.file, classifier.provider)
        yield
        app.state.worker.cancel()

    app = FastAPI(title="distill", lifespan=lifespan)
    app.add_middleware(Watch, timeout=settings.timeout)
    app.add_exception_handler(Overloaded, shed)
    app.add_exception_handler(TooMany, too_many)
    app.add_exception_handler(RequestValidationError, refuse)
    app.include_router(router)
    return app


def __getattr__(name: str) -> FastAPI:
    """Give `app`, made when a server asks for it; what is wrong then is one line."""
    if name != "app":
        raise AttributeError(name)
    try:
        return create_app()
    except DistillError as error:
        given = " ".join(f"{key}={value}" for key, value in os.environ.items() if key.startswith("DISTILL_"))
        where = "" if str(error).startswith("DISTILL_") else f" ({given or 'DISTILL_BUNDLE is not set'})"
        raise SystemExit(f"{error}{where}") from None
