"""What may be wrong with labelled text, found and reported before any training."""

import logging
from dataclasses import dataclass

import numpy as np
from datasets import Dataset

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Finding:
    """One kind of trouble in one split: how often, where, and what was done about it."""

    kind: str
    split: str
    count: int
    examples: list[str]
    action: str

    def __str__(self) -> str:
        examples = "; ".join(self.examples)
        return f"{self.split}: {self.kind} × {self.count:,} ({examples}): {self.action}"


def report_findings(findings: list[Finding]) -> None:
    """Log every finding, one line each."""
    for finding in findings:
        logger.warning("  %s", finding)


def _examples(dataset: Dataset, rows: np.ndarray) -> list[str]:
    """The first three different texts among the rows."""
    _, first = np.unique(np.asarray(dataset["id"])[rows], return_index=True)
    return [repr(dataset[int(row)]["text"][:60]) for row in rows[np.sort(first)[:3]]]


def find_duplicates(splits: dict[str, Dataset], findings: list[Finding]) -> dict[str, Dataset]:
    """Report duplicates inside splits, and drop from the earlier split what also stands in a later one.

    Nothing is ever dropped from test. Texts are compared by their id.
    """
    ids = {name: np.asarray(dataset["id"]) for name, dataset in splits.items()}
    for name, dataset in splits.items():
        labels = np.asarray([str(label) for label in dataset["label"]])
        order = np.argsort(ids[name], kind="stable")
        same = ids[name][order][1:] == ids[name][order][:-1]
        repeated = np.sort(order[1:][same])
        if len(repeated):
            findings.append(
                Finding("duplicate text", name, len(repeated), _examples(dataset, repeated), "kept")
            )
        clash = np.sort(order[1:][same & (labels[order][1:] != labels[order][:-1])])
        if len(clash):
            findings.append(
                Finding("same text, different labels", name, len(clash), _examples(dataset, clash), "kept")
            )
    kept = dict(splits)
    for name, later in (("train", ["validation", "test"]), ("validation", ["test"])):
        leaked = np.isin(ids[name], np.concatenate([ids[split] for split in later]))
        if leaked.any():
            rows = np.flatnonzero(leaked)
            where = " or ".join(later)
            findings.append(
                Finding(
                    f"text also in {where}",
                    name,
                    len(rows),
                    _examples(splits[name], rows),
                    f"dropped from {name}",
                )
            )
            kept[name] = splits[name].select(np.flatnonzero(~leaked))
    return kept
