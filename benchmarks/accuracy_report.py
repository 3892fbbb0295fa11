"""docs/results.md from the raw JSON files of ``accuracy.py``: tables, plots, and sentences whose figures are computed.

Called as ``python benchmarks/accuracy.py --report``. The sentences that no table can say are in ``findings.md`` beside the
JSON files; a figure in them is a placeholder, ``{short.step.accuracy}``, so that the text cannot say another number than
the tables.
"""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from types import SimpleNamespace
from typing import Any

SEEDS, LEAST = 3, 2  # seeds of a finished arm, and fewer than which tell nothing


@dataclass(frozen=True)
class Summary:
    """One arm of one regime, over its seeds.

    Attributes:
        accuracy, deviation: of the test set, in per cent; the deviation is that of a single run.
        gap, error: mean over the seeds of the difference to dense at equal epochs, in points, and its standard error.
        backward, flops, seconds: share of dense training's, of convolution backward FLOPs, all FLOPs and processor time.
    """

    arm: str
    title: str
    runs: dict[int, dict[str, Any]]
    dense: dict[int, dict[str, Any]]

    def _mean(self, key: str) -> float:
        return mean(run[key] for run in self.runs.values())

    def _share(self, key: str) -> float:
        return mean(run[key] / self.dense[seed][key] for seed, run in self.runs.items() if seed in self.dense)

    @property
    def accuracy(self) -> float:
        return 100 * self._mean("test_accuracy")

    @property
    def deviation(self) -> float:
        return 100 * stdev(run["test_accuracy"] for run in self.runs.values())

    @property
    def train(self) -> float:
        return 100 * self._mean("train_accuracy")

    def against(self, other: Summary) -> tuple[float, float]:
        """Difference of the accuracies in points, seed by seed, and its standard error."""
        seeds = sorted(self.runs.keys() & other.runs.keys())
        gaps = [100 * (self.runs[s]["test_accuracy"] - other.runs[s]["test_accuracy"]) for s in seeds]
        return mean(gaps), stdev(gaps) / len(gaps) ** 0.5

    @property
    def gap(self) -> float:
        return mean(
            100 * (r["test_accuracy"] - self.dense[s]["test_accuracy"]) for s, r in self.runs.items() if s in self.dense
        )

    @property
    def backward(self) -> float:
        return self._share("conv_backward_flops")

    @property
    def flops(self) -> float:
        return self._share("all_flops")

    @property
    def seconds(self) -> float:
        return self._share("cpu_seconds")


def read(folder: Path, order: list[str]) -> tuple[dict[str, dict[str, Summary]], list[str]]:
    """Regime → arm → summary, and the arms that have too few seeds; arms in the given order."""
    runs: dict[str, dict[str, dict[int, dict[str, Any]]]] = defaultdict(lambda: defaultdict(dict))
    for path in sorted(folder.glob("*-*-*.json")):
        regime, arm, seed = path.stem.split("-", 1)[0], *path.stem.split("-", 1)[1].rsplit("-", 1)
        runs[regime][arm][int(seed)] = json.loads(path.read_text())
    found: dict[str, dict[str, Summary]] = {}
    missing = []
    for regime, arms in runs.items():
        found[regime] = {}
        for arm in sorted(arms, key=order.index):
            title = next(iter(arms[arm].values()))["arm"]
            if len(arms[arm]) >= LEAST:
                found[regime][arm] = Summary(arm, title, arms[arm], arms["dense"])
            if len(arms[arm]) < SEEDS:
                missing.append(f"{title} ({regime}: {len(arms[arm])} of {SEEDS})")
    return found, missing


def write(folder: Path, page: Path, order: list[str]) -> None:
    """Write the page and its plots."""
    for regime, arms in read(folder, order)[0].items():
        plot(arms, regime, folder / f"{regime}.png")
    page.write_text(text(folder, order))


