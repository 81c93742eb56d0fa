"""`Classifier`: text in, labels and probabilities out. Imports onnxruntime, tokenizers and numpy alone."""

import json
import logging
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from tokenizers import Tokenizer

from distill.errors import DistillError
from distill.metrics import softmax

logger = logging.getLogger(__name__)
Text = str | tuple[str, str]
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
# On a CPU the fused kernel takes four times as long as the Add and the LayerNormalization it replaces.
SLOW_FUSIONS = {"cpu": ["SkipLayerNormFusion"], "cuda": []}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DistillError(f"{path}: no such file; name a folder that `distill export` wrote") from None
    except ValueError as error:
        raise DistillError(f"{path}: not readable as JSON ({error}); export the bundle again") from error
    return content


def _choose_provider(wanted: str, files: dict[str, str]) -> str:
    if wanted not in ("auto", *PROVIDERS):
        raise DistillError(f"provider {wanted!r}: unknown; use auto, cpu or cuda")
    available = onnxruntime.get_available_providers()
    if wanted == "auto":
        return "cuda" if "cuda" in files and PROVIDERS["cuda"] in available else "cpu"
    if PROVIDERS[wanted] not in available:
        raise DistillError(f"provider {wanted!r}: this onnxruntime has only {', '.join(available)}; "
                           "install onnxruntime-gpu in place of onnxruntime")  # fmt: skip
    return wanted


