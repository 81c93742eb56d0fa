"""Cold start and memory of one version, taken from a process of its own as an application would start it."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryFile

from distill.engine import Text
from distill.errors import DistillError

# What an application would write; it prints "answered", and in the end its peak of resident memory.
PEAK = """
def peak():  # in MB; ru_maxrss would count the process that started this one too
    try:
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024
    except OSError:
        import resource
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # bytes on macOS
"""
ONNX_PROBE = """
import json, sys
from distill import Classifier
given = json.load(sys.stdin)
classifier = Classifier(given["folder"], provider=given["provider"], file=given["file"], threads=1)
texts = [tuple(text) if isinstance(text, list) else text for text in given["texts"]]
classifier.predict(texts[:1])
print("answered", flush=True)
classifier.predict(texts)
print(peak())
"""
PYTORCH_PROBE = """
import json, sys
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
given = json.load(sys.stdin)
with open(given["folder"] + "/config.json", encoding="utf-8") as config:
    if json.load(config)["model_type"] == "averaging":
        import distill.averaging
model = AutoModelForSequenceClassification.from_pretrained(given["folder"]).eval()
tokenizer = AutoTokenizer.from_pretrained(given["folder"])
with torch.inference_mode():
    for number, text in enumerate(given["texts"]):
        parts = text if isinstance(text, list) else [text]
        model(**tokenizer(*parts, truncation=True, return_tensors="pt"))
        if number == 0:
            print("answered", flush=True)
print(peak())
"""


def cold_start(folder: Path, file: str, provider: str, texts: Sequence[Text]) -> tuple[float, float]:
    """Start Python, answer the first text, then the others.

    Args:
        folder: of the stage that wrote the model.
        file: with its weights, relative to the folder.
        provider: "cpu" or "cuda" for ONNX Runtime, "pytorch" otherwise.
        texts: at least one.

    The process may write bytecode, whatever this one may: the first of several compiles what it imports where
    that has not been done yet, and the others start as an installed application does.

    Returns:
        Seconds from starting Python to the first answer, and the process' peak of resident memory in MB.

    Raises:
        DistillError: if the process fails.
    """
    given = {"folder": str(folder), "file": file, "provider": provider, "texts": texts}
    code = PEAK + (PYTORCH_PROBE if provider == "pytorch" else ONNX_PROBE)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    # Files, since a pipe that nobody reads would stop the process.
    with TemporaryFile("w+") as stdin, TemporaryFile("w+") as stderr:
        stdin.write(json.dumps(given))
        stdin.seek(0)
        started = time.perf_counter()
        with subprocess.Popen(
            [sys.executable, "-P", "-c", code], stdin=stdin, stdout=subprocess.PIPE, stderr=stderr, text=True,
            env=environment,
        ) as process:  # fmt: skip
            assert process.stdout
            answered = process.stdout.readline()
            seconds = time.perf_counter() - started
            peak = process.stdout.read()
        if answered.strip() != "answered" or not peak.strip():
            stderr.seek(0)
            reason = (stderr.read().strip().splitlines() or ["no reason given"])[-1]
            reason = re.sub(r"^distill\.[\w.]+Error: ", "", reason)
            raise DistillError(f"{folder / file}: could not be run in a process of its own: {reason}")
    return seconds, float(peak)
