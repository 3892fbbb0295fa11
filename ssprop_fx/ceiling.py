"""What a sparse backward pass without any cost of its own would leave of a dense step, by the profiler."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from .bench_run import Run
from .errors import SSPropError
from .report import Report
from .timing import timed


@dataclass(frozen=True)
class Ceiling:
    """What part of a dense step the convolutions' backward passes take, by shapes of gradient, input and weight.

    Parts of a step, not seconds: the machine need not be as quick as it was when the steps were timed.
    """

    shares: Mapping[tuple, float]

    @classmethod
    def of(cls, run: Run, step: float | None = None, rounds: int = 7) -> Ceiling:
        """By the profiler, from inside whole steps: the median of ``rounds`` steps, for each shape.

        Args:
            step: seconds of the arm's step without the profiler. On CUDA the convolutions' time is the device's, which the
                profiler leaves as it is, while it slows the host: the parts are those of this time. Without it, and on the
                CPU, where the profiler slows what is in the step alike, they are those of the profiled step.

        Raises:
            SSPropError: the profiler tells no times of the device.
        """
        on_cuda = run.device.type == "cuda"
        activities = [torch.profiler.ProfilerActivity.CPU, *[torch.profiler.ProfilerActivity.CUDA] * on_cuda]
        found: dict[tuple, list[float]] = {}
        for number in range(rounds):
            with torch.profiler.profile(activities=activities, record_shapes=True) as profile:
                seconds = timed(run)
            whole = step if on_cuda and step is not None else seconds
            for event in profile.events():
                if event.name == "aten::convolution_backward":
                    key = tuple(tuple(shape) for shape in event.input_shapes[:3])
                    spent = event.device_time_total if on_cuda else event.cpu_time_total
                    found.setdefault(key, [0.0] * rounds)[number] += spent / 1e6 / whole
        shares = {key: statistics.median(each) for key, each in found.items()}
        untold = [key for key, share in shares.items() if share <= 0]
        if untold and on_cuda:
            raise SSPropError(
                f"the profiler tells no device time of {len(untold)} of {len(shares)} convolutions: {sorted(untold)[:3]}. "
                "Next step: run where CUPTI may be used and nothing else profiles"
            )
        return cls(shares)

    def saving(self, report: Report) -> float:
        """Part of the step that the dropped channels of a report stand for; layers of one shape are averaged.

        Raises:
            SSPropError: the profile holds convolutions that the report does not.
        """
        kept: dict[tuple, list[float]] = {}
        for row in report.rows:
            if row.rewritten and row.output_shape and row.input_shape and row.weight_shape and row.total:
                key = (tuple(row.output_shape), tuple(row.input_shape), tuple(row.weight_shape))
                kept.setdefault(key, []).extend([(row.kept or 0) / row.total] * row.calls)
        missing = self.shares.keys() - kept.keys()
        if missing:
            raise SSPropError(f"{len(missing)} convolutions of the profile are not in the report: {sorted(missing)[:3]}")
        return sum((1 - statistics.mean(kept[key])) * share for key, share in self.shares.items())
