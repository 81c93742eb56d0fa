"""Latency of several versions, measured in turns in one run, so that other load hits all alike."""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np


def cpu_name() -> str:
    """Model name of this CPU and the instruction sets that decide INT8 and bf16 speed."""
    try:
        info = Path("/proc/cpuinfo").read_text()
    except OSError:
        return "unknown CPU"
    model = next(
        (line.split(":")[1].strip() for line in info.splitlines() if line.startswith("model name")),
        "unknown CPU",
    )
    known = {
        "avx2": "AVX2",
        "avx512_vnni": "AVX512-VNNI",
        "avx_vnni": "AVX-VNNI",
        "avx512_bf16": "AVX512-BF16",
    }
    present = [name for flag, name in known.items() if f" {flag}" in info]
    return f"{model} ({os.cpu_count()} cores; {', '.join(present) or 'no AVX2'})"


def cpu_has_vnni() -> bool:
    """Say whether this CPU multiplies INT8 natively; without, INT8 products may saturate and gain less."""
    try:
        info = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "avx512_vnni" in info or "avx_vnni" in info


def measure(
    versions: Mapping[str, Callable[[Any], object]], texts: Sequence[Any], rounds: int = 3
) -> dict[str, float]:
    """Median time of one text at a time, in milliseconds, for every version.

    In every round each version takes all texts, one after the other; a text's time is its best round (the
    one least disturbed), and the median is taken over the texts.

    Args:
        versions: name -> function of one text.
        texts: what to run.
        rounds: how often.
    """
    times = {name: np.full(len(texts), np.inf) for name in versions}
    for run in versions.values():
        for text in texts[:5]:
            run(text)
    for _ in range(rounds):
        for name, run in versions.items():
            for index, text in enumerate(texts):
                started = time.perf_counter()
                run(text)
                times[name][index] = min(times[name][index], time.perf_counter() - started)
    return {name: float(np.median(values) * 1000) for name, values in times.items()}
