"""`distill tune`: search over the options of a training command."""

import csv
import json
import logging
from collections.abc import Callable
from dataclasses import asdict, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from distill import processes
from distill.errors import DistillError
from distill.options import POSITIVE, RATE, enough_steps, say_loading

logger = logging.getLogger(__name__)
# Stage: where its command is, what trains with its options and gives macro-F1, and what is searched.
STAGES = {
    "train-teacher": (
        "distill.teacher.command",
        "distill.teacher.training:tune_teacher",
        {"learning-rate": "1e-5..1e-4", "batch-size": "16,32,64", "epochs": "2..5", "warmup-ratio": "0..0.2"},
    ),
    "train-student": (
        "distill.student.command",
        "distill.student.training:tune_student",
        {
            "learning-rate": "5e-5..1e-3",
            "batch-size": "16,32,64",
            "epochs": "3..10",
            "warmup-ratio": "0..0.2",
            "temperature": "1..4",
            "alpha": "0.5..1.0",
        },
    ),
}
OWN: list[click.Parameter] = [
    click.Option(["--trials"], type=POSITIVE, default=20, help="Trainings in all, other workers' too."),
    click.Option(["--hours"], type=RATE, help="Begin no training after this time."),
    click.Option(
        ["--search"],
        multiple=True,
        metavar="OPTION=1e-5..1e-4",
        help="Search an option over a range or a list (layers=2,3), besides or instead of the usual ones.",
    ),
    click.Option(["--storage"], help="Database that workers share [SQLite in the output folder]."),
    click.Option(["--study"], help="Name in the database [the command's]."),
    click.Option(["--output"], type=click.Path(path_type=Path), help="Folder to write [runs/tune/COMMAND]."),
    click.Option(["--json", "as_json"], is_flag=True, help="Print the result as JSON."),
]
Rename = Callable[[str, dict[str, Any], click.Command], dict[str, Any]]
NOT_TUNED = ("output", "overwrite", "resume", "as_json", "report_to", "folds")


class TuneGroup(click.Group):
    """One command for each stage, made of the stage's own options."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The stages."""
        return list(STAGES)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Make it."""
        if cmd_name not in STAGES:
            return None
        module, _, space = STAGES[cmd_name]
        stage = getattr(import_module(module), cmd_name.replace("-", "_"))
        searched = ", ".join(f"{name} {text}" for name, text in space.items())
        return click.Command(
            cmd_name,
            params=[*OWN, *(one for one in stage.params if one.name not in NOT_TUNED)],
            callback=lambda **options: _tune(cmd_name, **options),
            help=f"Search over the options of `distill {cmd_name}`.\n\nSearched: {searched}. What is typed "
            "stays as typed. The first training has today's settings: distill.toml's, or the defaults.",
        )

    def default_map(self, tables: dict[str, Any], rename: Rename) -> dict[str, Any]:
        """Click's default_map out of distill.toml's [tune] and, by stage, out of the stage's own table."""
        own = rename("tune", tables.get("tune", {}), click.Command("tune", params=OWN))
        found = {}
        for stage, (module, _, _) in STAGES.items():
            command = getattr(import_module(module), stage.replace("-", "_"))
            today = rename(stage, tables.get(stage, {}), command)
            found[stage] = {**{key: value for key, value in today.items() if key not in NOT_TUNED}, **own}
        return found


@click.command(cls=TuneGroup)
def tune() -> None:
    """Search for better settings by training again and again, scored on validation text alone.

    Poor trainings are stopped early. If any does better than today's settings, its own are written to
    distill.toml. The same command goes on with a search that was stopped, and beside a search that runs it is
    another worker.
    """


