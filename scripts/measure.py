"""What the benchmarks share: how long something takes, and whether a number meets its bar."""

import statistics
import time
from collections.abc import Callable

Speed = Callable[[], float]  # does its work once and says how fast it was


def verdict(value: float, bar: float, unit: str = "", least: bool = False) -> str:
    """A measured value beside its bar, which is the most that it may be, or the least."""
    met = value >= bar if least else value <= bar
    return f"{value:.2f}{unit}, bar {'at least ' * least}{bar:.2f}{unit}: {'met' if met else 'NOT MET'}"


def seconds(work: Callable[[], object]) -> float:
    """How long it takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def side_by_side(one: Speed, other: Speed, rounds: int) -> tuple[float, float, float]:
    """The median speed of each, and of the second relative to the first, taken in turn after one round for nothing."""
    pairs = [(one(), other()) for _ in range(1 + rounds)][1:]
    first, second = (statistics.median(speeds) for speeds in zip(*pairs, strict=True))
    return first, second, statistics.median(b / a for a, b in pairs)
