"""What the products of a graph read, over the validation text that INT8 is fitted to."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import onnx
from distill.export.draft import Draft
from distill.export.rounding import Moments, Products
from numpy.typing import NDArray
from onnx import numpy_helper

TEXTS = 512  # of validation, at most
TOKENS = 16_384  # about as many in all, so that long texts take no longer
BUFFER = 1024  # rows that are multiplied at once
Rows = NDArray[np.float32]


def products(model: onnx.ModelProto) -> Products:
    """The nodes that multiply activations with a constant matrix (input, output channels), and the matrix."""
    constants = {entry.name: entry for entry in model.graph.initializer}
    return [
        (node, numpy_helper.to_array(constants[node.input[1]]))
        for node in model.graph.node
        if node.op_type in ("MatMul", "Attention")
        and node.input[1] in constants
        and len(constants[node.input[1]].dims) == 2
    ]


def observe(draft: Draft, model: onnx.ModelProto) -> Iterator[tuple[str, Rows]]:
    """Name and values, shape (tokens, channels), of what the `products` read in texts in random order."""
    names = list(dict.fromkeys(node.input[0] for node, _ in products(model)))
    exposed = onnx.ModelProto()
    exposed.CopyFrom(model)
    exposed.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    path = draft.folder / "onnx" / "observed.onnx"
    onnx.save(exposed, path)
    try:
        classifier = draft.open(path)
    finally:
        path.unlink()
    texts, tokens = draft.texts["validation"], 0
    for number in np.random.default_rng(0).permutation(len(texts))[:TEXTS]:
        found = [values.reshape(-1, values.shape[-1]) for values in classifier.outputs(texts[number])[1:]]
        yield from zip(names, found, strict=True)
        tokens += max(map(len, found), default=0)
        if tokens >= TOKENS:
            return


def channel_ranges(observed: Iterable[tuple[str, Rows]]) -> dict[str, Rows]:
    """Least and largest value of each observed tensor, shape (2, channels); 0 is between."""
    ranges: dict[str, Rows] = {}
    for name, rows in observed:
        low, high = ranges.get(name, np.zeros((2, rows.shape[1]), dtype=np.float32))
        ranges[name] = np.stack([np.minimum(low, rows.min(axis=0)), np.maximum(high, rows.max(axis=0))])
    return ranges


def moments(
    observed: Iterable[tuple[str, Rows]], quantized: Callable[[str, Rows], Rows]
) -> dict[str, Moments]:
    """Moments of each observed tensor, and of what is left of it in INT8.

    Args:
        observed: as `observe` gives it.
        quantized: name and values of a text, shape (tokens, channels) -> the values that INT8 stands for.
    """
    sums: dict[str, _Sums] = defaultdict(_Sums)
    for name, rows in observed:
        sums[name].add(rows, quantized(name, rows))
    return {name: found.moments() for name, found in sums.items()}


class _Sums:
    """Sums over rows; products of them are taken many rows at once, about a mean, so that they are exact."""

    def __init__(self) -> None:
        self.waiting: list[tuple[Rows, Rows]] = []
        self.count = 0
        self.origin: Any = None
        self.total: Any = 0.0
        self.quantized: Any = 0.0
        self.squares: Any = 0.0

    def add(self, rows: Rows, quantized: Rows) -> None:
        self.waiting.append((rows, quantized))
        if sum(len(one) for one, _ in self.waiting) >= BUFFER:
            self._flush()

    def _flush(self) -> None:
        rows, quantized = (np.concatenate(side) for side in zip(*self.waiting, strict=True))
        self.waiting = []
        if self.origin is None:
            self.origin = quantized.mean(axis=0)
        centred = quantized - self.origin
        self.count += len(rows)
        self.total = self.total + rows.sum(axis=0, dtype=np.float64)
        self.quantized = self.quantized + quantized.sum(axis=0, dtype=np.float64)
        self.squares = self.squares + (centred.T @ centred).astype(np.float64)

    def moments(self) -> Moments:
        if self.waiting:
            self._flush()
        mean = self.quantized / self.count
        off = mean - self.origin
        return Moments(self.total / self.count, mean, self.squares / self.count - np.outer(off, off))


def dynamic_uint8(_: str, rows: Rows) -> Rows:
    """What DynamicQuantizeLinear leaves of a text's values: UINT8, one scale and zero for all.

    Formula: https://onnx.ai/onnx/operators/onnx__DynamicQuantizeLinear.html
    """
    low, high = min(float(rows.min()), 0.0), max(float(rows.max()), 0.0)
    step = (high - low) / 255 or 1.0
    zero = np.clip(np.rint(-low / step), 0, 255)
    return np.asarray((np.clip(np.rint(rows / step) + zero, 0, 255) - zero) * step, dtype=np.float32)
