"""Training steps timed against each other: what a policy gains on a model, on this machine, and what it could gain at most.

The *ceiling* is the dense step less, for every convolution, the share of its own dense backward time that its dropped
channels stand for: what a sparse backward pass without any cost of its own would take. *Captured* is the part of that
saving which is really made, (dense − ours) / (dense − ceiling).
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .arms import ARMS, at_factor, base_of, check_arms, freeze
from .errors import SSPropError, nearest
from .files import check_writable
from .inspection import inspect
from .policy import Policy
from .report import Report
from .steps import call_model, scalar_loss
from .timing import Ratio, processor, ratio, synchronize, take_turns, timed


@dataclass(frozen=True)
class ArmResult:
    """Times of one arm, in seconds, and its ratio to the arm that it is compared with.

    Attributes:
        first: the first step, compilation included.
        forward, backward, step: medians.
        ratio: of the whole step, round by round, to the step of ``base``.
        base: the dense arm that runs the same way, eager or compiled.
        peak_bytes: tensor memory at the highest point of a step, over what lives between steps; None if not measured.
        ceiling: part of the dense step that would be left; None for a dense arm, as is ``captured``.
        captured: see the module.
    """

    first: float
    forward: float
    backward: float
    step: float
    base: str
    ratio: Ratio
    peak_bytes: int | None = None
    ceiling: float | None = None
    captured: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        return {**self.__dict__, "ratio": self.ratio.to_dict()}


@dataclass
class BenchResult:
    """What :func:`bench` measured."""

    model: str
    setting: dict[str, Any]
    arms: dict[str, ArmResult]
    times: dict[str, list[float]] = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        arms = {name: arm.to_dict() for name, arm in self.arms.items()}
        return {"model": self.model, "setting": self.setting, "arms": arms, "seconds": self.times}

    def __str__(self) -> str:
        s = self.setting
        head = f"{self.model}, drop rate {s['policy']['drop_rate']:g}, PyTorch {s['torch']}, {s['device']}"
        head += f" ({s['processor']}), {s['threads']} threads" if s["device"] == "cpu" else ""
        names = ("arm", "forward", "backward", "step", "of", "ratio (quartiles)", "ceiling", "captured", "peak", "first step")
        rows: list[tuple[str, ...]] = [names]
        for name, arm in self.arms.items():
            ms = [f"{1e3 * t:.1f} ms" for t in (arm.forward, arm.backward, arm.step)]
            rows.append((
                name, *ms, arm.base, str(arm.ratio),
                "" if arm.ceiling is None else f"{arm.ceiling:.3f}",
                "" if arm.captured is None else f"{arm.captured:.3f}",
                "" if arm.peak_bytes is None else f"{arm.peak_bytes / 2**20:.1f} MiB",
                f"{arm.first:.1f} s",
            ))  # fmt: skip
        used = [i for i in range(len(names)) if any(row[i] for row in rows[1:])]
        widths = {i: max(len(row[i]) for row in rows) for i in used}
        lines = ["  ".join(row[i].ljust(widths[i]) if i == 0 else row[i].rjust(widths[i]) for i in used) for row in rows]
        return "\n".join([head, *lines])

    def plot(self, path: str | Path) -> None:
        """Draw every step's time into a PNG; needs matplotlib."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        figure, axes = pyplot.subplots(figsize=(7, 0.6 + 0.5 * len(self.arms)), layout="constrained")
        names = list(self.arms)[::-1]
        axes.boxplot([[1e3 * t for t in self.times[n]] for n in names], orientation="horizontal", tick_labels=names)
        for i, name in enumerate(names, 1):
            arm = self.arms[name]
            if arm.ceiling is not None:
                axes.plot(
                    [1e3 * arm.ceiling * self.arms[arm.base].step] * 2, [i - 0.35, i + 0.35], color="tab:red", linestyle=":"
                )
        axes.set(xlabel="ms a step (dotted: the ceiling)", title=self.model, xlim=(0, None))
        figure.savefig(path, dpi=120)
        pyplot.close(figure)


def check_plot(path: Path) -> None:
    """Refuse, before anything is timed, what could not be drawn.

    Raises:
        SSPropError: matplotlib is not installed, or draws no files of that kind.
    """
    check_writable(path)
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError as problem:
        raise SSPropError(f"{path} cannot be drawn: {problem}; pip install matplotlib") from None
    kinds = sorted(FigureCanvasBase.get_supported_filetypes())
    if path.suffix and path.suffix[1:].lower() not in kinds:
        near = nearest(path.suffix[1:], kinds)
        hint = f"; nearest: {near}" if near else ""
        raise SSPropError(f"{path} cannot be drawn: its ending is none of {', '.join(kinds)}{hint}")


