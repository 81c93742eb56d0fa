"""What is wrong with the options of a student whatever its teacher and data: told before torch is loaded."""

from collections.abc import Mapping
from typing import Any

from distill.errors import DistillError
from distill.options import budget_of

MOST_BIGRAMS = 2**16  # a quarter of the slots that averaging.py has for them


def check_options(options: Mapping[str, Any]) -> None:
    """Refuse options that are wrong by themselves, or together.

    Args:
        options: of `distill train-student`, by name.

    Raises:
        DistillError: naming the first that is.
    """
    if options["temperature"] <= 0:
        raise DistillError(f"--temperature {options['temperature']}: must be above 0")
    if not 0 <= options["alpha"] <= 1:
        raise DistillError(f"--alpha {options['alpha']}: must be between 0 and 1")
    if (options["vocabulary"] or 0) < 0:
        raise DistillError(f"--vocabulary {options['vocabulary']}: give 0 for all tokens that occur, or more")
    _check_shape(options)
    for name in ("unlabeled", "augment"):
        if options[name] and options["alpha"] == 0:
            raise DistillError(
                f"--{name}: with --alpha 0 the teacher's labels count for nothing; raise --alpha"
            )
    if options["hidden_epochs"] < 0:
        raise DistillError(f"--hidden-epochs {options['hidden_epochs']:g}: give a number from 0 on")
    if options["augment"]:
        budget_of(options["augment"], 1000)


def _check_shape(options: Mapping[str, Any]) -> None:
    given = [name for name in ("layers", "speedup", "latency_budget") if options[name] is not None]
    if len(given) > 1:
        first, second = (f"--{name.replace('_', '-')}" for name in given[:2])
        raise DistillError(f"{second}: chooses the number of layers, as {first} does; leave one of them out")
    for name, parts in (("intermediate_size", "feed-forward networks"), ("attention_heads", "heads")):
        if options["layers"] == 0 and options[name] is not None:
            raise DistillError(
                f"--{name.replace('_', '-')}: without layers there are no {parts}; leave it out"
            )
    if options["bigrams"] is not None and not 0 <= options["bigrams"] <= MOST_BIGRAMS:
        raise DistillError(f"--bigrams {options['bigrams']}: give a number from 0 to {MOST_BIGRAMS}")
    if options["bigrams"] is not None and (options["layers"] or not given):
        raise DistillError("--bigrams: only a student without layers has them; give --layers 0 with it")


def refuse_bigrams(asked: int | None, layerless: bool) -> None:
    """Refuse a number of bigrams for a checkpoint that has learnt its own."""
    if asked is not None and layerless:
        raise DistillError(
            f"--bigrams {asked}: the student's checkpoint has no layers, and bigrams of its own; leave it out"
        )
