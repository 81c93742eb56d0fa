"""What one might use instead of a distilled student, trained on the same split, chosen on validation.

Needs `pip install --constraint constraints.txt ".[train,cpu,peers]"`.

Usage: python benchmarks/pareto.py and int8_accuracy.py, which import this.
"""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distill.data import Data
from distill.latency import cpu_has_vnni
from distill.metrics import score

Classify = Callable[[Sequence[str]], NDArray[np.int64]]
STRENGTHS = (1.0, 10.0, 100.0)
SETFIT_STEPS = 1000


def _texts(data: Data, split: str) -> tuple[list[str], NDArray[np.int64]]:
    return list(data.splits[split]["text"]), np.asarray(data.splits[split]["label"])


def _best_regression(features: Callable[[Sequence[str]], Any], data: Data) -> Classify:
    """Logistic regression on features, with the regularisation that is best on validation."""
    from sklearn.linear_model import LogisticRegression

    texts, labels = _texts(data, "train")
    held_out, truth = _texts(data, "validation")
    train, validation = features(texts), features(held_out)
    fitted = [LogisticRegression(C=strength, max_iter=1000).fit(train, labels) for strength in STRENGTHS]
    best = max(fitted, key=lambda one: score(truth, one.predict(validation), len(data.labels)).macro_f1)
    return lambda given: np.asarray(best.predict(features(given)))


def tfidf(data: Data) -> tuple[Classify, int]:
    """TF-IDF of words and pairs of words, and logistic regression."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True).fit(_texts(data, "train")[0])
    size = len(vectorizer.vocabulary_) * (len(data.labels) if len(data.labels) > 2 else 1) * 8
    return _best_regression(vectorizer.transform, data), size


def model2vec(data: Data, checkpoint: str) -> tuple[Classify, int]:
    """Static embeddings distilled from the student's checkpoint (model2vec), and logistic regression."""
    from model2vec.distill import distill

    static = distill(checkpoint, device="cpu")
    return _best_regression(lambda texts: static.encode(list(texts)), data), static.embedding.nbytes


def setfit(data: Data, checkpoint: str, folder: Path) -> tuple[Classify, int]:
    """SetFit on the student's checkpoint: contrastive fine-tuning, then logistic regression."""
    from datasets import Dataset
    from setfit import SetFitModel, Trainer, TrainingArguments

    if not folder.is_dir():
        texts, labels = _texts(data, "train")
        model = SetFitModel.from_pretrained(checkpoint)
        with tempfile.TemporaryDirectory() as scratch:
            arguments = TrainingArguments(
                output_dir=scratch, max_steps=SETFIT_STEPS, batch_size=16, report_to="none", seed=1
            )
            rows = Dataset.from_dict({"text": texts, "label": labels})
            Trainer(model=model, args=arguments, train_dataset=rows).train()
        model.save_pretrained(str(folder))
    model = SetFitModel.from_pretrained(str(folder))
    size = sum(parameter.numel() for parameter in model.model_body.parameters()) * 4
    return lambda given: np.asarray(model.predict(list(given), show_progress_bar=False)), size


def optimums_preset() -> Any:
    """Optimum's setting for dynamic INT8 on this CPU, with a scale for every channel."""
    from optimum.onnxruntime.configuration import AutoQuantizationConfig

    suited = AutoQuantizationConfig.avx512_vnni if cpu_has_vnni() else AutoQuantizationConfig.avx2
    return suited(is_static=False, per_channel=True)


def teacher_int8(data: Data, teacher: Path, folder: Path) -> tuple[Classify, int]:
    """Optimum's own dynamic INT8 of the teacher, in a transformers pipeline on one thread."""
    from onnxruntime import SessionOptions
    from optimum.onnxruntime import ORTModelForSequenceClassification, ORTQuantizer
    from transformers import AutoTokenizer, pipeline

    if not folder.is_dir():
        plain = ORTModelForSequenceClassification.from_pretrained(teacher, export=True)
        ORTQuantizer.from_pretrained(plain).quantize(save_dir=folder, quantization_config=optimums_preset())
        AutoTokenizer.from_pretrained(teacher).save_pretrained(folder)
    options = SessionOptions()
    options.intra_op_num_threads = 1
    model = ORTModelForSequenceClassification.from_pretrained(folder, session_options=options)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    classify = pipeline(
        "text-classification", model=model, tokenizer=tokenizer, device="cpu", truncation=True
    )
    index = {name: number for number, name in enumerate(data.labels)}
    size = sum(path.stat().st_size for path in folder.glob("*.onnx"))
    return lambda given: np.asarray([index[answer["label"]] for answer in classify(list(given))]), size
