"""A student before its training, in INT8: as fast as it will be, so its shape can be chosen by speed."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from distill.export.draft import INT8
from distill.export.onnx import export_fp32, fuse, quiet, shorten
from distill.export.quantization import Setting, quantize

from distill.artifact import Manifest
from distill.bundle import MANIFEST, open_bundle
from distill.encoding import way_of
from distill.runtime import Classifier


def open_candidate(
    model: Any, tokenizer: Any, labels: list[str], folder: Path, pairs: bool = False
) -> Classifier:
    """Export a classifier to INT8 in the setting that is usually chosen, and open it on one thread.

    What it answers is not checked against anything; `export_student` does that.

    Args:
        model: a sequence classifier, trained or not.
        tokenizer: its fast tokenizer.
        labels: label names.
        folder: to write to; it must exist, and be kept as long as the classifier is used.
        pairs: whether it classifies pairs of texts.

    Raises:
        DistillError: if Optimum cannot export this architecture.
    """
    source = folder / "pytorch"
    with quiet():
        model.save_pretrained(source, safe_serialization=True)
        tokenizer.save_pretrained(source)
        tokenizer.save_pretrained(folder)
    exported, graph = export_fp32(source, folder), folder / "graph.onnx"
    fused = fuse(exported, graph, model.config)
    shorten(graph if fused else exported, graph)
    (folder / INT8).parent.mkdir()
    quantize(graph, folder / INT8, Setting(fused=fused))
    manifest = Manifest(
        stage="export",
        labels=labels,
        options={},
        seed=0,
        data={"columns": {"text_pair": "text_pair"}} if pairs else {},
        max_length=tokenizer.model_max_length,
        long_texts=way_of(tokenizer),
        details={"files": {"cpu": INT8}},
    )
    (folder / MANIFEST).write_text(json.dumps(asdict(manifest)))
    return Classifier(open_bundle(folder, sealed=False), provider="cpu", threads=1)
