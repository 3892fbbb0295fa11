"""Backward pass of every distinct convolution of a model in eager mode: sparse against dense, which take turns.

    python benchmarks/layers.py                              # ResNet-18, channels-last, drop rate 0.8
    python benchmarks/layers.py --model mobilenet_v2 --contiguous --json layers.json

Random gradients, inputs and weights of the shapes that one training step shows; as many kept channels as `round_to: auto`
gives the layer in that model. A line is a shape: the layers that have it, medians, the ratio with quartiles.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import torch
from models import add_options, build

from ssprop_fx import Policy, transform
from ssprop_fx.arms import at_factor
from ssprop_fx.backward import dense_backward, sparse_backward
from ssprop_fx.cost import Call
from ssprop_fx.coverage import measure
from ssprop_fx.profit import random_tensor, settle
from ssprop_fx.timing import Spread, processor, ratio, take_turns


def timed(call: Call, keep: int, rounds: int) -> tuple[dict[str, float], Spread]:
    """Median seconds of the two, and the ratio."""
    grad, input, weight = (random_tensor(call, sizes) for sizes in (call.output, call.input, call.weight))
    mask = (*(call.needs or (True, True)), False)
    calls = {
        "dense": lambda: dense_backward(grad, input, weight, call.args, mask),
        "sparse": lambda: sparse_backward(grad, input, weight, None, call.args, mask, keep, "l1"),
    }
    with torch.no_grad():
        times = take_turns(calls, rounds, warmup=3)
    return {name: statistics.median(t) for name, t in times.items()}, ratio(times["sparse"], times["dense"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--drop-rate", type=float, default=0.8)
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--contiguous", action="store_true", help="NCHW instead of channels-last")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()

    model, inputs = build(options.model, options.batch, options.size, options.contiguous)
    found = measure(transform(model, at_factor(Policy(drop_rate=options.drop_rate), 1.0)), inputs).layers
    demands = [
        call.demand(name, layer.settings.drop_rate, layer.settings.multiple)
        for name, layer in found.items()
        for call in layer.calls
    ]
    counts, _ = settle(demands, measured=False)
    shapes: dict[tuple[Call, int], list[str]] = {}
    for demand in demands:
        shapes.setdefault((demand.calls[0], counts[demand.layer]), []).append(demand.layer)
    layout = "contiguous" if options.contiguous else "channels-last"
    print(f"{options.model}, {layout}, drop rate {options.drop_rate:g}, PyTorch {torch.__version__}, {processor()}")
    rows, totals = [], {"dense": 0.0, "sparse": 0.0}
    for (call, keep), layers in shapes.items():
        if keep == call.channels:
            continue
        times, spread = timed(call, keep, options.rounds)
        for name, seconds in times.items():
            totals[name] += len(layers) * seconds
        rows.append(
            {"layers": layers, "input": call.input, "weight": call.weight, "kept": keep, "seconds": times} | spread.to_dict()
        )
        what = f"{'×'.join(map(str, call.weight))} / {max(call.args.stride)} of {'×'.join(map(str, call.input))}"
        ms = f"{1e3 * times['dense']:7.2f} {1e3 * times['sparse']:7.2f} ms"
        print(f"{len(layers):2d} × {layers[0]:32s} {what:40s} {keep:4d}/{call.channels:<4d} {ms}  {spread}", flush=True)
    over = [row["layers"][0] for row in rows if row["low"] > 1]
    print(f"all: {1e3 * totals['dense']:.1f} ms dense, {1e3 * totals['sparse']:.1f} ms sparse")
    print(f"slower beyond noise (lower quartile above 1): {', '.join(over) or 'none'}")
    if options.json:
        setting = {"torch": torch.__version__, "processor": processor(), "threads": torch.get_num_threads()}
        setting |= {k: v for k, v in vars(options).items() if k != "json"}
        options.json.write_text(json.dumps({"setting": setting, "shapes": rows, "slower": over}, indent=1) + "\n")


if __name__ == "__main__":
    main()
