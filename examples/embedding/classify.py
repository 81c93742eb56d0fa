"""Classify texts in a Python application, without PyTorch or transformers.

pip install "distill-onnx[cpu]", then: python classify.py BUNDLE < texts.txt
"""

import json
import sys

from distill import Classifier, DistillError


def main(bundle: str) -> None:
    """Answer each line of standard input with a line of JSON."""
    classifier = Classifier(bundle)
    # Bytes, since there a line ends with a line feed alone, as in the other languages.
    texts = (line.rstrip(b"\r\n").decode("utf-8", "surrogateescape") for line in sys.stdin.buffer)
    for logits in classifier.stream_logits(texts):
        scores = dict(zip(classifier.labels, classifier.probabilities(logits).tolist(), strict=True))
        label = classifier.answer(logits)  # a list, where a text may have several
        score = scores[label] if isinstance(label, str) else [scores[one] for one in label]
        answer = {"label": label, "score": score}
        sys.stdout.write(json.dumps(answer, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python classify.py BUNDLE < texts.txt")
    try:
        main(sys.argv[1])
    except DistillError as error:
        sys.exit(str(error))
