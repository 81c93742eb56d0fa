"""The Pareto table and plot of the sets that `pareto.py` has measured, beside its results.

Usage: python benchmarks/pareto_page.py
"""

import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

RESULTS = Path(__file__).resolve().parent / "results" / "pareto"


def _label(name: str) -> str:
    if "_layers" not in name:
        return name
    shape = _shape(name.rpartition("_seed")[0])
    return f"{shape} without a teacher, INT8" if "_alone" in name else f"student of {shape}, INT8"


def _shape(name: str) -> str:
    """`1_layers_3000_rows` or `2_layers_narrow` in words."""
    layers, _, *more = name.removesuffix("_alone").split("_")
    depth = {"0": "no layers", "1": "1 layer"}.get(layers, f"{layers} layers")
    if more == ["narrow"]:
        return depth.replace(" layer", " narrow layer")
    return f"{depth}, {int(more[0]):,} rows" if more else depth


def _merged(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Rows of the table: the mean over seeds, with the figures that only one seed was measured for."""
    groups: dict[str, list[dict[str, Any]]] = {}
    depths = {name: int(name[0]) if "_layers" in name else -1 for name in results}
    for name, row in sorted(results.items(), key=lambda one: depths[one[0]]):
        groups.setdefault(_label(name), []).append(row)
    merged = {}
    for label, rows in groups.items():
        merged[label] = {key: value for row in reversed(rows) for key, value in row.items()}
        for key in ("macro_f1", "macro_f1_pytorch", "kept"):
            if key in rows[0]:
                merged[label][key] = sum(row[key] for row in rows) / len(rows)
        merged[label]["seeds"] = len(rows)
    return merged


def table(name: str, result: dict[str, Any]) -> str:
    """Markdown of one set."""
    deep = f", with layers `{result['recipe_with_layers']}`" if "recipe_with_layers" in result else ""
    narrow = f"; narrow ones with `{result['narrow']}`" if "narrow" in result else ""
    lines = [
        f"## {name}",
        "",
        f"{result['classes']} classes; {result['rows']['train']:,} texts for training, "
        f"{result['rows']['test']:,} for the test; {result['cpu']}. Students: `distill train-student "
        f"{result['recipe']}`{deep}{narrow}; without layers they start from the teacher, "
        "without a teacher from the teacher's own checkpoint (`--student`); without a teacher: "
        f"`distill train-student {result['recipe_alone']}`.",
        "",
        "| version | macro-F1 | before INT8 | kept | ms | times as fast | MB |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for label, row in _merged(result["results"]).items():
        latency = f"{row['latency_ms']:.2f} | {row['speed_up']:.0f}" if "latency_ms" in row else "|"
        seeds = f" ({row['seeds']} seeds)" if row["seeds"] > 1 else ""
        before = f"{row['macro_f1_pytorch']:.4f}" if "macro_f1_pytorch" in row else ""
        lines.append(
            f"| {label}{seeds} | {row['macro_f1']:.4f} | {before} | "
            f"{row['kept']:.1%} | {latency} | {row['bytes'] / 1e6:.1f} |"
        )
    for shape, seeded in result["seeded"].items():
        gain = seeded.get("gain_over_no_teacher")
        gained = gain and (
            f"; by the teacher gained {100 * gain['value']:.1f} points (95 % interval "
            f"{100 * gain['low']:+.1f} to {100 * gain['high']:+.1f})"
        )
        spread = f"{seeded['mean']:.4f} ± {seeded['deviation']:.4f} over seeds"
        loss = seeded.get("validation_loss")
        chosen = f"; its loss on validation text is {loss:.4f}" if loss is not None else ""
        if "validation_macro_f1" in seeded:
            chosen += f", its macro-F1 there {seeded['validation_macro_f1']:.4f}"
        lines += ["", f"{_shape(shape).capitalize()}: {spread}{chosen}{gained or ''}."]
    lines.append("")
    return "\n".join(lines)


def plot(results: dict[str, dict[str, Any]], path: Path) -> None:
    """Macro-F1 against latency, one panel a set."""
    figure, axes = plt.subplots(1, len(results), figsize=(4.5 * len(results), 4), squeeze=False)
    known: dict[str, Any] = {}  # a version looks alike in all panels
    for axis, (name, result) in zip(axes[0], results.items(), strict=True):
        for label, row in _merged(result["results"]).items():
            if "latency_ms" in row:
                marker = "o" if label.startswith(("student", "teacher")) else "x"
                color = known[label].get_facecolor() if label in known else f"C{len(known)}"
                dot = axis.scatter(row["latency_ms"], row["macro_f1"], s=60, marker=marker, color=color)
                known.setdefault(label, dot)
        axis.set(xscale="log", xlabel="milliseconds a text, one thread", ylabel="test macro-F1", title=name)
        axis.grid(alpha=0.3)
    figure.tight_layout()
    columns = min(5, 2 * len(results))
    figure.legend(
        known.values(),
        known.keys(),
        ncols=columns,
        fontsize=8,
        frameon=False,
        loc="upper center",
        bbox_to_anchor=(0.5, 0.0),
    )
    plt.rcParams["svg.hashsalt"] = "pareto"  # the same plot is the same file
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})


def main() -> None:
    """Write README.md and pareto.svg."""
    results = {
        path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("*.json"))
    }
    if not results:
        raise SystemExit(f"{RESULTS}: no results yet; run pareto.py first")
    page = ["# Quality against latency and size", ""]
    page += ["Written by `python benchmarks/pareto_page.py`. Intervals are over test texts and seeds.", ""]
    page += [table(name, result) for name, result in results.items()]
    page += ["![macro-F1 against latency](pareto.svg)", ""]
    (RESULTS / "README.md").write_text("\n".join(page), encoding="utf-8")
    plot(results, RESULTS / "pareto.svg")


if __name__ == "__main__":
    main()