def text(folder: Path, order: list[str]) -> str:
    """The page, in Markdown.

    Raises:
        AttributeError: the findings speak of an arm that has not run.
    """
    results, missing = read(folder, order)
    names = {
        regime: SimpleNamespace(**{arm.replace("-", "_"): _Figures(summary, arms) for arm, summary in arms.items()})
        for regime, arms in results.items()
    }
    samples = diffusion(folder)
    names["ddpm"] = SimpleNamespace(**{arm: _DiffusionFigures(samples, runs) for arm, runs in samples.items()})
    findings = (folder / "findings.md").read_text().format(**names)
    parts = {name: text.strip() for name, text in (part.split(" -->\n", 1) for part in findings.split("<!-- part ")[1:])}
    lines = [parts["head"], ""]
    for regime in [name for name in parts if name in results]:
        arms = results[regime]
        lines += [parts[regime], "", *table(arms), "", *verdicts(arms), ""]
        lines += [f"![Accuracy of every arm]({folder.name}/{regime}.png)", "", parts[f"{regime}-after"], ""]
    if "ddpm" in parts:
        lines += [
            parts["ddpm"],
            "",
            *diffusion_table(samples),
            "",
            *diffusion_grids(samples, folder),
            "",
            parts["ddpm-after"],
            "",
        ]
    lines += [parts["tail"], ""]
    if missing:
        lines += ["Arms without all their seeds (with a single one they are in no table): " + "; ".join(missing) + ".", ""]
    return "\n".join(lines)


class _Figures:
    """What a placeholder can name: ``accuracy``, ``deviation``, ``gap``, ``backward`` (per cent saved), ``over_equal`` …"""

    def __init__(self, summary: Summary, arms: dict[str, Summary]) -> None:
        self.accuracy, self.deviation = f"{summary.accuracy:.2f}", f"{summary.deviation:.2f}"
        self.gap = f"{summary.gap:+.2f}".replace("-", "−")
        self.saved, self.flops_saved = f"{100 * (1 - summary.backward):.1f}", f"{100 * (1 - summary.flops):.1f}"
        self.seconds_saved = f"{100 * (1 - summary.seconds):.0f}".replace("-", "−")
        self.train = f"{summary.train:.1f}"
        if "equal" in arms:
            self.over_equal = f"{summary.against(arms['equal'])[0]:+.2f}".replace("-", "−")
            self.over_equal_error = f"{summary.against(arms['equal'])[1]:.2f}"


def diffusion(folder: Path) -> dict[str, dict[int, dict[str, Any]]]:
    """Arm → seed → run, from the files of ``diffusion.py``."""
    found: dict[str, dict[int, dict[str, Any]]] = defaultdict(dict)
    for path in sorted((folder / "ddpm").glob("*.json")):
        run = json.loads(path.read_text())
        found[path.stem.rsplit("-", 1)[0]][run["seed"]] = run
    order = ("dense", "step", "equal")
    return {arm: found[arm] for arm in order if arm in found}


class _DiffusionFigures:
    """Placeholders of the diffusion runs: ``loss``, ``over`` (per cent over dense, seed by seed; ``error``), ``distance`` …"""

    def __init__(self, found: dict[str, dict[int, dict[str, Any]]], runs: dict[int, dict[str, Any]]) -> None:
        dense = found["dense"]
        over = [100 * (run["test_loss"] / dense[seed]["test_loss"] - 1) for seed, run in runs.items()]
        further = [run["distance"] / dense[seed]["distance"] for seed, run in runs.items()]
        self.loss = f"{mean(run['test_loss'] for run in runs.values()):.4f}"
        self.over, self.error = f"{mean(over):+.1f}".replace("-", "−"), f"{stdev(over) / len(over) ** 0.5:.1f}"
        self.distance = f"{mean(run['distance'] for run in runs.values()):.1f}"
        self.deviation = f"{stdev(run['distance'] for run in runs.values()):.1f}"
        self.further = f"{mean(further):.2f}"
        self.backward = f"{mean(r['conv_backward_flops'] / dense[s]['conv_backward_flops'] for s, r in runs.items()):.3f}"
        self.flops = f"{mean(r['all_flops'] / dense[s]['all_flops'] for s, r in runs.items()):.3f}"
        self.seconds = f"{mean(r['cpu_seconds'] / dense[s]['cpu_seconds'] for s, r in runs.items()):.2f}"


