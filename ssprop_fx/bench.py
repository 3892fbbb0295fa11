"""Training steps timed against each other: what a policy gains on a model, on this machine, and what it could gain at most.

The *ceiling* is the dense step less, for every convolution, the share of its own dense backward time that its dropped
channels stand for: what a sparse backward pass without any cost of its own would take. *Captured* is the part of that
saving which is really made, (dense − ours) / (dense − ceiling).
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .arms import ARMS, at_factor, base_of, check_arms
from .bench_run import Run
from .ceiling import Ceiling
from .energy import counter_of
from .errors import SSPropError, nearest
from .files import check_writable
from .joules import SECONDS, Counter, joules_of, tick
from .policy import Policy
from .steps import device_of, scalar_loss
from .timing import Spread, accelerator, processor, ratio, take_turns, threads_used, working_on

WARMUP = {"cpu": 2, "cuda": 10}  # rounds that are not timed: clocks, the allocator and lazy libraries settle in them


@dataclass(frozen=True)
class ArmResult:
    """Times of one arm, in seconds, and its ratio to the arm that it is compared with.

    Attributes:
        first: the first step, compilation included.
        forward, backward, step: medians.
        ratio: of the whole step, round by round, to the step of ``base``.
        base: the dense arm that runs the same way, eager or compiled.
        peak_bytes: tensor memory at the highest point of a step, over what lives between steps; None if not measured.
        ceiling: part of the dense step that would be left; None for a dense arm, or if it is unknown, as is ``captured``.
        captured: see the module.
        joules: of the device in a step, over blocks of steps; None if not measured, as is ``joules_ratio``.
        joules_ratio: to those of ``base``, block by block.
    """

    first: float
    forward: float
    backward: float
    step: float
    base: str
    ratio: Spread
    peak_bytes: int | None = None
    ceiling: float | None = None
    captured: float | None = None
    joules: Spread | None = None
    joules_ratio: Spread | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        return asdict(self)


@dataclass
class BenchResult:
    """What :func:`bench` measured.

    Attributes:
        model: class name.
        setting: what it was measured on, and how.
        arms: results by name.
        times: seconds of every step, by arm.
        joules: joules a step of every block, by arm; empty if not measured.
        unknown: what could not be told, and why.
    """

    model: str
    setting: dict[str, Any]
    arms: dict[str, ArmResult]
    times: dict[str, list[float]] = field(repr=False)
    joules: dict[str, list[float]] = field(default_factory=dict, repr=False)
    unknown: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        arms = {name: arm.to_dict() for name, arm in self.arms.items()}
        return {
            "model": self.model, "setting": self.setting, "arms": arms, "seconds": self.times, "joules": self.joules,
            "unknown": self.unknown,
        }  # fmt: skip

    def __str__(self) -> str:
        s = self.setting
        head = f"{self.model}, drop rate {s['policy']['drop_rate']:g}, PyTorch {s['torch']}, {s['device']}"
        head += f" ({s['processor']}), {threads_used(s['threads'])}" if s["device"] == "cpu" else ""
        head += f" ({s['gpu']})" if "gpu" in s else ""
        names = (
            "arm", "forward", "backward", "step", "of", "ratio (quartiles)", "ceiling", "captured", "peak",
            "energy (quartiles)", "energy ratio", "first step",
        )  # fmt: skip
        rows: list[tuple[str, ...]] = [names]
        for name, arm in self.arms.items():
            ms = [f"{1e3 * t:.1f} ms" for t in (arm.forward, arm.backward, arm.step)]
            rows.append((
                name, *ms, arm.base, str(arm.ratio),
                "" if arm.ceiling is None else f"{arm.ceiling:.3f}",
                "" if arm.captured is None else f"{arm.captured:.3f}",
                "" if arm.peak_bytes is None else f"{arm.peak_bytes / 2**20:.1f} MiB",
                "" if arm.joules is None else "{median:.4g} J ({low:.4g}–{high:.4g})".format(**arm.joules.to_dict()),
                "" if arm.joules_ratio is None else str(arm.joules_ratio),
                f"{arm.first:.1f} s",
            ))  # fmt: skip
        used = [i for i in range(len(names)) if any(row[i] for row in rows[1:])]
        widths = {i: max(len(row[i]) for row in rows) for i in used}
        lines = ["  ".join(row[i].ljust(widths[i]) if i == 0 else row[i].rjust(widths[i]) for i in used) for row in rows]
        return "\n".join([head, *lines, *(f"unknown: {reason}" for reason in self.unknown)])

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
    energy: bool = False,
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
        energy: measure the device's joules, too, in blocks of steps after the rounds: on CUDA half a minute an arm.

    Raises:
        SSPropError: an arm is unknown, the model's outputs carry no gradient, or nothing counts the device's energy.
    """
    check_arms(arms)
    device = device_of(model)
    with working_on(device):
        counter = _checked(counter_of(device)) if energy else None
        policy = at_factor(policy or Policy(), 1.0)
        names = list(dict.fromkeys([*dict.fromkeys(base_of(arm) for arm in arms), *arms]))
        runs: dict[str, Run] = {}
        for name in names:
            progress(f"first step of {name}")
            runs[name] = Run(name, copy.deepcopy(model), example_inputs, policy, loss or scalar_loss, amp)
        return _measured(runs, type(model).__name__, policy, rounds, memory, counter, progress)


