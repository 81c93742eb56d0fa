"""Search over a stage's options: Optuna's trials, each a training that is scored on validation text alone."""

import json
import logging
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import optuna
from optuna.distributions import distribution_to_json, json_to_distribution
from optuna.study import MaxTrialsCallback
from optuna.trial import FrozenTrial, TrialState

from distill.callbacks import watched
from distill.errors import DistillError
from distill.search_space import Distribution, draw_value

logger = logging.getLogger(__name__)
optuna.logging.set_verbosity(optuna.logging.ERROR)
HEARTBEAT = 60  # seconds; a worker that is silent for twice that is taken for dead
RETRIES = 3
OPENINGS = 5  # of a database, before it is given up
FAILURES = 3  # trials in a row
DONE = (TrialState.COMPLETE, TrialState.PRUNED)


@dataclass(frozen=True)
class Tuned:
    """What a search found; scores are macro-F1 on validation, options by their names in Python."""

    best: dict[str, Any]
    score: float
    before: float | None
    """With today's settings; None where these say nothing of what was searched."""
    trials: int
    pruned: int
    pending: bool = False
    """Whether another worker is still training with today's settings, or was lost with them."""

    @property
    def improved(self) -> bool:
        """Whether anything was better than today's settings."""
        return not self.pending and (self.before is None or self.score > self.before)


@dataclass(frozen=True)
class Search:
    """A study and what it searches; `options` are all others, as JSON, which every worker must have alike."""

    study: Any
    space: dict[str, Distribution]
    options: str

    def claim(self) -> None:
        """Hold later workers to these options and this space, once a trial has been finished with them."""
        if "options" not in self.study.user_attrs:
            space = {name: distribution_to_json(one) for name, one in self.space.items()}
            self.study.set_user_attr("space", space)
            self.study.set_user_attr("options", self.options)


def open_search(
    storage: str,
    name: str,
    seed: int,
    before: dict[str, Any],
    space: dict[str, Distribution],
    fixed: dict[str, Any],
) -> Search:
    """Open a study, or make it, with today's settings as its first trial.

    Args:
        storage: a database's URL, shared by all workers.
        name: of the study.
        seed: of the search, where this worker makes the study; others must not repeat its draws.
        before: today's values of what is searched, as far as there are any.
        space: what to search, by option; that of the study, where trials have been finished.
        fixed: all other options.

    Raises:
        DistillError: if the storage cannot be opened, or the study has other options.
    """
    from sqlalchemy.engine import make_url

    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    try:
        shown = make_url(storage).render_as_string(hide_password=True)
        shared = _open_storage(storage)
        study = _study(shared, name)
        if _abandoned(study):
            optuna.delete_study(study_name=name, storage=shared)
            study = _study(shared, name)
    except Exception as error:  # database drivers raise many kinds
        reason = " ".join(str(error).replace(storage, "").split())[:200] or type(error).__name__
        raise DistillError(f"--storage: the database cannot be opened: {reason}") from error
    options = json.dumps(fixed, sort_keys=True, default=str)
    earlier = study.user_attrs.get("options")
    if earlier is not None and earlier != options:
        was, now = json.loads(earlier), json.loads(options)
        key = next(key for key in sorted(was.keys() | now.keys()) if was.get(key) != now.get(key))
        raise DistillError(
            f"{shown}: the study {name} has {key.replace('_', '-')} {was.get(key)}, and now it is "
            f"{now.get(key)}; give it as it was, or another --study or --output"
        )
    if "space" in study.user_attrs:
        kept: dict[str, Any] = study.user_attrs["space"]
        space = {key: cast("Distribution", json_to_distribution(one)) for key, one in kept.items()}
    fresh = not study.trials
    live = (TrialState.COMPLETE, TrialState.WAITING, TrialState.RUNNING)
    if not any(one.user_attrs.get("before") for one in study.get_trials(False, live)):
        values = {key: value for key, value in before.items() if key in space}
        study.enqueue_trial(values, user_attrs={"before": len(values) == len(space)})
    study.sampler = optuna.samplers.TPESampler(
        seed=seed if fresh else None, multivariate=True, constant_liar=True
    )
    return Search(study, space, options)


def _open_storage(url: str) -> Any:
    """Open the database; if another worker is making its tables at this moment, as soon as they are there."""
    from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
    from sqlalchemy.exc import IntegrityError, OperationalError

    for left in reversed(range(OPENINGS)):
        try:
            return RDBStorage(
                url,
                engine_kwargs={"connect_args": {"timeout": 60}} if url.startswith("sqlite") else None,
                heartbeat_interval=HEARTBEAT,
                heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(max_retry=RETRIES),
            )
        except (IntegrityError, OperationalError):
            if not left:
                raise
            time.sleep(0.5)
    raise AssertionError


def _study(storage: Any, name: str) -> Any:
    pruner = optuna.pruners.HyperbandPruner()
    return optuna.create_study(
        storage=storage, study_name=name, direction="maximize", pruner=pruner, load_if_exists=True
    )


def _abandoned(study: Any) -> bool:
    """Whether trials only failed, none was interrupted, and nobody works on it: a start that went wrong."""
    trials = study.trials
    failed = [one for one in trials if one.state == TrialState.FAIL and not one.user_attrs.get("interrupted")]
    return bool(failed) and all(one.state in (TrialState.FAIL, TrialState.WAITING) for one in trials)


