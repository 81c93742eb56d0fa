"""`Classifier`: text in, labels and probabilities out. Imports onnxruntime, tokenizers and numpy alone."""

import logging
import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any
from weakref import WeakSet

import numpy as np
from numpy.typing import NDArray

from distill.bundle import Bundle, open_bundle, second_column
from distill.decision import MULTI_LABEL, Decision
from distill.engine import Engine, ProviderError, Text, choose_provider
from distill.errors import DistillError
from distill.files import SURROGATE

logger = logging.getLogger(__name__)
STREAM_BATCH = 4096  # texts that a stream gives a GPU at once


CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # of a container: microseconds of all cores together, in a period


def cores() -> int:
    """Cores that this process may use, and that its container's quota lets it use."""
    try:
        allowed = len(os.sched_getaffinity(0))
    except AttributeError:  # not on this system
        allowed = os.cpu_count() or 1
    try:
        quota, period = map(int, CPU_QUOTA.read_text().split())
    except (OSError, ValueError):  # there is none, or it is "max"
        return allowed
    return max(1, min(allowed, -(-quota // period)))


class Classifier:
    """A text classifier out of a bundle that `distill export` wrote.

    On a CPU texts run one at a time, several at once over threads that share one session: that is faster than
    batches, which pay for padding, and no answer depends on the texts beside it. On CUDA they run in batches
    of similar length, on the first device of CUDA_VISIBLE_DEVICES. A `Classifier` may be shared by threads
    and on a CPU used after a fork; a process that is spawned opens its own.

    Attributes:
        labels: label names, in the order of the columns of `predict_proba`.
        provider: "cpu" or "cuda": what is really used.
        file: the ONNX file in use.
        pairs: whether an input is a pair of texts.
        temperature: what logits are divided by before they become probabilities; 1 if not calibrated.
        thresholds: the probability from which on a label is given, shape (classes,), where a text may have
            several labels or none; None where it has one.
    """

    def __init__(
        self,
        bundle: str | os.PathLike[str] | Bundle,
        provider: str = "auto",
        file: str | None = None,
        threads: int | None = None,
        calibrated: bool = True,
    ) -> None:
        """Open a bundle.

        Args:
            bundle: folder that `distill export` wrote, or the single file of `--single-file`; or one that
                `open_bundle` opened.
            provider: "cpu", "cuda" (fails if CUDA is not really used) or "auto".
            file: an ONNX file inside the bundle, in place of the provider's.
            threads: texts in flight at once; the number of cores when left out.
            calibrated: apply the temperature that export fitted on validation text, so that probabilities
                mean what they say; without it they are the softmax (or sigmoid, where a text may have
                several labels) that other runtimes give. Labels are the same.

        Raises:
            DistillError: if a file of the bundle is missing or is not the one that was exported, or if the
                provider cannot be used.
        """
        if threads is not None and (type(threads) is not int or threads < 1):
            raise DistillError(f"threads={threads!r}: must be a whole number of at least 1")
        parts = open_bundle(bundle) if isinstance(bundle, str | os.PathLike) else bundle
        if not isinstance(parts, Bundle):
            kind = type(bundle).__name__
            raise DistillError(f"bundle: {kind} instead of a path; name what `distill export` wrote")
        details = parts.manifest["details"]
        self.labels: list[str] = parts.manifest["labels"]
        self.max_length: int = parts.manifest["max_length"]
        self.pairs = second_column(parts.manifest["data"]) is not None
        self._threads = threads or cores()
        # Threads start when they are first needed.
        self._pool = ThreadPoolExecutor(self._threads, "distill")
        _ALIVE.add(self)
        chosen, reason = choose_provider(provider, details["files"])
        try:
            self._engine = Engine(parts, chosen, file)
        except ProviderError as error:
            if provider != "auto":
                raise
            logger.warning("%s; using the CPU", error)
            self._engine, reason = Engine(parts, "cpu", file), "CUDA cannot be used"
        self.provider, self.file = self._engine.provider, self._engine.file
        fitted: dict[str, float] = details.get("temperature", {})
        self.temperature = fitted.get(self.file, 1.0) if calibrated else 1.0
        thresholds = None
        if parts.manifest.get("problem_type") == MULTI_LABEL:
            thresholds = details.get("thresholds", {}).get(self.file, [0.0] * len(self.labels))
        self._decision = Decision(self.temperature, thresholds and tuple(thresholds))
        self.thresholds = self._decision.probability_thresholds
        if provider == "auto":
            logger.info("%s: %s on %s: %s", parts.place, self.file, self.provider, reason)

    def __repr__(self) -> str:
        return f"Classifier({self.file} on {self.provider}, labels {', '.join(self.labels)})"

    def __reduce__(self) -> Any:
        raise TypeError("a Classifier cannot be pickled; open the bundle in each process")

    def renew_pool(self) -> None:
        """Start anew without threads, as in a process that was forked."""
        self._pool = ThreadPoolExecutor(self._threads, "distill")

    def logits(self, text: Text) -> NDArray[np.float32]:
        """Logits of one text (or pair of texts), shape (classes,)."""
        self._check(text)
        return self._engine.logits(text)

    def outputs(self, text: Text) -> list[NDArray[Any]]:
        """All outputs of the graph for one text, as a batch of one; the first are the logits."""
        self._check(text)
        return self._engine.outputs(text)

    def stream_logits(self, texts: Iterable[Text]) -> Iterator[NDArray[np.float32]]:
        """Logits of each text in order, for streams that fit no memory.

        Texts are read ahead, to keep the threads busy: 4 a thread, 4,096 on CUDA. An answer comes when the
        next text is there or the stream ends; a producer that waits for each needs `threads=1`, or `logits`.
        An error of the producer, or a text that is none, is raised after the answers to the texts before it.
        """
        failed: list[Exception] = []
        yield from self._answers(_until_failed(self._each_checked(texts), failed))
        if failed:
            raise failed[0]

    def _answers(self, texts: Iterator[Text]) -> Iterator[NDArray[np.float32]]:
        if self.provider == "cuda":
            while batch := list(islice(texts, STREAM_BATCH)):
                yield from self._engine.batched_logits(batch)
            return
        if self._threads == 1:
            yield from map(self._engine.logits, texts)
            return
        waiting: deque[Future[NDArray[np.float32]]] = deque()
        for text in texts:
            waiting.append(self._pool.submit(self._engine.logits, text))
            while waiting and (waiting[0].done() or len(waiting) > 4 * self._threads):
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def stream_proba(self, texts: Iterable[Text]) -> Iterator[NDArray[np.float64]]:
        """Probabilities of each text in order, shape (classes,), as `stream_logits` gives logits."""
        return map(self.probabilities, self.stream_logits(texts))

    def _each_checked(self, texts: Iterable[Text]) -> Iterator[Text]:
        if isinstance(texts, str):
            raise DistillError("texts: a single string; give a list of strings, as in predict([text])")
        if isinstance(texts, Mapping) or hasattr(texts, "columns"):  # they iterate over their keys
            raise DistillError(f"texts: {type(texts).__name__} instead of a list of strings; give its column "
                               "with the texts as a list, and pairs as a list of tuples")  # fmt: skip
        if isinstance(texts, set | frozenset):
            raise DistillError("texts: a set; give a list of strings, whose order answers keep")
        if not isinstance(texts, Iterable):
            raise DistillError(f"texts: {type(texts).__name__} instead of a list of strings")
        for index, text in enumerate(texts):
            self._check(text, index)
            yield text

    def _check(self, text: Text, index: int | None = None) -> None:
        for part in text if isinstance(text, tuple) and len(text) == 2 else (text,):
            if not isinstance(part, str):
                kind = type(part).__name__
                raise DistillError(f"{_name(index)}: {kind} instead of a string or a pair of them")
            if not part.isascii() and SURROGATE.search(part):
                raise DistillError(f"{_name(index)}: half of a character in it (a lone surrogate), or a byte "
                                   "that is not UTF-8; take it out")  # fmt: skip
        if isinstance(text, tuple) != self.pairs:
            found, trained = ("one text", "pairs") if self.pairs else ("a pair", "single texts")
            raise DistillError(f"{_name(index)}: {found}, and this bundle was trained on {trained}")

    def predict_logits(self, texts: Iterable[Text]) -> NDArray[np.float32]:
        """Logits, shape (n, classes)."""
        texts = list(self._each_checked(texts))
        if self.provider == "cuda" and texts:
            return self._engine.batched_logits(texts)
        if len(texts) == 1:
            return self._engine.logits(texts[0])[np.newaxis]
        logits = np.empty((len(texts), len(self.labels)), dtype=np.float32)
        # The longest first, so that no thread is left alone with a long text at the end.
        waiting = deque(sorted(range(len(texts)), key=lambda index: -_characters(texts[index])))

        def work() -> None:
            while waiting:
                try:
                    index = waiting.popleft()
                except IndexError:  # another thread took the last one
                    return
                logits[index] = self._engine.logits(texts[index])

        helpers = [self._pool.submit(work) for _ in range(min(self._threads, len(texts)) - 1)]
        try:
            work()
        finally:
            waiting.clear()
        for helper in helpers:
            # One that has not started, because other callers keep the pool busy, is not needed any more.
            if not helper.cancel():
                helper.result()
        return logits

    async def apredict_logits(self, texts: Iterable[Text]) -> NDArray[np.float32]:
        """`predict_logits` for asyncio: on the classifier's own threads, so that the event loop goes on."""
        import asyncio

        return await asyncio.get_running_loop().run_in_executor(self._pool, self.predict_logits, texts)

    async def apredict_proba(self, texts: Iterable[Text]) -> NDArray[np.float64]:
        """`predict_proba` for asyncio."""
        return self.probabilities(await self.apredict_logits(texts))

    async def apredict(self, texts: Iterable[Text]) -> list[Any]:
        """`predict` for asyncio."""
        return [self._named(answer) for answer in self._decision.answers(await self.apredict_logits(texts))]

    def probabilities(self, logits: NDArray[np.float32]) -> NDArray[np.float64]:
        """Calibrated probabilities of logits of shape (…, classes).

        They sum to 1, but where a text may have several labels, each of which has a probability of its own.
        """
        return self._decision.probabilities(logits)

    def answer(self, logits: NDArray[np.float32]) -> Any:
        """The label that logits of shape (classes,) give; a list of them where there may be several."""
        return self._named(self._decision.answers(logits))

    def _named(self, answer: Any) -> Any:
        if self.thresholds is None:
            return self.labels[answer]
        return [label for label, given in zip(self.labels, answer, strict=True) if given]

    def predict_proba(self, texts: Iterable[Text]) -> NDArray[np.float64]:
        """Probabilities, shape (n, classes), columns in the order of `labels`."""
        return self.probabilities(self.predict_logits(texts))

    def predict(self, texts: Iterable[Text]) -> list[Any]:
        """The most probable label of each text; where it may have several, the list of its labels.

        Such a list holds the labels whose probability reaches their threshold, and may be empty.
        """
        return [self._named(answer) for answer in self._decision.answers(self.predict_logits(texts))]

    def __call__(self, texts: str | Iterable[Text], **options: Any) -> list[Any]:
        """Answer as `transformers.pipeline("text-classification")` does, with calibrated scores.

        Args:
            texts: one text or several.
            options: `top_k`, as in the pipeline: how many labels a text gets, None for all; `truncation`,
                which may be True, since a text is never read beyond its limit.

        Returns:
            A list of {"label", "score"}, one a text; with `top_k`, a list of such lists (for one text, the
            list itself), the most probable first.
        """
        legacy = "top_k" not in options
        top_k = options.pop("top_k", 1)
        if options.get("truncation") is True:
            del options["truncation"]
        if options:
            raise TypeError(f"unknown option {next(iter(options))!r}; Classifier takes top_k")
        if top_k is not None and (not isinstance(top_k, int) or top_k < 1):
            raise DistillError(f"top_k={top_k}: must be at least 1, or None for all labels")
        single = isinstance(texts, str)
        answers: list[Any] = []
        for row in self.predict_proba([texts] if isinstance(texts, str) else texts):
            order = [int(row.argmax())] if top_k == 1 else np.argsort(-row, kind="stable")[:top_k].tolist()
            best = [{"label": self.labels[index], "score": float(row[index])} for index in order]
            answers.append(best[0] if legacy else best)
        return answers[0] if single and not legacy else answers


def _name(index: int | None) -> str:
    return "text" if index is None else f"texts[{index}]"


def _until_failed(texts: Iterator[Text], failed: list[Exception]) -> Iterator[Text]:
    """The texts up to an error, which is put into `failed`."""
    try:
        yield from texts
    except Exception as error:
        failed.append(error)


def _characters(text: Text) -> int:
    return len(text) if isinstance(text, str) else len(text[0]) + len(text[1])


# After a fork the child has no threads: a pool of the parent's would wait for ever.
_ALIVE: WeakSet[Classifier] = WeakSet()


def _renew_pools() -> None:
    for classifier in _ALIVE:
        classifier.renew_pool()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_pools)