def _checked(counter: Counter) -> Counter:
    tick(counter)
    return counter


def _measured(
    runs: Mapping[str, Run], model: str, policy: Policy, rounds: int, memory: bool, counter: Counter | None,
    progress: Callable[[str], None],
) -> BenchResult:  # fmt: skip
    device, amp = next((run.device, run.amp) for run in runs.values())
    progress(f"{rounds} rounds of {', '.join(runs)}")
    warmup = WARMUP.get(device.type, WARMUP["cpu"])
    times = take_turns({name: run.seconds for name, run in runs.items()}, rounds, warmup, figure=lambda seconds: seconds())
    splits = {name: run.splits[-rounds:] for name, run in runs.items()}
    unknown: list[str] = []
    joules: dict[str, list[float]] = {}
    if counter is not None:  # before the profiler, which stays in the driver's way
        progress(f"joules of {', '.join(runs)}")
        try:
            joules = joules_of({name: run.advance for name, run in runs.items()}, counter, SECONDS[device.type])
        except Exception as problem:  # NVML raises its own errors; the times are worth having without
            unknown.append(f"joules: {problem}")
    ceilings, reasons = _ceilings(runs, times, progress)
    results = {}
    for name, run in runs.items():
        base = base_of(name)
        ratios, ceiling, split = ratio(times[name], times[base]), ceilings.get(name), splits[name]
        results[name] = ArmResult(
            run.first, statistics.median(f for f, _ in split), statistics.median(b for _, b in split),
            statistics.median(times[name]), base, ratios,
            run.peak_bytes() if memory else None,
            ceiling,
            (1 - ratios.median) / (1 - ceiling) if ceiling is not None and ceiling < 1 else None,
            Spread.of(joules[name]) if joules else None,
            ratio(joules[name], joules[base]) if joules else None,
        )  # fmt: skip
    setting = {
        "torch": torch.__version__, "processor": processor(), "threads": torch.get_num_threads(), "rounds": rounds,
        "policy": policy.to_dict(), "device": str(device), "amp": str(amp).removeprefix("torch.") if amp else None,
        **accelerator(device),
    }  # fmt: skip
    return BenchResult(model, setting, results, times, joules, unknown + reasons)


def _ceilings(
    runs: Mapping[str, Run], times: Mapping[str, list[float]], progress: Callable[[str], None]
) -> tuple[dict[str, float], list[str]]:
    """What would be left of a step of the dense arm, of those that follow the policy, and why it is not known of others."""
    found: dict[str, float] = {}
    unknown = []
    for base in dict.fromkeys(base_of(name) for name in runs if ARMS[name].sparse):
        progress(f"convolutions of {base}")
        arms = [name for name in runs if ARMS[name].sparse and base_of(name) == base]
        try:
            ceiling = Ceiling.of(runs[base], statistics.median(times[base]))
        except (SSPropError, RuntimeError) as problem:  # a profile that fails must not cost the times
            unknown.append(f"ceiling of {', '.join(arms)}: {problem}")
            continue
        for name in arms:
            try:
                found[name] = 1 - ceiling.saving(runs[name].report())
            except SSPropError as problem:
                unknown.append(f"ceiling of {name}: {problem}")
    return found, unknown
