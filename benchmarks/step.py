"""Step time of a model under the arms of ``ssprop_fx.bench``, which take turns in one process: medians, ratios, captured.

    python benchmarks/step.py                            # ResNet-18, batch 16 at 128x128, channels-last
    python benchmarks/step.py --model unet2d --arms dense,ssprop
    python benchmarks/step.py --model resnet18 --contiguous --arms eager,transform
    python benchmarks/step.py --model resnet50 --batch 256 --size 224 --device cuda --amp bfloat16 --rounds 51 \\
        --memory --energy

A step is forward, loss (the mean square of the outputs) and backward; the optimizer is the same for all and left out. Random
weights, random inputs, float32 unless ``--amp`` says otherwise. ``--json`` keeps every single time, ``--plot`` draws them.
``--energy`` needs NVML (pip install nvidia-ml-py) on CUDA and RAPL on the CPU, and takes half a minute an arm.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from models import add_options, build

from ssprop_fx import Policy, SSPropError
from ssprop_fx.arms import ARMS
from ssprop_fx.bench import bench

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--drop-rate", type=float, default=0.8)
    parser.add_argument("--round-to", default="auto", help="auto, or a whole number")
    parser.add_argument("--profitable", default="always", choices=["always", "auto"])
    parser.add_argument("--rounds", type=int, default=21, help="timed steps of each arm")
    parser.add_argument("--arms", default="dense,ssprop,dense-phase", help=", ".join(ARMS))
    parser.add_argument("--contiguous", action="store_true", help="NCHW instead of channels-last")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--amp", choices=["bfloat16", "float16"], help="autocast type of the forward pass")
    parser.add_argument("--memory", action="store_true", help="measure peak memory, too")
    parser.add_argument("--energy", action="store_true", help="measure joules a step, too")
    parser.add_argument("--cudnn-benchmark", action="store_true", help="cuDNN tries its algorithms for each shape, in all arms")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="a PNG with every step's time")
    options = parser.parse_args()

    torch.backends.cudnn.benchmark = options.cudnn_benchmark
    model, inputs = build(options.model, options.batch, options.size, options.contiguous, options.device)
    policy = Policy(
        drop_rate=options.drop_rate,
        round_to=options.round_to if options.round_to == "auto" else int(options.round_to),
        profitable=options.profitable,
    )
    try:
        result = bench(
            model, inputs, policy, options.arms.split(","), options.rounds, memory=options.memory,
            amp=getattr(torch, options.amp) if options.amp else None, energy=options.energy,
        )  # fmt: skip
    except SSPropError as problem:
        sys.exit(f"error: {problem}")
    result.setting |= {k: v for k, v in vars(options).items() if k not in ("json", "plot")}
    print(result)
    if options.json:
        options.json.write_text(json.dumps(result.to_dict(), indent=1) + "\n")
    if options.plot:
        result.plot(options.plot)
