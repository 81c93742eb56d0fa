"""Do other languages give the answers of `Classifier`? One bundle through each example, on the same texts.

Python from the single file, Node.js and headless Chromium through transformers.js, and C++ through ONNX
Runtime's C API, each with the INT8 and the fp32 model. What is not installed is left out and said so. Writes
benchmarks/results/embedding.json.

Usage: python benchmarks/embedding.py [DEMO_FOLDER], after `make demo` and `make embedding`.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import click
import numpy as np
import pyarrow.csv
from numpy.typing import NDArray

from distill import Classifier
from distill.latency import cpu_name

RESULTS = Path(__file__).resolve().parent / "results"
EXAMPLES = Path(__file__).resolve().parents[1] / "examples" / "embedding"
FILES = {"int8": "onnx/model_quantized.onnx", "fp32": "onnx/model.onnx"}
DTYPES = {"int8": "q8", "fp32": "fp32"}
ODD = [
    "good 👍 café naïve — “quoted” …", "ÀÉÎÕÜ ñandú Straße ΑΣ İstanbul ﬁne", "日本語のレビュー is fine",
    "http://t.co/a_b?c=d#e @user #tag", "a\tb\u00a0c\u200bd\u3000e", "x" * 300, "don't can't won't :-) :( <3",
    "1,234.56 € 50% off!!!", "Ⅷ ½ ² ™ ©", "مرحبا بالعالم", "Привет, мир!", "नमस्ते दुनिया",
    "e\u0301 a\u030a", "🤷🏽‍♀️🏳️‍🌈", "one\u2028two\u2029three\x85four\x0bfive\x0csix", "a\rb",
]  # fmt: skip


def by_label(rows: list[list[dict[str, Any]]], labels: list[str]) -> NDArray[np.float64]:
    """Scores as transformers.js gives them, as an array of shape (n, classes)."""
    return np.array(
        [[{one["label"]: one["score"] for one in row}[label] for label in labels] for row in rows]
    )


def run_node(bundle: Path, texts: list[str], version: str) -> NDArray[np.float64]:
    """Probabilities from `classify.mjs`."""
    labels = Classifier(bundle).labels
    command = ["node", "classify.mjs", str(bundle.resolve()), DTYPES[version]]
    found = subprocess.run(
        command,
        cwd=EXAMPLES / "javascript",
        input="\n".join(texts),
        capture_output=True,
        text=True,
        check=True,
    )
    return by_label([json.loads(line) for line in found.stdout.splitlines()], labels)


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


def run_chromium(bundle: Path, texts: list[str], version: str) -> NDArray[np.float64]:
    """Probabilities from `index.html` in headless Chromium, which finds no other host than this one."""
    from selenium import webdriver
    from selenium.webdriver.support.ui import WebDriverWait

    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        for name in ("index.html", "node_modules"):
            (root / name).symlink_to(EXAMPLES / "javascript" / name)
        (root / "bundle").symlink_to(bundle.resolve())
        server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=scratch))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        options = webdriver.ChromeOptions()
        alone = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
        for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", alone):
            options.add_argument(argument)
        options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
        # Named, so that selenium does not look for one on the network.
        browser = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
        try:
            origin = f"http://127.0.0.1:{server.server_port}"
            browser.get(f"{origin}/index.html?dtype={DTYPES[version]}")
            status = browser.find_element("id", "status")
            WebDriverWait(browser, 60).until(lambda _: status.text != "Loading …")
            if not status.text.startswith("Ready"):
                raise RuntimeError(status.text)
            browser.set_script_timeout(100)
            rows = browser.execute_async_script(
                "const [texts, done] = arguments; (async () => { const found = [];"
                "for (const text of texts) found.push(await window.classify(text)); done(found); })()",
                texts,
            )
            messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
        finally:
            browser.quit()
            server.shutdown()
    asked = [
        message["params"]["request"]["url"]
        for message in messages
        if message["method"] == "Network.requestWillBeSent"
    ]
    elsewhere = [url for url in asked if not url.startswith((origin, "data:", "blob:"))]
    if elsewhere:
        raise RuntimeError(f"the page asked {elsewhere[0]}")
    return by_label(rows, Classifier(bundle).labels)


def run_cpp(bundle: Path, texts: list[str], version: str) -> list[tuple[str, float]]:
    """Labels and their calibrated probabilities from `cpp/classify`."""
    command = [str(EXAMPLES / "cpp" / "classify"), str(bundle), FILES[version]]
    found = subprocess.run(command, input="\n".join(texts), capture_output=True, text=True, check=True)
    rows = [line.split("\t") for line in found.stdout.splitlines()]
    return [(label, float(score)) for label, score in rows]


def compare(bundle: Path, texts: list[str], version: str, run: Callable[..., Any]) -> dict[str, Any]:
    """How many labels are those of `Classifier`, and how far probabilities are apart."""
    classifier = Classifier(bundle, provider="cpu", file=FILES[version], calibrated=run is run_cpp)
    expected = classifier.predict_proba(texts)
    found = run(bundle, texts, version)
    if run is run_cpp:
        labels = [label for label, _ in found]
        difference = np.abs(expected.max(axis=1) - [score for _, score in found]).max()
    else:
        labels = [classifier.labels[index] for index in found.argmax(axis=1)]
        difference = np.abs(expected - found).max()
    same = sum(a == classifier.labels[b] for a, b in zip(labels, expected.argmax(axis=1), strict=True))
    return {"texts": len(texts), "same_label": same, "largest_probability_difference": float(difference)}


def available() -> dict[str, Callable[..., Any]]:
    """The examples that this machine can run."""
    found: dict[str, Callable[..., Any]] = {}
    if (EXAMPLES / "javascript" / "node_modules").is_dir():
        found["node"] = run_node
        try:
            import selenium  # noqa: F401
        except ModuleNotFoundError:
            pass
        else:
            if shutil.which("chromedriver"):
                found["chromium"] = run_chromium
    if (EXAMPLES / "cpp" / "classify").is_file():
        found["cpp"] = run_cpp
    return found


@click.command()
@click.argument("demo", type=click.Path(path_type=Path, file_okay=False), default=Path("demo"))
@click.option("--texts", "count", default=500)
def main(demo: Path, count: int) -> None:
    """Compare every example with `Classifier` on the demo's test texts."""
    if not (demo / "runs" / "export").is_dir():
        raise click.ClickException(f"{demo}: no finished demo in it; run `make demo` first")
    os.chdir(demo)
    column = pyarrow.csv.read_csv("sentiment/test.csv")["text"].to_pylist()
    texts = [text for text in (" ".join(text.split()) for text in column) if text][:count]
    sides = available()
    result: dict[str, Any] = {"cpu": cpu_name(), "left_out": sorted({"node", "chromium", "cpp"} - set(sides))}
    with tempfile.TemporaryDirectory() as scratch:
        bundle = Path(scratch) / "bundle"
        command: list[str | Path] = [
            sys.executable,
            "-m",
            "distill.cli",
            "export",
            "--int8",
            "--single-file",
            "--output",
            bundle,
        ]
        subprocess.run(command, check=True)
        folder, single = Classifier(bundle), Classifier(bundle / "classifier.onnx")
        equal = np.array_equal(folder.predict_logits(texts), single.predict_logits(texts))
        result["single_file_bit_for_bit"] = equal
        for name, run in sides.items():
            for version in FILES:
                result[f"{name}, {version}"] = compare(bundle, texts, version, run)
            result[f"{name}, odd texts, fp32"] = compare(bundle, ODD, "fp32", run)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "embedding.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    click.echo(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
