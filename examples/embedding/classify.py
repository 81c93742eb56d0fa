"""Classify texts in a Python application, without PyTorch or transformers.

pip install "distill-onnx[cpu]", then: python classify.py BUNDLE < texts.txt
"""

import json
import os
import sys
from collections.abc import Iterator

from distill import Classifier, DistillError


def lines() -> Iterator[str]:
    """Lines of standard input; in bytes one ends at a line feed alone, as in the other languages."""
    for number, line in enumerate(sys.stdin.buffer, start=1):
        try:
            yield line.rstrip(b"\r\n").decode()
        except UnicodeDecodeError as error:
            raise DistillError(f"line {number}: not UTF-8 ({error.reason}); convert the text") from None


def main(bundle: str) -> None:
    """Answer each line of standard input with a line of JSON."""
    classifier = Classifier(bundle)
    for logits in classifier.stream_logits(lines()):
        scores = dict(zip(classifier.labels, classifier.probabilities(logits).tolist(), strict=True))
        label = classifier.answer(logits)  # a list, where a text may have several
        score = scores[label] if isinstance(label, str) else [scores[one] for one in label]
        answer = {"label": label, "score": score}
        sys.stdout.write(json.dumps(answer, ensure_ascii=False) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python classify.py BUNDLE < texts.txt")
    try:
        main(sys.argv[1])
    except DistillError as error:
        sys.exit(str(error))
    except BrokenPipeError:  # nobody reads on, as in `| head`; Python must not try again at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
