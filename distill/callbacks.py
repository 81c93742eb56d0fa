"""What happens beside a training: progress on the screen, and a checkpoint in time."""

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from transformers import TrainerCallback

from distill import processes

logger = logging.getLogger(__name__)
SAVE_SECONDS = 600
AGREE_STEPS = 10  # between two looks at the first process' clock


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes}:{seconds:02d}"


class ProgressCallback(TrainerCallback):
    """Steps, loss and time left: a bar on a terminal, a line every tenth of the way elsewhere."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.bar: Any = None
        self.task: Any = None
        self.start = 0.0
        self.first = 0
        self.next_line = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self.start, self.first = time.monotonic(), state.global_step
        self.next_line = 0.1
        if sys.stderr.isatty() and processes.rank() == 0:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
            )
            self.bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self.bar.start()
            self.task = self.bar.add_task(self.title, total=state.max_steps, completed=state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move on by one step."""
        if self.bar is not None:
            self.bar.update(self.task, completed=state.global_step)
        elif state.global_step >= self.next_line * state.max_steps:
            self.next_line = state.global_step / state.max_steps + 0.1
            passed = time.monotonic() - self.start
            left = passed / (state.global_step - self.first) * (state.max_steps - state.global_step)
            logger.info(
                "%s: step %d of %d, %s left", self.title, state.global_step, state.max_steps, _clock(left)
            )

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, float] | None = None, **kwargs: Any
    ) -> None:
        """Say what validation gave."""
        metrics = metrics or {}
        if "eval_macro_f1" in metrics and state.epoch:
            scores = metrics["eval_macro_f1"], metrics["eval_accuracy"]
            loss = f"loss {metrics['eval_loss']:.4f}, " if args.metric_for_best_model == "loss" else ""
            logger.info(
                "%s: epoch %.2f, validation %smacro-F1 %.4f, accuracy %.4f",
                self.title, state.epoch, loss, *scores,
            )  # fmt: skip
        elif "eval_loss" in metrics and state.epoch:
            logger.info("%s: epoch %.2f, validation loss %.4f", self.title, state.epoch, metrics["eval_loss"])

    def close(self) -> None:
        """Take the bar away, also after an interruption."""
        if self.bar is not None:
            self.bar.stop()


class SaveInTime(TrainerCallback):
    """Ask for a checkpoint when the last one is some time old, so that a long epoch can be resumed."""

    def __init__(self) -> None:
        self.last = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at the clock."""
        if processes.count() > 1 and state.global_step % AGREE_STEPS:
            return
        if processes.once(lambda: time.monotonic() - self.last >= SAVE_SECONDS):
            control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock again."""
        self.last = time.monotonic()


Watcher = Callable[[float, float], None]
_watcher: ContextVar[Watcher | None] = ContextVar("watcher", default=None)


@contextmanager
def watched(watcher: Watcher) -> Iterator[None]:
    """Within it, trainings tell `watcher` epoch and macro-F1 at every evaluation on validation text."""
    token = _watcher.set(watcher)
    try:
        yield
    finally:
        _watcher.reset(token)


def being_watched() -> bool:
    """Whether somebody else runs this training, and says what there is to say."""
    return _watcher.get() is not None


class Watch(TrainerCallback):
    """Tell whoever watches what validation gave."""

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, float] | None = None, **kwargs: Any
    ) -> None:
        """Pass it on."""
        watcher = _watcher.get()
        if watcher is not None and metrics:
            watcher(state.epoch, metrics["eval_macro_f1"])
