"""Times that can be compared: alternatives take turns in one process, in a new order every round.

The noise of a machine hits all of them, and a ratio is taken within a round, between calls that are a moment apart.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import platform
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of what was measured once a round."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value."""
        low, _, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [*values] * 3
        return cls(statistics.median(values), low, high)

    def to_dict(self) -> dict[str, float]:
        """Plain numbers, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low:.3f}–{self.high:.3f})"


def ratio(values: Sequence[float], base: Sequence[float]) -> Spread:
    """Of two lists of times, or of joules, round by round."""
    return Spread.of([t / b for t, b in zip(values, base, strict=True)])


def timed(call: Callable[[], Any], repeats: int = 1) -> float:
    """Seconds that the call takes, work that it left to an accelerator included.

    Args:
        repeats: calls one after another, with one wait at the end; the result is one call's part.
    """
    synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    synchronize()
    return (time.perf_counter() - start) / repeats


def take_turns(
    calls: Mapping[str, Callable[[], Any]],
    rounds: int,
    warmup: int = 1,
    seconds: float = float("inf"),
    progress: Callable[[], None] = lambda: None,
    figure: Callable[[Callable[[], Any]], float] = timed,
) -> dict[str, list[float]]:
    """Run every call once a round and time it.

    Args:
        calls: what is compared, by name.
        rounds: timed rounds.
        warmup: rounds before, not timed.
        seconds: no new round begins later than this after the first timed one; there is one in any case.
        progress: called after every call.
        figure: makes the call and gives its figure; :func:`timed`, or what measures something else.

    Returns:
        For each name the times, in seconds, or other figures, one per round, in the order of the rounds.
    """
    order = list(calls)
    shuffle = random.Random(0).shuffle
    figures: dict[str, list[float]] = {name: [] for name in calls}
    begin = time.perf_counter()
    for number in range(-warmup, rounds):
        if number == 0:
            begin = time.perf_counter()
        elif number > 0 and time.perf_counter() - begin > seconds:
            break
        shuffle(order)  # who comes after whom matters: caches, the memory allocator
        for name in order:
            found = figure(calls[name])
            if number >= 0:
                figures[name].append(found)
            progress()
    return figures


class Laps:
    """Marks in the work on a device, and the seconds between neighbours.

    On CUDA a mark is an event in the stream that works. Nobody waits there, so the host runs ahead between two marks as it does
    in training. Elsewhere a mark waits and reads the host's clock.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self._marks: list[Any] = []

    def mark(self) -> None:
        """Here one part of the work ends, and the next one begins."""
        if self._stream is None:
            synchronize()
            self._marks.append(time.perf_counter())
        else:
            event = torch.cuda.Event(enable_timing=True)
            event.record(self._stream)
            self._marks.append(event)

    def seconds(self) -> list[float]:
        """Between neighbouring marks, once the device has come to the last one."""
        pairs = itertools.pairwise(self._marks)
        if self._stream is None:
            return [b - a for a, b in pairs]
        self._marks[-1].synchronize()
        return [a.elapsed_time(b) / 1e3 for a, b in pairs]


def working_on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """A CUDA device as the current one: the one that is waited for, and whose memory is counted."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


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


def threads_used(count: int | None = None) -> str:
    """How many threads PyTorch computes with, or ``count``, in words."""
    count = count or torch.get_num_threads()
    return f"{count} {'thread' if count == 1 else 'threads'}"


def accelerator(device: torch.device) -> dict[str, Any]:
    """What decides about times on a CUDA device, besides the model; nothing for other devices.

    Returns:
        Name, cuDNN's version, whether convolutions and matrix products of float32 are rounded to TF32, and whether cuDNN tries
        its algorithms.
    """
    if device.type != "cuda":
        return {}
    cudnn: Any = torch.backends.cudnn
    parts = {"cudnn": cudnn.conv, "matmul": torch.backends.cuda.matmul}  # `allow_tf32` raises once `fp32_precision` was set
    return {
        "gpu": torch.cuda.get_device_name(device), "cudnn": cudnn.version(), "cudnn_benchmark": cudnn.benchmark,
        "tf32": {name: part.fp32_precision == "tf32" for name, part in parts.items()},
    }  # fmt: skip
