"""The command line: one group whose commands are imported only when they are called."""

import json
import logging
import os
import sys
import tomllib
from collections.abc import Iterable
from difflib import get_close_matches
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import click

from distill import processes
from distill.errors import DistillError

# command -> (module:function, the line that `distill --help` shows)
COMMANDS = {
    "train-teacher": (
        "distill.teacher.command:train_teacher",
        "Fine-tune a large classifier on labelled text.",
    ),
    "tune": ("distill.tune:tune", "Search for better options of a training command."),
    "train-student": ("distill.student.command:train_student", "Distil the teacher into a small student."),
    "export": (
        "distill.export.command:export",
        "Write the student as a verified ONNX bundle, INT8 on request.",
    ),
    "benchmark": (
        "distill.export.command:benchmark",
        "Measure speed, memory and size of every version in one run.",
    ),
    "report": ("distill.explain.command:report", "Compare teacher, student and exported versions."),
    "explain": (
        "distill.explain.command:explain",
        "Say which words made each version answer as it did.",
    ),
    "predict": ("distill.prediction:predict", "Classify texts from a file or standard input."),
    "demo": ("distill.examples.demo:demo", "Run the whole chain on real data, nothing to configure."),
}


class LazyGroup(click.Group):
    """A group that knows its commands by name and loads one only to run it or to show its help."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in the order in which they are used."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the command's module."""
        if cmd_name not in COMMANDS:
            return None
        module, function = COMMANDS[cmd_name][0].split(":")
        command: click.Command = getattr(import_module(module), function)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without importing any."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, summary) in COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> Any:
        """Turn what a user can act on into one line and exit status 1."""
        try:
            return super().invoke(ctx)
        except DistillError as error:
            if processes.is_told(error):
                raise SystemExit(1) from error
            raise click.ClickException(str(error)) from error
        except OSError as error:
            if processes.is_told(error):
                raise SystemExit(1) from error
            if error.filename is None:
                raise
            raise click.ClickException(f"{error.filename}: {error.strerror}") from error
        except ModuleNotFoundError as error:
            if (error.name or "").split(".")[0] == "distill":
                raise
            extra = "cpu" if error.name == "onnxruntime" else "train"
            raise click.ClickException(
                f"this command needs the package {error.name}: pip install 'distill-onnx[{extra}]'"
            ) from error


def _defaults(path: Path) -> dict[str, dict[str, Any]]:
    """Read `distill.toml` into Click's default_map, refusing tables and options that do not exist."""
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise click.UsageError(f"{path}: not valid TOML: {error}") from error
    defaults = {}
    for name, options in tables.items():
        if not isinstance(options, dict):
            raise click.UsageError(
                f"{path}: {name!r} stands in no table; put it under a command's, such as [train-student]"
            )
        if name not in COMMANDS:
            raise click.UsageError(f"{path}: [{name}] is not a command; {_meant(name, COMMANDS)}")
        defaults[name] = options
    return defaults


def _by_parameter(path: Path, name: str, options: dict[str, Any], command: click.Command) -> dict[str, Any]:
    """Rename the file's options, spelt as on the command line, to the command's parameters."""
    known = {
        spelling.lstrip("-"): parameter
        for parameter in command.params
        if isinstance(parameter, click.Option)
        for spelling in parameter.opts
    }
    renamed = {}
    for key, value in options.items():
        parameter = known.get(key.replace("_", "-"))
        if parameter is None:
            raise click.UsageError(f"{path}: [{name}] has no option {key!r}; {_meant(key, known)}")
        if isinstance(value, dict) or (isinstance(value, list) and not parameter.multiple):
            raise click.UsageError(f"{path}: [{name}] {key}: one value is needed, not {value}")
        try:
            values = [_converted(parameter, one) for one in (value if isinstance(value, list) else [value])]
        except click.BadParameter as error:
            told = error.message.replace(" range.", ".")
            raise click.UsageError(f"{path}: [{name}] {key}: {told}") from error
        renamed[str(parameter.name)] = values if parameter.multiple else values[0]
    return renamed


def _meant(given: str, known: Iterable[str]) -> str:
    """The nearest of the names that there are, or all of them."""
    near = get_close_matches(given, known, 1)
    return f"did you mean {near[0]!r}?" if near else f"there are {', '.join(sorted(known))}"


def _converted(parameter: click.Option, value: Any) -> Any:
    """A value out of TOML as it would be if it had been typed."""
    if parameter.is_flag != isinstance(value, bool):
        kind = "true or false" if parameter.is_flag else "a value"
        raise click.BadParameter(f"{kind} is needed, not {json.dumps(value, default=str)}")
    return value if parameter.is_flag else parameter.type.convert(str(value), parameter, None)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--config", type=click.Path(path_type=Path), help="Defaults for every command [distill.toml].")
@click.option("--verbose", "-v", is_flag=True, help="Say more on standard error.")
@click.version_option(package_name="distill-onnx")
@click.pass_context
def cli(ctx: click.Context, config: Path | None, verbose: bool) -> None:
    """Distil a large text classifier into a small INT8 ONNX model, and prove that they agree."""
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(message)s")
    level = logging.ERROR if processes.rank() else logging.DEBUG if verbose else logging.INFO
    logging.getLogger("distill").setLevel(level)
    if config is not None and not config.is_file():
        raise click.UsageError(f"--config {config}: no such file")
    path = config or Path("distill.toml")
    if path.is_file():
        defaults = _defaults(path)
        name = ctx.invoked_subcommand
        command: Any = cli.get_command(ctx, name) if name else None
        if command is not None and name == "tune":
            defaults[name] = command.default_map(defaults, partial(_by_parameter, path))
        elif command is not None and name and name in defaults:
            defaults[name] = _by_parameter(path, name, defaults[name], command)
        ctx.default_map = {**(ctx.default_map or {}), **defaults}


def main() -> None:
    """Entry point of the `distill` script."""
    # Waiting OpenMP threads that spin starve everything else on a shared machine. Read when torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    cli(prog_name="distill")


if __name__ == "__main__":
    main()
