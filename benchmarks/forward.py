"""What ``transform`` adds to a model's forward, in eager mode: interleaved medians against the original's forward.

    python benchmarks/forward.py                       # the four models of the design, at d = 0.8
    python benchmarks/forward.py --only BasicUNet --steps 41 --wall

Times are CPU times of the calling thread by default, with one thread, so that other work on the machine does not count;
``--wall`` takes the clock on the wall. The second table is the time that ``transform`` itself takes, and that of the import.
Models and inputs are those of tests/zoo.py (``pip install -e '.[zoo]'``).
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import subprocess
import sys
import time
import warnings

import torch

import ssprop_fx

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", "tests"))
import zoo

NAMES = ("UNet2DConditionModel", "BasicUNet", "retinanet_resnet50_fpn", "spiking_resnet18")


def forward_times(model, other, arguments, steps: int, clock) -> tuple[float, float, float]:
    """Median seconds of both forwards, and the median of the ratios of neighbours."""
    times: list[tuple[float, float]] = []
    for step in range(steps + 3):
        pair = {}
        for m in (model, other) if step % 2 else (other, model):
            torch.manual_seed(0)
            start = clock()
            outputs = m(*arguments)
            pair[m] = clock() - start
            del outputs
        if step >= 3:
            times.append((pair[model], pair[other]))
    ratio = statistics.median(b / a for a, b in times)
    return statistics.median(a for a, _ in times), statistics.median(b for _, b in times), ratio


def import_seconds(statement: str) -> float:
    """Median of five, each in a process of its own."""
    code = f"import torch, time; s = time.perf_counter(); {statement}; print(time.perf_counter() - s)"
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(5)]
    return statistics.median(float(run.stdout) for run in runs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=NAMES, help="models of tests/zoo.py")
    parser.add_argument("--drop-rate", type=float, default=0.8)
    parser.add_argument("--steps", type=int, default=21, help="timed forwards of each")
    parser.add_argument("--wall", action="store_true", help="the clock on the wall instead of the thread's CPU time")
    parser.add_argument("--no-transform", action="store_true", help="leave the second table out")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    clock = time.perf_counter if options.wall else time.thread_time

    print(f"{'model':24} {'original':>10} {'transformed':>12} {'ratio':>7}")
    for entry in zoo.MODELS:
        if entry.name in options.only:
            original, arguments = entry.build(), entry.arguments()
            transformed = ssprop_fx.transform(original, zoo.policy(options.drop_rate))
            for model in (original, transformed):
                zoo.run_step(model, arguments)  # in training, too, the kept counts are settled by the first step
            gc.collect()
            gc.disable()
            ours, theirs, ratio = forward_times(original, transformed, arguments, options.steps, clock)
            gc.enable()
            print(f"{entry.name:24} {ours * 1e3:8.2f}ms {theirs * 1e3:10.2f}ms {ratio:7.3f}", flush=True)
    if options.no_transform:
        return
    import torchvision

    for name in ("resnet18", "resnet50", "resnet152"):
        model = torchvision.models.get_model(name, weights=None)
        runs = []
        for _ in range(3):
            start = clock()
            ssprop_fx.transform(model, zoo.policy(options.drop_rate))
            runs.append(clock() - start)
        print(f"transform {name:14} {len(list(model.modules())):4d} modules  {statistics.median(runs):.3f} s")
    print(f"import ssprop_fx after torch    {import_seconds('import ssprop_fx'):.3f} s")


if __name__ == "__main__":
    main()
