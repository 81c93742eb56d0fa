"""Classify texts in a Python application, without PyTorch or transformers.

pip install "distill-onnx[cpu]", then: python classify.py BUNDLE < texts.txt
"""

import json
import sys

from distill import Classifier, DistillError


def main(bundle: str) -> None:
    """Answer each line of standard input with a line of JSON."""
    classifier = Classifier(bundle)
    texts = (line.rstrip("\n") for line in sys.stdin)
    for probabilities in classifier.stream_proba(texts):
        best = int(probabilities.argmax())
        answer = {"label": classifier.labels[best], "score": float(probabilities[best])}
        sys.stdout.write(json.dumps(answer, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python classify.py BUNDLE < texts.txt")
    try:
        main(sys.argv[1])
    except DistillError as error:
        sys.exit(str(error))
