"""Where an interrupted training is picked up: what may be resumed, and what would be lost."""

import json
import logging
import shutil
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers.trainer_utils import get_last_checkpoint

from distill.arguments import TrainingOptions
from distill.artifact import check_output
from distill.callbacks import being_watched
from distill.errors import DistillError

logger = logging.getLogger(__name__)
RECIPE = "recipe.json"
EARLIER = "hidden_states"  # within a student's checkpoints, those of what it learns before labels


def last_complete(folder: Path) -> str | None:
    """The newest checkpoint that is complete; newer ones, cut short by an interruption, are removed."""
    while last := folder.is_dir() and get_last_checkpoint(str(folder)):
        try:
            json.loads((Path(last) / "trainer_state.json").read_text(encoding="utf-8"))
            return str(last)
        except (OSError, ValueError):
            shutil.rmtree(last)
    return None


def _unfinished(folder: Path) -> str | None:
    """What an interrupted run goes on from, in either of its parts."""
    return last_complete(folder) or last_complete(folder / EARLIER)


def recorded_recipe(options: TrainingOptions) -> dict[str, Any]:
    """The recipe of the run that `options.resume` goes on with; empty where there is none."""
    record = options.checkpoints / RECIPE
    if not options.resume or not record.is_file() or not _unfinished(options.checkpoints):
        return {}
    return dict(json.loads(record.read_text(encoding="utf-8")))


def refuse_unfinished(options: TrainingOptions, stage: str) -> str | None:
    """Refuse to train where something would be lost; give the checkpoint of an interrupted run, if any.

    Raises:
        DistillError: if the output exists, or checkpoints do that are neither to be resumed nor overwritten.
    """
    if options.max_steps == 0:
        raise DistillError("--max-steps 0: trains nothing; give at least 1, or -1 for no limit")
    check_output(options.output, options.overwrite, stage)
    folder, record = options.checkpoints, options.checkpoints / RECIPE
    if folder.exists() and not record.is_file() and not (folder.is_dir() and not any(folder.iterdir())):
        raise DistillError(
            f"{folder}: checkpoints would go here, and distill did not write it; choose another --output"
        )
    last = _unfinished(folder)
    if last and not options.resume and not options.overwrite:
        raise DistillError(
            f"{folder}: checkpoints of an interrupted run; --resume goes on, --overwrite starts again"
        )
    return last


def _remove(folder: Path) -> None:
    """Remove a folder in one step, so that no half of it is left when that is interrupted."""
    if folder.exists():
        with TemporaryDirectory(dir=folder.parent, ignore_cleanup_errors=True) as trash:
            folder.rename(Path(trash) / folder.name)


def prepare_checkpoints(options: TrainingOptions, recipe: dict[str, Any], stage: str) -> str | None:
    """Decide, before any work, whether to resume; give the checkpoint to resume from.

    There is none where the run was interrupted before its last part; what it has of that is kept.

    Args:
        options: where and how to train.
        recipe: everything that decides the result; a resumed run must have the same.
        stage: which stage trains.

    Raises:
        DistillError: if the output exists, if an interrupted run would be lost, or if the recipe changed.
    """
    last = refuse_unfinished(options, stage)
    folder, record = options.checkpoints, options.checkpoints / RECIPE
    recipe = json.loads(json.dumps(recipe, default=str))
    if last and options.resume:
        before = json.loads(record.read_text(encoding="utf-8"))
        changed = sorted(key for key in recipe.keys() | before.keys() if recipe.get(key) != before.get(key))
        if changed:
            key = changed[0]
            raise DistillError(
                f"--resume: {key.replace('_', '-')} was {before.get(key)} in {folder} and is now "
                f"{recipe.get(key)}; give it as it was, or start again with --overwrite instead of --resume"
            )
        logger.info("Resuming from %s", last)
        return last_complete(folder)
    if options.resume and not being_watched():
        logger.info("No checkpoint in %s yet: starting from the beginning", folder)
    _remove(folder)
    folder.mkdir(parents=True)
    record.write_text(json.dumps(recipe, indent=2), encoding="utf-8")
    return None


def discard_checkpoints(options: TrainingOptions) -> None:
    """Remove the checkpoints of a run that has been published."""
    _remove(options.checkpoints)
    with suppress(OSError):  # there are others, or another run has just removed it
        options.checkpoints.parent.rmdir()
