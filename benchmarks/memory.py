"""The memory that a training is expected to take, against what it takes: BERT in three sizes, 128 tokens.

Each case is a process of its own: the estimate of `distill.memory.measure`, then two steps of AdamW, whose
highest resident memory is read from /proc (Linux). Prints a table and keeps benchmarks/results/memory.json.

Usage: python benchmarks/memory.py
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import click
import torch
from transformers import BertConfig, BertForSequenceClassification

from distill.latency import cpu_name
from distill.memory import measure

RESULTS = Path(__file__).resolve().parent / "results" / "memory.json"
LENGTH = 128
# Layers, width, texts a step, whether layers are computed again in the backward pass.
CASES = ((2, 128, 32, 0), (6, 384, 16, 0), (6, 384, 16, 1), (12, 768, 8, 0), (12, 768, 8, 1))
# Freed memory goes back at once, so that what is resident is what is in use.
ALLOCATOR = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_WAIT_POLICY": "passive"}


def _resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def _bert(layers: int, width: int, **more: int) -> BertForSequenceClassification:
    return BertForSequenceClassification(
        BertConfig(
            num_hidden_layers=layers,
            hidden_size=width,
            num_attention_heads=width // 64,
            intermediate_size=4 * width,
            num_labels=3,
            **more,
        )
    )


def _inputs(texts: int, length: int = LENGTH, vocabulary: int = 30_000) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, vocabulary, (texts, length))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _steps(model: BertForSequenceClassification, texts: int, length: int, number: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for _ in range(number):
        model(**_inputs(texts, length, model.config.vocab_size)).logits.sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def one(layers: int, width: int, texts: int, recompute: int) -> dict[str, float]:
    """Estimate and measured peak of one case, in bytes; in a fresh process."""
    _steps(_bert(1, 64, vocab_size=99), 2, 8, 1)  # what the libraries take for themselves
    before = _resident("VmRSS")
    model = _bert(layers, width)
    estimate = measure(model, _inputs, "fp32").peak(texts, recompute=bool(recompute))
    Path("/proc/self/clear_refs").write_text("5")  # the highest value starts again from here
    if recompute:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    _steps(model.train(), texts, LENGTH, 2)
    peak = _resident("VmHWM") - before
    return {"estimate": estimate, "peak": peak, "ratio": estimate / peak}


@click.command()
@click.option("--case", help="One case alone, in this process, as JSON: 6,384,16,0.")
def main(case: str | None) -> None:
    """Run all cases, or one."""
    if case:
        click.echo(json.dumps(one(*map(int, case.split(",")))))
        return
    rows = {}
    for layers, width, texts, recompute in CASES:
        name = f"{layers} x {width}, {texts} texts{', recomputed' if recompute else ''}"
        command = [sys.executable, __file__, "--case", f"{layers},{width},{texts},{recompute}"]
        shown = subprocess.run(
            command, check=True, capture_output=True, text=True, env={**os.environ, **ALLOCATOR}
        )
        rows[name] = json.loads(shown.stdout)
        mib = {key: rows[name][key] / 2**20 for key in ("estimate", "peak")}
        click.echo(
            f"{name:32} estimate {mib['estimate']:7.0f} MiB, peak {mib['peak']:7.0f} MiB, "
            f"ratio {rows[name]['ratio']:.3f}"
        )
    RESULTS.write_text(json.dumps({"cpu": cpu_name(), "length": LENGTH, "cases": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