class _Worker:
    """Runs trials: its call is what Optuna optimizes, `finished` what it is told after each."""

    def __init__(
        self, opened: Search, train: Callable[[dict[str, Any], Path], float], folder: Path, trials: int
    ) -> None:
        self.opened, self.train, self.folder, self.trials = opened, train, folder, trials
        self.failed = 0  # in a row

    def __call__(self, trial: Any) -> float:
        """Train with the trial's values; those of a finished trial are not trained with again."""
        values = {name: draw_value(trial, name, one) for name, one in self.opened.space.items()}
        shown = ", ".join(f"{name.replace('_', '-')} {short(value)}" for name, value in values.items())
        done = len(self.opened.study.get_trials(False, DONE))
        logger.info("Trial %d (%d of %d done): %s", trial.number + 1, done, self.trials, shown)
        complete = self.opened.study.get_trials(False, (TrialState.COMPLETE,))
        for one in complete:
            if one.params == values:
                return float(one.value)
        # A trial that is tried again inherits its folder, and finds its checkpoints there.
        place = self.folder / trial.user_attrs.get("folder", f"trial-{trial.number + 1}")
        trial.set_user_attr("folder", place.name)
        try:
            with _pruning(trial):
                score = self.train(values, place / "run")
        except KeyboardInterrupt:
            self.opened.study.enqueue_trial(values, user_attrs=trial.user_attrs)
            trial.set_user_attr("interrupted", True)
            raise
        except optuna.TrialPruned:
            shutil.rmtree(place, ignore_errors=True)
            raise
        except (RuntimeError, ValueError, OSError, DistillError) as error:
            shutil.rmtree(place, ignore_errors=True)
            if isinstance(error, DistillError) and not complete:
                raise  # with values that have served it is of this trial, else of the command
            self._failed(trial.number, error)
            raise RuntimeError from error
        shutil.rmtree(place, ignore_errors=True)
        return score

    def _failed(self, number: int, error: Exception) -> None:
        self.failed += 1
        reason = " ".join(str(error).split())[:200]
        logger.warning("Trial %d: failed: %s", number + 1, reason)
        if self.failed >= FAILURES:
            raise DistillError(f"{FAILURES} trials in a row have failed, the last one: {reason}") from error

    def finished(self, study: Any, trial: FrozenTrial) -> None:
        """Say what came of it."""
        if trial.state in DONE:
            self.failed = 0
            self.opened.claim()
        if trial.state == TrialState.PRUNED:
            logger.info("Trial %d: stopped early, macro-F1 %.4f", trial.number + 1, trial.value or 0)
        elif trial.state == TrialState.COMPLETE:
            best = max(one.value for one in study.get_trials(False, (TrialState.COMPLETE,)))
            logger.info("Trial %d: validation macro-F1 %.4f (best %.4f)", trial.number + 1, trial.value, best)


def search(
    opened: Search,
    train: Callable[[dict[str, Any], Path], float],
    folder: Path,
    trials: int,
    seconds: float | None,
) -> Tuned:
    """Run trials until the study has enough of them; workers and earlier runs count.

    Args:
        opened: of `open_search`.
        train: trains with the values of a trial, in a folder, and gives the best macro-F1 on validation.
        folder: for the folders of running trials.
        trials: how many the study is to have.
        seconds: when to begin no more trials.

    Raises:
        DistillError: if the first trial has wrong options, one after the other fails, or none is finished.
    """
    study, worker = opened.study, _Worker(opened, train, folder, trials)
    enough = MaxTrialsCallback(trials, states=DONE)
    end = None if seconds is None else time.monotonic() + seconds
    optuna.storages.fail_stale_trials(study)
    if len(study.get_trials(False, DONE)) < trials:
        study.optimize(worker, timeout=seconds, callbacks=[worker.finished, enough], catch=(RuntimeError,))
    # Those of a worker that was lost.
    while _with_todays(study, TrialState.WAITING) and (end is None or time.monotonic() < end):
        study.optimize(worker, n_trials=1, callbacks=[worker.finished], catch=(RuntimeError,))
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if not complete:
        raise DistillError("no trial was finished: the lines above say why")
    best = max(complete, key=lambda one: (one.value, -one.number))
    before = [float(one.value or 0) for one in _with_todays(study, TrialState.COMPLETE)]
    return Tuned(
        best=dict(best.params),
        score=float(best.value),
        before=max(before, default=None),
        trials=len(study.get_trials(False, DONE)),
        pruned=len(study.get_trials(False, (TrialState.PRUNED,))),
        pending=not before and bool(_with_todays(study, TrialState.WAITING, TrialState.RUNNING)),
    )


def _with_todays(study: Any, *states: TrialState) -> list[FrozenTrial]:
    """Trials with today's settings, where everything that is searched has a value today."""
    return [one for one in study.get_trials(False, states) if one.user_attrs.get("before")]


def short(value: Any) -> str:
    """A value as one reads it."""
    if value is None:
        return "left out"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


@contextmanager
def _pruning(trial: Any) -> Iterator[None]:
    """Within it, a training tells the trial its score at every evaluation, and stops if the trial is poor."""

    def told(epoch: float, score: float) -> None:
        step = round(epoch)
        trial.report(score, step)
        # Today's settings are what all is held against, so they are never cut short.
        if not trial.user_attrs.get("before") and trial.should_prune():
            raise optuna.TrialPruned

    with watched(told):
        yield


def draw(study: Any, folder: Path) -> None:
    """Write history.svg and importance.svg, the latter where enough trials say anything about it."""
    import matplotlib

    matplotlib.use("Agg")
    from optuna.visualization.matplotlib import plot_optimization_history, plot_param_importances

    pictures: dict[str, Any] = {"history": plot_optimization_history}
    scores = [one.value for one in study.get_trials(False, (TrialState.COMPLETE,))]
    if len(scores) >= 4 and len(set(scores)) > 1:
        pictures["importance"] = plot_param_importances
    for name, plot in pictures.items():
        figure: Any = plot(study, target_name="macro-F1 on validation").figure
        figure.savefig(folder / f"{name}.svg", bbox_inches="tight")
        matplotlib.pyplot.close(figure)
