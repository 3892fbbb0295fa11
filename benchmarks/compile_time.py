"""Cold compile and warm start: a model under the backend, and under plain ``torch.compile``, each in a process of its own.

    python benchmarks/compile_time.py                         # ResNet-18, three rounds, ten minutes
    python benchmarks/compile_time.py --model resnet50 --rounds 1 --json FILE

Timed is the first step of each phase, compiling included: forward and dense backward of plain ``torch.compile``; forward, dense
and sparse backward of the backend. A cold start has an empty cache of Inductor's; a warm start is another process with the
cache that the cold one left. Headers that Inductor precompiles once for all models are there. Imports are not counted. The
arms take turns.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from models import add_options, build

from ssprop_fx import Policy
from ssprop_fx.steps import scalar_loss

ARMS = ("dense", "ssprop")


def first_steps(arm: str, model: str, batch: int | None, size: int | None) -> float:
    """Seconds of the first step of each phase, in this process."""
    import torch._inductor.compile_fx  # torch.compile imports it at once for its own backend, for another one in the first step

    module, inputs = build(model, batch, size)
    policy = Policy(drop_rate=0.8, schedule={"kind": "bar", "period": 2})
    run = torch.compile(module) if arm == "dense" else torch.compile(module, backend="ssprop", options={"policy": policy})
    start = time.perf_counter()
    for _ in range(1 if arm == "dense" else 2):
        scalar_loss(run(*inputs)).backward()
        policy.step()
    return time.perf_counter() - start


def in_a_process(arm: str, options: argparse.Namespace, cache: str) -> float:
    """:func:`first_steps` in a process of its own."""
    sizes = [f"--{k}={v}" for k, v in (("batch", options.batch), ("size", options.size)) if v]
    command = [sys.executable, __file__, "--in-process", arm, "--model", options.model, *sizes]
    run = subprocess.run(
        command, env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache}, capture_output=True, text=True, check=False
    )
    if run.returncode:
        sys.exit(run.stderr)
    return float(run.stdout.splitlines()[-1])


def main(options: argparse.Namespace) -> None:
    """Run the rounds and print the table."""
    seconds: dict[str, list[float]] = {f"{arm}, {start}": [] for start in ("cold", "warm") for arm in ARMS}
    for number in range(options.rounds):
        for arm in ARMS if number % 2 == 0 else reversed(ARMS):
            with tempfile.TemporaryDirectory() as cache:
                for start in ("cold", "warm"):
                    seconds[f"{arm}, {start}"].append(in_a_process(arm, options, cache))
    rows = []
    for start in ("cold", "warm"):
        dense, ours = (seconds[f"{arm}, {start}"] for arm in ARMS)
        ratios = [o / d for o, d in zip(ours, dense, strict=True)]
        cells = [f"{statistics.median(s):.1f} ({min(s):.1f}–{max(s):.1f})" for s in (dense, ours)]
        rows.append([start, *cells, f"{statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})"])
    print("| start | torch.compile, s | backend ssprop, s | ratio (smallest–largest) |\n|---|---|---|---|")
    print("\n".join(f"| {' | '.join(row)} |" for row in rows))
    if options.json:
        found = {"model": options.model, "torch": torch.__version__, "rounds": options.rounds, "seconds": seconds}
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--in-process", choices=ARMS, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.in_process:
        print(first_steps(chosen.in_process, chosen.model, chosen.batch, chosen.size))
    else:
        main(chosen)
