"""The page's figures as inline SVG: one function a figure, colours left to the style sheet."""

import math
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

MARKERS = ("circle", "square", "diamond", "triangle")


def _marker(index: int, x: float, y: float, title: str, size: float = 5) -> Markup:
    """A point of version number `index`: its own colour and its own shape."""
    wide = size + 1
    shapes = {
        "circle": f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{size}"/>',
        "square": f'<rect x="{x - size:.1f}" y="{y - size:.1f}" width="{2 * size}" height="{2 * size}"/>',
        "diamond": f'<path d="M{x:.1f} {y - wide:.1f}l{wide} {wide}-{wide} {wide}-{wide}-{wide}z"/>',
        "triangle": f'<path d="M{x:.1f} {y - size:.1f}l{size} {2 * size}h-{2 * size}z"/>',
    }
    shape = Markup(shapes[MARKERS[index % len(MARKERS)]])
    return Markup('<g class="v{}">{}<title>{}</title></g>').format(index % len(MARKERS), shape, title)


def _svg(width: int, height: int, label: str, parts: Sequence[Markup]) -> Markup:
    return Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        width, height, label, Markup("").join(parts)
    )


def _text(x: float, y: float, content: str, anchor: str = "middle") -> Markup:
    return Markup('<text x="{}" y="{}" text-anchor="{}">{}</text>').format(
        f"{x:.1f}", f"{y:.1f}", anchor, content
    )


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> Markup:
    return Markup('<line class="{}" x1="{}" y1="{}" x2="{}" y2="{}"/>').format(
        kind, *(f"{value:.1f}" for value in (x1, y1, x2, y2))
    )


