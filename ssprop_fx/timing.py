"""Times that can be compared: alternatives take turns in one process, in a new order every round.

The noise of a machine hits all of them, and a ratio is taken within a round, between calls that are a moment apart.
"""

from __future__ import annotations

import functools
import platform
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Ratio:
    """A ratio of two times, with its spread: median and quartiles over rounds."""

    median: float
    low: float
    high: float

    def to_dict(self) -> dict[str, float]:
        """Plain numbers, for JSON."""
        return {"median": self.median, "low": self.low, "high": self.high}

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low:.3f}–{self.high:.3f})"


def ratio(times: list[float], base: list[float]) -> Ratio:
    """Of two lists of times, round by round."""
    ratios = [t / b for t, b in zip(times, base, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    return Ratio(statistics.median(ratios), low, high)


def take_turns(
    calls: Mapping[str, Callable[[], Any]],
    rounds: int,
    warmup: int = 1,
    seconds: float = float("inf"),
    progress: Callable[[], None] = lambda: None,
) -> dict[str, list[float]]:
    """Run every call once a round and time it.

    Args:
        calls: what is compared, by name.
        rounds: timed rounds.
        warmup: rounds before, not timed.
        seconds: no new round begins later than this after the first timed one; there is one in any case.
        progress: called after every call.

    Returns:
        For each name the times, in seconds, one per round, in the order of the rounds.
    """
    order = list(calls)
    shuffle = random.Random(0).shuffle
    times: dict[str, list[float]] = {name: [] for name in calls}
    begin = time.perf_counter()
    for number in range(-warmup, rounds):
        if number == 0:
            begin = time.perf_counter()
        elif number > 0 and time.perf_counter() - begin > seconds:
            break
        shuffle(order)  # who comes after whom matters: caches, the memory allocator
        for name in order:
            taken = timed(calls[name])
            if number >= 0:
                times[name].append(taken)
            progress()
    return times


def timed(call: Callable[[], Any]) -> float:
    """Seconds that the call takes, work that it left to an accelerator included."""
    synchronize()
    start = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - start


def synchronize() -> None:
    """Wait for the accelerator, where there is one."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


@functools.cache
def processor() -> str:
    """The processor's name, as the system gives it, and the vector instructions that PyTorch uses of it."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    except OSError:
        pass
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"