def _space(stage: str, wanted: tuple[str, ...], parameters: dict[str, click.Parameter]) -> dict[str, str]:
    """What to search as text, by parameter; options that were typed are not searched."""
    context = click.get_current_context()
    asked = {}
    for one in wanted:
        name, equals, text = one.partition("=")
        key = name.strip().lstrip("-").replace("-", "_")
        if not equals or key not in parameters:
            raise DistillError(f"--search {one}: give an option of {stage} and its values, as layers=2,3")
        asked[key] = text
    typed = {name for name in parameters if context.get_parameter_source(name) == ParameterSource.COMMANDLINE}
    both = sorted(typed & asked.keys())
    if both:
        option = both[0].replace("_", "-")
        raise DistillError(f"--search {option}: --{option} is given too; leave one of them out")
    usual = {name.replace("-", "_"): text for name, text in STAGES[stage][2].items()}
    space = {name: text for name, text in {**usual, **asked}.items() if name not in typed}
    if not space:
        raise DistillError(
            f"tune {stage}: every option that is searched was typed; leave one out, or use --search"
        )
    return space


def _tune(
    stage: str,
    trials: int,
    hours: float | None,
    search: tuple[str, ...],
    storage: str | None,
    study: str | None,
    output: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    if processes.launched() > 1:
        raise DistillError("tune: start it without torchrun; the same command once more is another worker")
    context = click.get_current_context()
    parameters = {str(one.name): one for one in context.command.params if str(one.name) in options}
    space = _space(stage, search, parameters)
    options["min_steps"] = enough_steps(options["min_steps"])
    if options.get("speedup") or options.get("latency_budget"):
        if not options.get("layers") and "layers" not in space:
            raise DistillError(
                "tune: --speedup and --latency-budget would measure at every trial; give --layers instead"
            )
        options.update(speedup=None, latency_budget=None)
    config = context.find_root().params["config"] or Path("distill.toml")
    write_options(config, stage, {})  # what cannot be written is better known now
    say_loading()

    from distill import tuning

    distributions, before = _distributions(space, options, parameters)
    folder = output or Path("runs", "tune", stage)
    folder.mkdir(parents=True, exist_ok=True)
    opened = tuning.open_search(
        storage or f"sqlite:///{folder / 'study.db'}",
        study or stage,
        options["seed"],
        before,
        distributions,
        {
            **{name: value for name, value in options.items() if name not in space},
            **_contents(options),
            "search": space,
        },
    )
    level = logging.getLogger("distill").level
    try:
        train = _trainer(stage, options, parameters)
        found = tuning.search(opened, train, folder / "running", trials, hours and hours * 3600)
    except KeyboardInterrupt:
        logger.warning("Stopped; the same command goes on")
        raise
    finally:
        logging.getLogger("distill").setLevel(level)
    said = context.get_parameter_source("min_steps") == ParameterSource.COMMANDLINE
    if "epochs" in space and "min_steps" not in space and (options["min_steps"] or said):
        # Epochs that somebody has chosen would count alone.
        found = replace(found, best={**found.best, "min_steps": options["min_steps"]})
    _write_report(opened, folder, stage, found)
    if found.improved:
        write_options(config, stage, found.best)
    _show(found, stage, folder, config, as_json)


def _contents(options: dict[str, Any]) -> dict[str, str]:
    """SHA-256 of the data's files and of the teacher: scores on other ones are no part of the same search."""
    from distill.artifact import sha256
    from distill.bundle import MANIFEST

    files: dict[str, list[Path]] = {}
    if options.get("data"):
        source = Path(options["data"])
        files["data"] = [source] if source.is_file() else sorted(source.glob("*.*"))
    if options.get("teacher"):
        files["teacher"] = [Path(options["teacher"], MANIFEST)]
    return {
        f"content of {name}": ", ".join(sha256(path)[:16] for path in paths if path.is_file())
        for name, paths in files.items()
    }


def _distributions(
    space: dict[str, str], options: dict[str, Any], parameters: dict[str, click.Parameter]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Distributions of Optuna's for what to search, and today's values, each of which is in its own.

    Where an option is left out today, that is one of a list's values; in a range there is no such thing.
    """
    from optuna.distributions import CategoricalDistribution

    from distill.search_space import parse_space, with_value

    found, before = {}, {}
    for name, text in space.items():
        spelling = name.replace("_", "-")

        def convert(value: str, parameter: click.Parameter = parameters[name], name: str = spelling) -> Any:
            try:
                return parameter.type.convert(value.strip(), parameter, None)
            except click.UsageError as error:
                raise DistillError(f"--search {name}: {error.format_message()}") from error

        found[name] = parse_space(spelling, text, convert)
        if options[name] is not None or isinstance(found[name], CategoricalDistribution):
            before[name] = options[name]
            found[name] = with_value(found[name], before[name])
    return found, before


def _trainer(
    stage: str, options: dict[str, Any], parameters: dict[str, click.Parameter]
) -> Callable[[dict[str, Any], Path], float]:
    """What trains the stage with a trial's values in a folder, and gives its score."""
    module, function = STAGES[stage][1].split(":")
    run = getattr(import_module(module), function)

    def train(values: dict[str, Any], place: Path) -> float:
        exact = {
            name: value if value is None else parameters[name].type.convert(value, None, None)
            for name, value in values.items()
        }
        try:
            return float(run(output=place, resume=True, **{**options, **exact}))
        finally:
            # What is said of data and checkpoint is the same in every trial.
            if logging.getLogger("distill").level == logging.INFO:
                logging.getLogger("distill").setLevel(logging.WARNING)
                logging.getLogger("distill.tuning").setLevel(logging.INFO)

    return train


def write_options(path: Path, stage: str, values: dict[str, Any]) -> None:
    """Write options into the stage's table of distill.toml; everything else in it stays as it is."""
    import tomlkit

    document = tomlkit.parse(path.read_text(encoding="utf-8")) if path.is_file() else tomlkit.document()
    if not values:
        return
    table = document.setdefault(stage, tomlkit.table())
    for name, value in values.items():
        spelling = name.replace("_", "-")
        known = next((key for key in table if key.replace("_", "-") == spelling), spelling)
        if value is None:
            table.pop(known, None)
        else:
            table[known] = value
    path.write_text(tomlkit.dumps(document), encoding="utf-8")


def _write_report(opened: Any, folder: Path, stage: str, found: Any) -> None:
    from distill.tuning import draw, short

    study, names = opened.study, list(opened.space)
    draw(study, folder)
    with (folder / "trials.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["trial", "state", "macro_f1", *(name.replace("_", "-") for name in names)])
        for trial in study.trials:
            values = [trial.params.get(name, "") for name in names]
            writer.writerow([trial.number + 1, trial.state.name.lower(), trial.value, *values])
    pictures = [name for name in ("history.svg", "importance.svg") if (folder / name).is_file()]
    lines = [
        f"# Search over `distill {stage}`",
        "",
        _summary(found),
        "",
        "| option | best |",
        "|---|---|",
        *(f"| {name.replace('_', '-')} | {short(value)} |" for name, value in found.best.items()),
        "",
        *(f"![{name.removesuffix('.svg')}]({name})\n" for name in pictures),
        "All trials: [trials.csv](trials.csv). Scores are macro-F1 on the validation split.",
    ]
    (folder / "report.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _summary(found: Any) -> str:
    stopped = f", {found.pruned} of them stopped early" if found.pruned else ""
    if found.pending:
        return (
            f"Best of {found.trials} trials{stopped}: macro-F1 {found.score:.4f} on validation. Today's "
            "settings are not finished, so nothing is written yet: another worker that has them does it when "
            "it ends; without one, the same command does, two minutes from now"
        )
    if not found.improved:
        return (
            f"Today's settings stand: macro-F1 {found.before:.4f} on validation, and none of {found.trials} "
            f"trials was better{stopped}."
        )
    before = (
        ", and there is nothing to hold it against: not everything that is searched has a value today, or "
        "the training with today's settings failed"
    )
    if found.before is not None:
        before = f", {found.before:.4f} with the settings until now"
    return (
        f"Best of {found.trials} trials{stopped}: macro-F1 {found.score:.4f} on validation{before}. "
        "The best of many flatters itself: expect less on new text."
    )


def _show(found: Any, stage: str, folder: Path, config: Path, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps({**asdict(found), "improved": found.improved}))
        return
    click.echo(_summary(found))
    if found.improved:
        from distill.tuning import short

        values = ", ".join(f"{name.replace('_', '-')} {short(value)}" for name, value in found.best.items())
        click.echo(f"{config}: [{stage}] {values}")
    click.echo(f"{folder / 'report.md'}: all trials, their history and what mattered")
