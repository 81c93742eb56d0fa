"""A bundle under construction: `Classifier` can already open it, to try files on the student's own text."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
from distill.export.verification import Parity, compare
from numpy.typing import NDArray

from distill.artifact import Manifest
from distill.bundle import open_bundle
from distill.data import Data, texts_of
from distill.decision import fit_answers
from distill.engine import Text
from distill.latency import measure
from distill.metrics import score
from distill.predictions import EVALUATED, labels_of
from distill.runtime import Classifier

FP32 = "onnx/model.onnx"
INT8 = "onnx/model_quantized.onnx"
LATENCY_TEXTS = 60
Key = TypeVar("Key")


class Draft:
    """The folder, its manifest so far, and the data that a file is tried on.

    Attributes:
        folder: of the bundle.
        manifest: as it will be published.
        texts: of validation and test, by split.
        labels: their true classes, by split, shape (n,), or labels, shape (n, classes).
    """

    def __init__(self, folder: Path, manifest: Manifest, data: Data) -> None:
        self.folder, self.manifest = folder, manifest
        self.texts = {split: texts_of(data.splits[split]) for split in EVALUATED}
        self.labels = {split: labels_of(data.splits[split]) for split in EVALUATED}

    def open(self, file: str | Path, threads: int | None = None, provider: str = "cpu") -> Classifier:
        """Open one of its files, named by its path or relative to the folder."""
        name = file.relative_to(self.folder).as_posix() if isinstance(file, Path) else file
        bundle = open_bundle(self.folder, sealed=False)
        return Classifier(bundle, provider=provider, file=name, threads=threads)

    def logits(self, file: str | Path, split: str) -> NDArray[np.float32]:
        """Logits of a split's texts on the CPU provider, shape (n, classes)."""
        return self.open(file).predict_logits(self.texts[split])

    def macro_f1(self, logits: NDArray[np.float32]) -> float:
        """Macro-F1 of logits of the validation texts, 0 to 1; any thresholds are fitted to these."""
        labels = self.labels["validation"]
        return score(labels, fit_answers(logits, labels), len(self.manifest.labels)).macro_f1

    def compare(self, reference: NDArray[np.float32], other: NDArray[np.float32]) -> Parity:
        """Compare logits of the validation texts, shape (n, classes)."""
        return compare(reference, other, self.labels["validation"])

    def latency(self, files: Mapping[Key, str | Path], provider: str = "cpu") -> dict[Key, float]:
        """Median milliseconds of a validation text, one at a time, one thread; all files in turns."""
        keys: Sequence[Key] = list(files)
        texts: list[Text] = self.texts["validation"]
        sample = texts[:: max(1, len(texts) // LATENCY_TEXTS)][:LATENCY_TEXTS]
        opened = {
            str(number): self.open(files[key], threads=1, provider=provider).logits
            for number, key in enumerate(keys)
        }
        measured = measure(opened, sample)
        return {key: measured[str(number)] for number, key in enumerate(keys)}
