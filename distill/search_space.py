"""What `distill tune` searches: ranges and lists as they are typed, as distributions of Optuna's."""

from collections.abc import Callable
from typing import Any

from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from distill.errors import DistillError

Distribution = CategoricalDistribution | FloatDistribution | IntDistribution
WIDE = 10  # a range whose ends are this many times apart is searched by its logarithm


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def parse_space(name: str, text: str, convert: Callable[[str], Any]) -> Distribution:
    """Turn "1e-5..1e-4", "1..5" or "16,32,64" into a distribution.

    A range of integers gives integers, another one real numbers; by their logarithm where it is wide.

    Raises:
        DistillError: naming the option, if the text is neither a range nor a list, or holds a wrong value.
    """
    low, dots, high = text.partition("..")
    if not dots or not _is_number(low) or not _is_number(high):
        values = [convert(part.strip()) for part in text.split(",")]
        if len(values) < 2:
            raise DistillError(f"--search {name}={text}: one value; give a range as 1..5, or a list as 1,2,5")
        return CategoricalDistribution(values)
    first, last = convert(low), convert(high)
    if not first < last:
        raise DistillError(f"--search {name}={text}: a range runs from a smaller number to a larger one")
    wide = bool(first > 0 and last / first >= WIDE)
    if low.strip().isdigit() and high.strip().isdigit():
        return IntDistribution(int(low), int(high), log=wide)
    return FloatDistribution(float(first), float(last), log=wide)


def with_value(distribution: Distribution, value: Any) -> Distribution:
    """The distribution, widened where today's value lies outside."""
    if isinstance(distribution, CategoricalDistribution):
        return CategoricalDistribution(list(dict.fromkeys((*distribution.choices, value))))
    if isinstance(distribution, IntDistribution) and value != int(value):
        distribution = FloatDistribution(distribution.low, distribution.high, log=distribution.log)
    low, high = min(distribution.low, value), max(distribution.high, value)
    if isinstance(distribution, IntDistribution):
        return IntDistribution(int(low), int(high), log=distribution.log and low > 0)
    return FloatDistribution(low, high, log=distribution.log and low > 0)


def draw_value(trial: Any, name: str, distribution: Distribution) -> Any:
    """Have a trial draw an option's value."""
    if isinstance(distribution, CategoricalDistribution):
        return trial.suggest_categorical(name, distribution.choices)
    suggest = trial.suggest_int if isinstance(distribution, IntDistribution) else trial.suggest_float
    return suggest(name, distribution.low, distribution.high, log=distribution.log)