def diffusion_table(found: dict[str, dict[int, dict[str, Any]]]) -> list[str]:
    """A row for each arm."""
    head = "| arm | seeds | test loss | over dense | distance of samples | backward FLOPs | all FLOPs | processor time |"
    rows = [head, "|---|---|---|---|---|---|---|---|"]
    for arm, runs in found.items():
        f, title = _DiffusionFigures(found, runs), next(iter(runs.values()))["arm"]
        over = "" if arm == "dense" else f"{f.over} ± {f.error} %"
        rows.append(
            f"| {title} | {len(runs)} | {f.loss} | {over} | {f.distance} ± {f.deviation} "
            f"| {f.backward} | {f.flops} | {f.seconds} |"
        )
    return rows


def diffusion_grids(found: dict[str, dict[int, dict[str, Any]]], folder: Path) -> list[str]:
    """The samples of the first seed, of each arm."""
    return [f"![Samples, {runs[0]['arm']}]({folder.name}/ddpm/{arm}.png)" for arm, runs in found.items() if 0 in runs]


def table(arms: dict[str, Summary]) -> list[str]:
    """A row for each arm."""
    head = "| arm | seeds | test accuracy | against dense | training images | backward FLOPs | all FLOPs | processor time |"
    rows = [head, "|---|---|---|---|---|---|---|---|"]
    for s in arms.values():
        gap = "" if s.arm == "dense" else f"{s.gap:+.2f} ± {s.against(arms['dense'])[1]:.2f}".replace("-", "−")
        rows.append(
            f"| {s.title} | {len(s.runs)} | {s.accuracy:.2f} ± {s.deviation:.2f} | {gap} | {s.train:.1f} "
            f"| {s.backward:.3f} | {s.flops:.3f} | {s.seconds:.2f} |"
        )
    return rows


def verdicts(arms: dict[str, Summary]) -> list[str]:
    """What the table says of each policy against dense training at its own compute."""
    lines = []
    pairs = {"step": "equal", "epoch": "equal", "tail": "tail-equal" if "tail-equal" in arms else "equal"}
    for arm, rival in pairs.items():
        if arm in arms and rival in arms:
            gap, error = arms[arm].against(arms[rival])
            what = "better than" if gap > 2 * error else "worse than" if gap < -2 * error else "not told apart from"
            figures = f"{gap:+.2f} ± {error:.2f} points".replace("-", "−")
            lines.append(f"- {arms[arm].title} is {what} {arms[rival].title}: {figures}.")
    return lines


def plot(arms: dict[str, Summary], title: str, path: Path) -> None:
    """Accuracy against backward FLOPs and against processor time, every run a dot, every arm a mark with its deviation."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.6), sharey=True, layout="constrained")
    for axis, key, label in (
        (axes[0], "conv_backward_flops", "convolution backward FLOPs, share of dense"),
        (axes[1], "cpu_seconds", "processor time, share of dense"),
    ):
        for i, s in enumerate(arms.values()):
            color, marker = f"C{i % 10}", "os^Dv<>PX*hd8p"[i % 14]
            x = [run[key] / s.dense[seed][key] for seed, run in s.runs.items()]
            axis.plot(x, [100 * run["test_accuracy"] for run in s.runs.values()], ".", color=color, alpha=0.5, markersize=5)
            axis.errorbar(mean(x), s.accuracy, s.deviation, fmt=marker, color=color, capsize=3, label=s.title)
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("test accuracy, %")
    figure.suptitle(f"Fashion-MNIST, {title}")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