def _steps(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers that cover low to high, in about `count` steps."""
    raw = max(high - low, 1e-6) / count
    magnitude = 10 ** math.floor(math.log10(raw))
    step = next(size * magnitude for size in (1, 2, 5, 10) if size * magnitude >= raw)
    first = math.floor(low / step)
    last = max(math.ceil(high / step), first + 1)
    return [number * step for number in range(first, last + 1)]


def accuracy_against_latency(versions: Sequence[dict[str, Any]]) -> Markup:
    """Macro-F1 with its interval against latency on a logarithmic axis; up and left is better."""
    width, height, left, right, top, bottom = 440, 270, 48, 20, 16, 44
    times = [row["latency_ms"] for row in versions]
    low, high = math.log10(min(times)) - 0.15, math.log10(max(times)) + 0.2
    ends = [row["intervals"]["macro_f1"] for row in versions]
    ticks = _steps(min(end["low"] for end in ends), max(end["high"] for end in ends))

    decimals = max(2, math.ceil(-math.log10(ticks[1] - ticks[0])))

    def x_of(value: float) -> float:
        return left + (math.log10(value) - low) / (high - low) * (width - left - right)

    def y_of(value: float) -> float:
        return height - bottom - (value - ticks[0]) / (ticks[-1] - ticks[0]) * (height - top - bottom)

    parts = []
    for tick in ticks:
        parts += [_line(left, y_of(tick), width - right, y_of(tick), "grid")]
        parts += [_text(left - 6, y_of(tick) + 4, f"{tick:.{decimals}f}", "end")]
    for power in range(-3, 5):
        for factor in (1, 2, 5):
            value = factor * 10.0**power
            if low <= math.log10(value) <= high:
                parts += [_line(x_of(value), top, x_of(value), height - bottom, "grid")]
                parts += [_text(x_of(value), height - bottom + 16, f"{value:g}")]
    parts += [_text((left + width) / 2, height - 8, "milliseconds a text, one thread (logarithmic)")]
    for index, row in enumerate(versions):
        x, end = x_of(row["latency_ms"]), row["intervals"]["macro_f1"]
        parts.append(
            Markup('<g class="v{}">{}</g>').format(
                index, _line(x, y_of(end["low"]), x, y_of(end["high"]), "bar")
            )
        )
        title = f"{row['version']}: macro-F1 {end['value']:.4f}, {row['latency_ms']:.2f} ms"
        parts.append(_marker(index, x, y_of(end["value"]), title, 6))
        parts.append(_text(x, y_of(end["high"]) - 6, row["version"]))
    return _svg(width, height, "Macro-F1 against latency of every version", parts)


def reliability(index: int, name: str, found: dict[str, Any]) -> Markup:
    """Accuracy against stated probability in bins: hollow before, filled after temperature scaling."""
    size, left, top = 240, 40, 14
    side = size - left - top

    def at(confidence: float, accuracy: float) -> tuple[float, float]:
        return left + confidence * side, top + (1 - accuracy) * side

    parts = [_line(*at(0, 0), *at(1, 1), "grid")]
    for tick in (0, 0.5, 1):
        parts += [
            _text(at(tick, 0)[0], top + side + 15, f"{tick:g}"),
            _text(left - 6, at(0, tick)[1] + 4, f"{tick:g}", "end"),
        ]
    parts += [
        Markup('<rect class="frame" x="{}" y="{}" width="{}" height="{}"/>').format(left, top, side, side)
    ]
    most = max(found["calibrated"]["count"])
    for state, kind in (("uncalibrated", "hollow"), ("calibrated", "filled")):
        one = found[state]
        for confidence, accuracy, count in zip(one["confidence"], one["accuracy"], one["count"], strict=True):
            title = f"{state}: stated {confidence:.2f}, right {accuracy:.2f}, {count} texts"
            x, y = at(confidence, accuracy)
            marker = _marker(index, x, y, title, 2 + 4 * math.sqrt(count / most))
            parts.append(Markup('<g class="{}">{}</g>').format(kind, marker))
    parts += [
        _text(left + side / 2, size - 2, "stated probability"),
        _text(left + 4, top + 14, "share right", "start"),
    ]
    return _svg(size, size + 4, f"Reliability of {name}", parts)


def risk_against_coverage(versions: Sequence[dict[str, Any]]) -> Markup:
    """Share of answers that are wrong against the share of texts that are answered."""
    width, height, left, right, top, bottom = 560, 280, 48, 20, 12, 42
    curves = [row["abstention"]["curve"] for row in versions]
    ticks = _steps(
        0, max(0.02, *(point["risk"] for curve in curves for point in curve if point["coverage"] > 0.1))
    )

    def at(coverage: float, risk: float) -> tuple[float, float]:
        y = height - bottom - min(risk, ticks[-1]) / ticks[-1] * (height - top - bottom)
        return left + coverage * (width - left - right), y

    parts = []
    for tick in ticks:
        parts += [
            _line(*at(0, tick), *at(1, tick), "grid"),
            _text(left - 6, at(0, tick)[1] + 4, f"{100 * tick:g} %", "end"),
        ]
    for share in (0, 0.25, 0.5, 0.75, 1):
        parts.append(_text(at(share, 0)[0], height - bottom + 16, f"{100 * share:g} %"))
    parts.append(_text((left + width) / 2, height - 6, "texts answered, the most certain first"))
    for index, (row, curve) in enumerate(zip(versions, curves, strict=True)):
        points = " ".join("{:.1f},{:.1f}".format(*at(point["coverage"], point["risk"])) for point in curve)
        parts.append(
            Markup('<g class="v{}"><polyline class="curve d{}" points="{}"/><title>{}</title></g>').format(
                index, index, points, row["version"]
            )
        )
    return _svg(width, height, "Wrong answers against texts answered", parts)


def line_key(index: int) -> Markup:
    """A short piece of a version's line in `risk_against_coverage`, for its legend."""
    return Markup(
        '<svg viewBox="0 0 30 8" aria-hidden="true"><g class="v{}">'
        '<path class="curve d{}" d="M0 4h30"/></g></svg>'
    ).format(index, index)


def difference(change: dict[str, float], call: str, scale: float) -> Markup:
    """A difference of F1 with its interval on an axis from -scale to scale; the line in the middle is 0."""
    width, height = 140, 16
    x_of = [
        width / 2 + max(-1.0, min(1.0, change[name] / scale)) * (width / 2 - 4)
        for name in ("low", "value", "high")
    ]
    parts = [
        _line(width / 2, 0, width / 2, height, "grid"),
        Markup('<g class="{}">{}{}</g>').format(
            call,
            _line(x_of[0], height / 2, x_of[2], height / 2, "bar"),
            Markup('<circle cx="{}" cy="{}" r="3.5"/>').format(f"{x_of[1]:.1f}", height / 2),
        ),
    ]
    label = f"{100 * change['value']:+.1f} points, {100 * change['low']:+.1f} to {100 * change['high']:+.1f}"
    return _svg(width, height, label, parts)