def bench(
    model: nn.Module,
    example_inputs: Sequence[Any] | Mapping[str, Any] | Tensor,
    policy: Policy | None = None,
    arms: Sequence[str] = ("dense", "ssprop", "dense-phase"),
    rounds: int = 21,
    loss: Callable[[Any], Tensor] | None = None,
    memory: bool = False,
    amp: torch.dtype | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> BenchResult:
    """Time training steps (forward, loss, backward; no optimizer) of several arms, which take turns.

    Args:
        model: any model, in training mode, on its device; it is copied and left as it is.
        example_inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments.
        policy: its full drop rates are measured, whatever the schedule; the default policy without.
        arms: names of :data:`ARMS`. The dense arm of the same kind is added where it is missing.
        rounds: timed steps of each arm.
        loss: the model's result → a scalar; the mean of squares without.
        memory: measure peak memory, too, in a step more of each arm.
        amp: run the forward pass under autocast with this type.
        progress: called with a line of text before every stage.

    Raises:
        SSPropError: an arm is unknown, or the model's outputs carry no gradient.
    """
    check_arms(arms)
    policy = at_factor(policy or Policy(), 1.0)
    names = list(dict.fromkeys([*dict.fromkeys(base_of(arm) for arm in arms), *arms]))
    runs: dict[str, _Run] = {}
    for name in names:
        progress(f"first step of {name}")
        runs[name] = _Run(name, copy.deepcopy(model), example_inputs, policy, loss or scalar_loss, amp)
    progress(f"{rounds} rounds of {', '.join(names)}")
    times = {name: [t / ARMS[name].steps for t in row] for name, row in take_turns(runs, rounds, warmup=2).items()}
    splits = {name: run.splits[-rounds:] for name, run in runs.items()}
    ceilings: dict[str, Ceiling] = {}
    for base in dict.fromkeys(base_of(arm) for arm in arms):
        progress(f"convolutions of {base}")
        ceilings[base] = Ceiling.of(runs[base])
    results = {}
    for name, run in runs.items():
        base = base_of(name)
        ceiling = captured = None
        if ARMS[name].sparse:
            ceiling = 1 - ceilings[base].saving(run.report())
            if ceiling < 1:
                captured = (1 - ratio(times[name], times[base]).median) / (1 - ceiling)
        split = splits[name]
        results[name] = ArmResult(
            run.first, statistics.median(f for f, _ in split), statistics.median(b for _, b in split),
            statistics.median(times[name]), base, ratio(times[name], times[base]),
            run.peak_bytes() if memory else None, ceiling, captured,
        )  # fmt: skip
    setting = {
        "torch": torch.__version__, "processor": processor(), "threads": torch.get_num_threads(), "rounds": rounds,
        "policy": policy.to_dict(), "device": str(next(model.parameters()).device),
        "amp": str(amp).removeprefix("torch.") if amp else None,
    }  # fmt: skip
    return BenchResult(type(model).__name__, setting, results, times)


class _Run:
    """One arm's model, ready to make steps."""

    def __init__(self, name: str, model: nn.Module, inputs: Any, policy: Policy, loss: Any, amp: Any) -> None:
        self.name, self.inputs, self.loss, self.amp = name, inputs, loss, amp
        self.splits: list[tuple[float, float]] = []
        if name == "frozen":
            freeze(model, self._forward_of(model), policy)
        self.model = ARMS[name].build(model, policy)
        self.first = timed(self)

    def _forward_of(self, model: Any) -> Callable[[], Tensor]:
        def forward() -> Tensor:
            device = next(model.parameters()).device.type
            with torch.autocast(device, self.amp, enabled=self.amp is not None):
                return self.loss(call_model(model, self.inputs))

        return forward

    def __call__(self) -> None:
        parts = [self._step() for _ in range(ARMS[self.name].steps)]
        self.splits.append((statistics.mean(f for f, _ in parts), statistics.mean(b for _, b in parts)))

    def _step(self) -> tuple[float, float]:
        start = time.perf_counter()
        result = self._forward_of(self.model)()
        synchronize()
        middle = time.perf_counter()
        result.backward()
        synchronize()
        end = time.perf_counter()
        for parameter in self.model.parameters():
            parameter.grad = None
        return middle - start, end - middle

    def report(self) -> Report:
        """Kept channels and shapes by layer."""
        return inspect(self.model)

    def peak_bytes(self) -> int:
        """Highest tensor memory of a step, over what lives before it."""
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            self()
            return torch.cuda.max_memory_allocated() - before
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            self()
        level = peak = 0
        events = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
        for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
            level += event.nbytes()
            peak = max(peak, level)
        return peak


@dataclass(frozen=True)
class Ceiling:
    """What part of a dense step the convolutions' backward passes take, by shapes of gradient, input and weight.

    Parts of a step, not seconds: the machine need not be as quick as it was when the steps were timed.
    """

    shares: Mapping[tuple, float]

    @classmethod
    def of(cls, run: _Run, rounds: int = 7) -> Ceiling:
        """By the profiler, from inside whole steps: the median of ``rounds`` steps, for each shape."""
        found: dict[tuple, list[float]] = {}
        for number in range(rounds):
            activities = [torch.profiler.ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            with torch.profiler.profile(activities=activities, record_shapes=True) as profile:
                seconds = timed(run)
            for event in profile.events():
                if event.name == "aten::convolution_backward":
                    key = tuple(tuple(shape) for shape in event.input_shapes[:3])
                    spent = event.device_time_total or event.cpu_time_total
                    found.setdefault(key, [0.0] * rounds)[number] += spent / 1e6 / seconds
        return cls({key: statistics.median(shares) for key, shares in found.items()})

    def saving(self, report: Report) -> float:
        """Part of the step that the dropped channels of a report stand for; layers of one shape are averaged."""
        kept: dict[tuple, list[float]] = {}
        for row in report.rows:
            if row.rewritten and row.output_shape and row.input_shape and row.weight_shape and row.total:
                key = (tuple(row.output_shape), tuple(row.input_shape), tuple(row.weight_shape))
                kept.setdefault(key, []).extend([(row.kept or 0) / row.total] * row.calls)
        missing = self.shares.keys() - kept.keys()
        if missing:
            raise SSPropError(f"{len(missing)} convolutions of the profile are not in the report: {sorted(missing)[:3]}")
        return sum((1 - statistics.mean(kept[key])) * share for key, share in self.shares.items())
