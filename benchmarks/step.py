"""Step time of a model, our arms against theirs: interleaved in one process, medians and ratios.

    python benchmarks/step.py                      # ResNet-18, batch 16 at 128x128, channels-last, Inductor
    python benchmarks/step.py --model resnet50 --batch 8 --steps 15 --arms dense,ssprop

Arms: ``dense`` (torch.compile), ``ssprop`` (the backend at the drop rate), ``dense-phase`` (the backend in a dense phase),
``eager`` and ``transform`` (the same without a compiler). A step is forward, loss and backward; the optimizer is the same
for all and left out. The ceiling is the dense step less, for every convolution, (1 - kept/total) of its own dense backward.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time

import torch
import torchvision

import ssprop_fx
from ssprop_fx import Policy


def constant(drop_rate: float) -> Policy:
    return Policy(drop_rate=drop_rate, schedule={"kind": "constant", "end": 1.0})


def dense_phase(drop_rate: float) -> Policy:
    return Policy(drop_rate=drop_rate, schedule={"kind": "constant", "end": 0.0, "start": 0.0})


def build(arm: str, model: torch.nn.Module, drop_rate: float):
    model = copy.deepcopy(model)
    if arm == "eager":
        return model
    if arm == "dense":
        return torch.compile(model)
    if arm == "transform":
        return ssprop_fx.transform(model, constant(drop_rate))
    policy = constant(drop_rate) if arm == "ssprop" else dense_phase(drop_rate)
    return torch.compile(model, backend="ssprop", options={"policy": policy})


def step(model, images, labels) -> tuple[float, float]:
    start = time.perf_counter()
    loss = torch.nn.functional.cross_entropy(model(images), labels)
    middle = time.perf_counter()
    loss.backward()
    end = time.perf_counter()
    model.zero_grad(set_to_none=True)
    return middle - start, end - middle


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet18", help="a torchvision model")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=128, help="height and width of the images")
    parser.add_argument("--drop-rate", type=float, default=0.8)
    parser.add_argument("--steps", type=int, default=21, help="timed steps per arm")
    parser.add_argument("--arms", default="dense,ssprop,dense-phase")
    parser.add_argument("--contiguous", action="store_true", help="NCHW instead of channels-last")
    parser.add_argument("--json", metavar="FILE", help="write the figures there, too")
    options = parser.parse_args()

    torch.manual_seed(0)
    layout = torch.contiguous_format if options.contiguous else torch.channels_last
    model = torchvision.models.get_model(options.model, weights=None).to(memory_format=layout)
    images = torch.randn(options.batch, 3, options.size, options.size).contiguous(memory_format=layout)
    labels = torch.randint(0, 1000, (options.batch,))

    arms = {arm: build(arm, model, options.drop_rate) for arm in options.arms.split(",")}
    times: dict[str, list[tuple[float, float]]] = {arm: [] for arm in arms}
    compile_seconds = {}
    for arm, candidate in arms.items():
        start = time.perf_counter()
        step(candidate, images, labels)
        compile_seconds[arm] = time.perf_counter() - start
        step(candidate, images, labels)
    for _ in range(options.steps):
        for arm, candidate in arms.items():
            times[arm].append(step(candidate, images, labels))

    base = next(iter(arms))
    results = {}
    print(f"{options.model}, batch {options.batch} at {options.size}², d = {options.drop_rate}, "
          f"torch {torch.__version__}, {torch.get_num_threads()} threads")  # fmt: skip
    print(f"{'arm':12} {'forward':>9} {'backward':>9} {'step':>9} {'/ ' + base:>9} {'quartiles':>15} {'first step':>10}")
    for arm, pairs in times.items():
        forward = statistics.median(f for f, _ in pairs) * 1e3
        backward = statistics.median(b for _, b in pairs) * 1e3
        ratios = sorted((f + b) / sum(d) for (f, b), d in zip(pairs, times[base], strict=True))
        whole = statistics.median(f + b for f, b in pairs) * 1e3
        low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [ratios[0]] * 3
        results[arm] = {
            "forward_ms": forward, "backward_ms": backward, "step_ms": whole, "ratio": middle,
            "ratio_quartiles": [low, high], "first_step_s": compile_seconds[arm],
        }  # fmt: skip
        print(f"{arm:12} {forward:7.1f}ms {backward:7.1f}ms {whole:7.1f}ms {middle:9.3f} "
              f"{low:7.3f}–{high:.3f} {compile_seconds[arm]:9.1f}s")  # fmt: skip
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"options": vars(options), "torch": torch.__version__, "arms": results}, file, indent=2)


if __name__ == "__main__":
    main()
