"""The example web service under load: answers, latencies, and what it does when it gets too much.

200 clients ask for one text each, one after the other, for a minute; every answer is held against
`Classifier`'s own. Then they send 64 texts a request, more than the machine can classify: some are shed with
503, none fails otherwise, and the service answers as before when it is over. Writes
benchmarks/results/service.json, or the file that --output names.

Usage: python benchmarks/service.py [DEMO_FOLDER], after `make demo` and pip install '.[serve]'.
"""

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from pathlib import Path
from typing import Any

import click
import numpy as np
import pyarrow.csv

from distill import Classifier
from distill.latency import cpu_name

RESULTS = Path(__file__).resolve().parent / "results"
BUNDLE = Path("runs/export")


class Load:
    """Clients that keep their connections, and what came back to them."""

    def __init__(self, port: int, texts: list[str], expected: list[str]) -> None:
        self.port, self.texts, self.expected = port, texts, expected
        self.statuses: Counter[str] = Counter()
        self.wrong = 0
        self.seconds: list[float] = []

    async def client(self, number: int, until: float, size: int) -> None:
        """Ask until the time is over."""
        random = np.random.default_rng(number)
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        while time.monotonic() < until:
            rows = random.integers(len(self.texts), size=size)
            body = json.dumps({"texts": [self.texts[row] for row in rows]}).encode()
            started = time.perf_counter()
            writer.write(
                b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                b"Content-Length: %d\r\n\r\n" % len(body) + body
            )
            head = await reader.readuntil(b"\r\n\r\n")
            status = head.split()[1].decode()
            length = next(
                int(line.split(b":")[1])
                for line in head.lower().split(b"\r\n")
                if line.startswith(b"content-length")
            )
            answer = json.loads(await reader.readexactly(length))
            self.statuses[status] += 1
            if status == "200":
                self.seconds.append(time.perf_counter() - started)
                labels = [one["label"] for one in answer["predictions"]]
                self.wrong += labels != [self.expected[row] for row in rows]
            else:
                await asyncio.sleep(0.1)  # as a client that was asked to come again
        writer.close()

    async def run(self, clients: int, seconds: float, size: int) -> dict[str, Any]:
        """Run all clients and sum up."""
        until = time.monotonic() + seconds
        runs = [self.client(number, until, size) for number in range(clients)]
        failed = [r for r in await asyncio.gather(*runs, return_exceptions=True) if r is not None]
        p50, p95, p99 = np.percentile(self.seconds, [50, 95, 99]) * 1000
        return {
            "clients": clients,
            "seconds": seconds,
            "texts_a_request": size,
            "answers_by_status": dict(self.statuses),
            "wrong_answers": self.wrong,
            "broken_connections": len(failed),
            "texts_per_second": round(size * self.statuses["200"] / seconds),
            "latency_ms": {"p50": round(p50, 1), "p95": round(p95, 1), "p99": round(p99, 1)},
        }


def _memory(pid: int) -> int:
    """Resident memory of a process, in MB."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS"))) // 1024


@click.command()
@click.argument("demo", type=click.Path(path_type=Path, file_okay=False), default=Path("demo"))
@click.option("--clients", default=200)
@click.option("--seconds", default=60.0)
@click.option("--output", type=click.Path(path_type=Path, resolve_path=True), help="File to write.")
def main(demo: Path, clients: int, seconds: float, output: Path | None) -> None:
    """Put the service under load."""
    if not (demo / BUNDLE).is_dir():
        raise click.ClickException(f"{demo}: no finished demo in it; run `make demo` first")
    RESULTS.mkdir(exist_ok=True)
    os.chdir(demo)
    texts = pyarrow.csv.read_csv("sentiment/test.csv")["text"].to_pylist()
    expected = Classifier(BUNDLE, provider="cpu").predict(texts)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["-m", "uvicorn", "distill.examples.embedding.service:app", "--port", str(port)]
    service = subprocess.Popen(
        [sys.executable, *command, "--log-level", "warning"],
        env={**os.environ, "DISTILL_BUNDLE": str(BUNDLE)},
    )
    try:
        health = f"http://127.0.0.1:{port}/health"
        for _ in range(100):
            try:
                urllib.request.urlopen(health)
                break
            except OSError:
                time.sleep(0.1)
        result: dict[str, Any] = {"cpu": cpu_name(), "memory_mb": [_memory(service.pid)]}
        for name, count, duration, size in (
            ("usual", clients, seconds, 1),
            ("overload", clients, seconds / 3, 64),
            ("after", clients, seconds / 6, 1),
        ):
            load = Load(port, texts, expected)
            result[name] = asyncio.run(load.run(count, duration, size))
            result["memory_mb"].append(_memory(service.pid))
        result["health_after"] = json.load(urllib.request.urlopen(health))["status"]
    finally:
        service.terminate()
        service.wait()
    (output or RESULTS / "service.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    click.echo(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
