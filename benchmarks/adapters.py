"""Full fine-tuning, LoRA and QLoRA of one teacher: quality, time and highest memory, each in its own process.

Scored on validation; the test split is not looked at. Prints a table and keeps
benchmarks/results/adapters/SET_MODEL.json. On a CPU 4-bit weights are computed with, but not fast.

Usage: python benchmarks/adapters.py DATA --model all-mpnet-base-v2 --set snips

DATA holds a folder for every set, as `distill train-teacher --data` takes it.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
import torch

RESULTS = Path(__file__).resolve().parent / "results" / "adapters"
KINDS = {"full": (), "LoRA": ("lora",), "QLoRA": ("qlora",)}


def one(kind: str, data: str, model: str, epochs: float) -> dict[str, float]:
    """Train one kind in this process."""
    from distill.teacher.training import tune_teacher

    started = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        score = tune_teacher(
            output=Path(scratch) / "run", data=data, model=model, epochs=epochs,
            **dict.fromkeys(KINDS[kind], True),
        )  # fmt: skip
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"macro_f1": score, "seconds": time.monotonic() - started, "peak_bytes": peak or resident}


@click.command()
@click.argument("data", type=click.Path(path_type=Path, file_okay=False, exists=True))
@click.option("--model", default="sentence-transformers/all-mpnet-base-v2", help="Checkpoint.")
@click.option("--set", "names", multiple=True, default=("snips", "sst2_sentences"), help="Sets to run.")
@click.option("--kind", "kinds", type=click.Choice(list(KINDS)), multiple=True, default=tuple(KINDS))
@click.option("--epochs", type=float, default=3.0, help="Passes over the training text.")
@click.option("--one", "alone", is_flag=True, help="Train a single kind in this process, and print JSON.")
def main(
    data: Path, model: str, names: tuple[str, ...], kinds: tuple[str, ...], epochs: float, alone: bool
) -> None:
    """Run all kinds on all sets."""
    from distill.latency import cpu_name

    if alone:
        click.echo(json.dumps(one(kinds[0], str(data / names[0]), model, epochs)))
        return
    RESULTS.mkdir(parents=True, exist_ok=True)
    for name in names:
        rows = {}
        for kind in kinds:
            command = [sys.executable, __file__, str(data), "--model", model, "--set", name, "--kind", kind]
            command += ["--epochs", str(epochs), "--one"]
            shown = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            rows[kind] = json.loads(shown.stdout.splitlines()[-1])
            click.echo(
                f"{name:16} {kind:6} macro-F1 {rows[kind]['macro_f1']:.4f}, {rows[kind]['seconds']:.0f} s, "
                f"{rows[kind]['peak_bytes'] / 2**30:.2f} GiB"
            )
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name()
        result = {"device": device, "model": Path(model).name, "epochs": epochs, "kinds": rows}
        (RESULTS / f"{name}_{Path(model).name}.json").write_text(
            json.dumps(result, indent=2) + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    main()