class Classifier:
    """A text classifier out of a bundle that `distill export` wrote.

    Texts run one at a time, several at once over threads that share one session: on a CPU this is faster than
    batches, which pay for padding. A `Classifier` may be used from several threads.

    Attributes:
        labels: label names, in the order of the columns of `predict_proba`.
        provider: "cpu" or "cuda": what is really used.
        file: the ONNX file in use.
        temperature: what logits are divided by before they become probabilities; 1 if not calibrated.
    """

    def __init__(
        self,
        bundle: str | Path,
        provider: str = "auto",
        file: str | None = None,
        threads: int | None = None,
        calibrated: bool = True,
    ) -> None:
        """Open a bundle.

        Args:
            bundle: folder that `distill export` wrote.
            provider: "cpu", "cuda" (fails if CUDA is not really used) or "auto".
            file: an ONNX file inside the bundle, in place of the provider's.
            threads: texts in flight at once; the number of cores when left out.
            calibrated: apply the temperature that export fitted on validation text, so that probabilities
                mean what they say; without it they are the softmax that other runtimes give. Labels are the
            same.

        Raises:
            DistillError: if the bundle is incomplete or the provider cannot be used.
        """
        folder = Path(bundle)
        if not folder.is_dir():
            raise DistillError(f"{folder}: no such folder; name one that `distill export` wrote")
        manifest = _read_json(folder / "distill.json")
        details = manifest.get("details", {})
        if "files" not in details:
            raise DistillError(
                f"{folder}: not a bundle (written by {manifest.get('stage')}); run `distill export` on it"
            )
        self.labels: list[str] = manifest["labels"]
        self.max_length: int = manifest["max_length"]
        self._tokenizer = self._open_tokenizer(folder / "tokenizer.json")
        self._threads = threads or os.cpu_count() or 1
        self.provider = _choose_provider(provider, details["files"])
        self.file = file or details["files"].get(self.provider) or details["files"]["fp32"]
        try:
            self._session = self._open_session(folder / self.file)
        except DistillError as error:
            if provider != "auto" or self.provider == "cpu":
                raise
            logger.warning("%s; using the CPU", error)
            self.provider = "cpu"
            self.file = file or details["files"].get("cpu") or details["files"]["fp32"]
            self._session = self._open_session(folder / self.file)
        fitted: dict[str, float] = details.get("temperature", {})
        self.temperature = fitted.get(self.file, 1.0) if calibrated else 1.0
        self._inputs = [node.name for node in self._session.get_inputs()]
        if provider == "auto":
            logger.info("%s: %s on %s", folder, self.file, self.provider)

    def _open_tokenizer(self, path: Path) -> Tokenizer:
        if not path.is_file():
            raise DistillError(f"{path}: missing from the bundle; export it again")
        tokenizer = Tokenizer.from_file(str(path))
        settings = path.with_name("tokenizer_config.json")
        padding = _read_json(settings).get("pad_token") if settings.is_file() else None
        padding = padding["content"] if isinstance(padding, dict) else padding
        self._padding = tokenizer.token_to_id(padding or "") or 0
        tokenizer.no_padding()
        tokenizer.enable_truncation(self.max_length)
        return tokenizer

    def _open_session(self, path: Path) -> onnxruntime.InferenceSession:
        if not path.is_file():
            raise DistillError(f"{path}: missing from the bundle; export it again")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        name = PROVIDERS[self.provider]
        try:
            session = onnxruntime.InferenceSession(
                str(path), options, providers=[name], disabled_optimizers=SLOW_FUSIONS[self.provider]
            )
        except Exception as error:  # onnxruntime's own kinds share no base class but Exception
            raise DistillError(
                f"{path}: onnxruntime cannot open it: {str(error).splitlines()[0]}; export it again"
            ) from error
        if session.get_providers()[0] != name:
            raise DistillError(f"provider {self.provider!r}: fell back to {session.get_providers()[0]}; "
                               "check that its CUDA and cuDNN libraries are installed")  # fmt: skip
        return session

    def logits(self, text: Text) -> NDArray[np.float32]:
        """Logits of one text (or pair of texts), shape (classes,)."""
        encoding = self._tokenizer.encode(*text) if isinstance(text, tuple) else self._tokenizer.encode(text)
        columns = {
            "input_ids": encoding.ids,
            "attention_mask": encoding.attention_mask,
            "token_type_ids": encoding.type_ids,
        }
        if not encoding.ids:  # the empty text, where a tokenizer adds nothing at the ends
            columns = {"input_ids": [self._padding], "attention_mask": [1], "token_type_ids": [0]}
        feeds = {name: np.array([columns[name]], dtype=np.int64) for name in self._inputs}
        return np.asarray(self._session.run(None, feeds)[0][0], dtype=np.float32)

    def stream_logits(self, texts: Iterable[Text]) -> Iterator[NDArray[np.float32]]:
        """Logits of each text in order; takes in only as many texts ahead as keeps the threads busy."""
        remaining = iter(texts)
        if self._threads == 1:
            yield from map(self.logits, remaining)
            return
        with ThreadPoolExecutor(self._threads) as pool:
            waiting = deque(pool.submit(self.logits, text) for text in islice(remaining, 4 * self._threads))
            while waiting:
                yield waiting.popleft().result()
                waiting.extend(pool.submit(self.logits, text) for text in islice(remaining, 1))

    def predict_logits(self, texts: Iterable[Text]) -> NDArray[np.float32]:
        """Logits, shape (n, classes)."""
        texts = _checked(texts)
        rows = list(self.stream_logits(texts))
        return np.stack(rows) if rows else np.empty((0, len(self.labels)), dtype=np.float32)

    def probabilities(self, logits: NDArray[np.float32]) -> NDArray[np.float64]:
        """Calibrated probabilities of logits of shape (…, classes)."""
        return softmax(logits, self.temperature)

    def predict_proba(self, texts: Iterable[Text]) -> NDArray[np.float64]:
        """Probabilities, shape (n, classes), columns in the order of `labels`."""
        return self.probabilities(self.predict_logits(texts))

    def predict(self, texts: Iterable[Text]) -> list[str]:
        """The most probable label of each text."""
        return [self.labels[index] for index in self.predict_logits(texts).argmax(axis=1)]

    def __call__(self, texts: str | Iterable[Text], **options: Any) -> list[Any]:
        """Answer as `transformers.pipeline("text-classification")` does, with calibrated scores.

        Args:
            texts: one text or several.
            options: `top_k`, as in the pipeline: how many labels a text gets, None for all.

        Returns:
            A list of {"label", "score"}, one a text; with `top_k`, a list of such lists (for one text, the
            list itself), the most probable first.
        """
        legacy = "top_k" not in options
        top_k = options.pop("top_k", 1)
        if options:
            raise TypeError(f"unknown option {next(iter(options))!r}; Classifier takes top_k")
        single = isinstance(texts, str)
        answers: list[Any] = []
        for row in self.predict_proba([texts] if isinstance(texts, str) else texts):
            order = np.argsort(-row, kind="stable")[:top_k]
            best = [{"label": self.labels[index], "score": float(row[index])} for index in order]
            answers.append(best[0] if legacy else best)
        return answers[0] if single and not legacy else answers


def _checked(texts: Iterable[Text]) -> list[Text]:
    if isinstance(texts, str):
        raise DistillError("texts: a single string; give a list of strings, as in predict([text])")
    listed = list(texts)
    for index, text in enumerate(listed):
        if not isinstance(text, str) and not (isinstance(text, tuple) and len(text) == 2):
            raise DistillError(f"texts[{index}]: {type(text).__name__} instead of a string or a pair of them")
    return listed
