"""Paired runs: all contestants take turns, so that whatever else the machine does hits all of them alike."""
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple


class Spread(NamedTuple):
    """Median, smallest and largest of some values."""
    median: float
    min: float
    max: float

    @classmethod
    def of(cls, values: list[float]) -> 'Spread':
        """Return the spread of at least one value."""
        return cls(statistics.median(values), min(values), max(values))


def take_turns(
        contestants: dict[str, Callable[[], Any]], rounds: int, warmup: int = 2, settle: bool = False,
) -> dict[str, list[float]]:
    """Run all contestants in each round, one after the other.

    Args:
        contestants: Name -> a function that runs once.
        rounds: Number of rounds that count.
        warmup: Number of rounds before them, which do not count.
        settle: Run each contestant once more, untimed, before each timed run, so that none pays for caches that the one
            before it filled, or for threads of that one that still spin.

    Returns:
        Name -> seconds, one value a round.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for i in range(warmup + rounds):
        for name, run in contestants.items():
            if settle:
                run()
            start = time.perf_counter()
            run()
            if i >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratios(seconds: dict[str, list[float]], base: str) -> dict[str, Spread]:
    """Return the ratio of each contestant to `base` over the pairs of each round: above 1 it is slower than `base`."""
    return {name: Spread.of([a / b for a, b in zip(values, seconds[base])]) for name, values in seconds.items()}
