"""The table and the picture of `distill benchmark`."""

import logging
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw latencies as bars from nought to the median, with lines to the 95th and 99th percentile."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        logger.info("No picture: pip install matplotlib")
        return
    rows = result["versions"][::-1]
    figure = Figure(figsize=(8, 0.9 + 0.55 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    for position, row in enumerate(rows):
        latency = row["latency_ms"]
        axes.barh(position, latency["p50"], height=0.55, color="#4c78a8")
        axes.plot([latency["p50"], latency["p99"]], [position] * 2, color="#1f1f1f", linewidth=1)
        axes.plot([latency["p95"], latency["p99"]], [position] * 2, "|", color="#1f1f1f", markersize=9)
        note = f"{latency['p50']:.2f} ms, {row['speedup']['median']:.1f}x, {row['bytes'] / 1e6:.0f} MB"
        axes.annotate(note, (latency["p99"], position), (6, 0), textcoords="offset points", va="center")
    axes.set_yticks(range(len(rows)), [row["version"] for row in rows])
    axes.set_xlim(0, 1.45 * max(row["latency_ms"]["p99"] for row in rows))
    axes.set_xlabel(
        "milliseconds a text, one thread: median, and marks at the 95th and 99th percentile\n" + result["cpu"]
    )
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def render(result: dict[str, Any]) -> str:
    """The table, and what it does not prove."""
    header = (
        "version",
        "p50 ms",
        "p95",
        "p99",
        "faster",
        "by round",
        "texts/s",
        "cold s",
        "peak MB",
        "file MB",
    )
    table = [header]
    for row in result["versions"]:
        latency, speedup = row["latency_ms"], row["speedup"]
        table.append(
            (
                row["version"],
                *(f"{latency[name]:.2f}" for name in ("p50", "p95", "p99")),
                f"{speedup['median']:.1f}x",
                f"{speedup['low']:.1f}-{speedup['high']:.1f}",
                f"{row['texts_per_second']['median']:,.0f}",
                f"{row['cold_start_s']['median']:.2f}",
                f"{row['peak_memory_mb']['median']:.0f}",
                f"{row['bytes'] / 1e6:.1f}",
            )
        )
    widths = [max(len(line[column]) for line in table) for column in range(len(header))]
    lines = [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in table
    ]
    lines += [
        "",
        f"{result['texts']} texts, {result['rounds']} rounds, {result['cpu']}.",
        f"Latency: one text at a time, one thread. texts/s: {result['threads']} threads. "
        "cold: from starting Python to the first answer.",
        "Medians; how far rounds and processes lie apart stands in benchmark.json.",
        f"faster: than {result['versions'][0]['version']}; by round: the least and the most of the rounds.",
    ]
    if result["texts"] < 100:
        lines.append("So few texts say little about p95 and p99: give 100 or more.")
    on_cpu = [row["version"] for row in result["versions"] if row["runs_on"] == "pytorch"]
    if on_cpu and any(row["runs_on"] == "cuda" for row in result["versions"]):
        lines.append(f"On the CPU, in PyTorch: {', '.join(on_cpu)}; the others on CUDA.")
    lines += [
        f"{first} and {second} cannot be told apart by {what}: neither was faster in every round. "
        "Run it on a quieter machine, or with more --rounds and --texts."
        for what, key in (("latency", "latency"), ("texts/s", "texts_per_second"))
        for first, second in result["not_told_apart"][key]
    ]
    return "\n".join(lines) + "\n"
