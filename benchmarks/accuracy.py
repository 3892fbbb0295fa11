"""Test accuracy under the policies of the study, against dense training, on Fashion-MNIST: one JSON file per run.

    python benchmarks/accuracy.py                               # all runs that are not in docs/results yet
    python benchmarks/accuracy.py --regimes short --arms dense,step --seeds 0,1,2
    python benchmarks/accuracy.py --report                      # docs/results.md and its plots, from the JSON files
    python benchmarks/accuracy.py --network resnet18 --device cuda --out docs/results/resnet18

Arms of one seed start from the same weights, train on the same images and see them in the same order. FLOPs are counted
with ``torch.utils.flop_counter`` on the first step at each factor; seconds are the process's own, of the training steps
alone. The images come from Debian's package dataset-fashion-mnist or a folder, ``--data``, or are downloaded by torchvision.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import ssprop_fx
from ssprop_fx import Policy
from ssprop_fx.demo import Block

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))
from images import Images  # noqa: E402

_BACKWARD = torch.ops.aten.convolution_backward


# --- what is trained -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Regime:
    """How long a network trains, and on how much.

    Attributes:
        images: how many of the 60,000 training images, drawn by the seed.
        rate: peak learning rate of Adam under a one-cycle schedule.
        widths: channels of the blocks, of the smaller network.
        pretrained: every arm starts from the weights that the regime of this name gives in dense training, on images that
            are not among its own.
    """

    images: int
    epochs: int
    batch: int
    rate: float
    widths: tuple[int, ...] = (16, 32, 64)
    pretrained: str = ""

    def to_dict(self) -> dict[str, Any]:
        """What a run's file says of it; the fields that are as ever are left out."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}


REGIMES = {
    "short": Regime(images=15_000, epochs=6, batch=128, rate=5e-3),
    "overfit": Regime(images=2_000, epochs=30, batch=64, rate=3e-3),
    "long": Regime(images=60_000, epochs=6, batch=128, rate=5e-3),
    "wide": Regime(images=15_000, epochs=6, batch=128, rate=5e-3, widths=(32, 64, 128)),
    "finetune": Regime(images=15_000, epochs=3, batch=128, rate=1e-3, pretrained="short"),
}


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        title: for tables.
        policy: contents of the policy; None is dense. In its schedule ``unit`` is ``epoch`` where periods count
            epochs, and ``warmup`` and ``cooldown`` are shares of the run.
        dropout: after every block of the network.
        compute: the run is shortened until its FLOPs are those of this arm.
        amp: forward and loss under bfloat16 autocast.
    """

    title: str
    policy: dict[str, Any] | None = None
    dropout: float = 0.0
    compute: str | None = None
    amp: bool = False


def bar(drop_rate: float = 0.8, **more: Any) -> dict[str, Any]:
    """A bar schedule: as many dense steps as sparse ones."""
    schedule = {"kind": "bar", "period": 2, **{k: more.pop(k) for k in ("unit", "period", "warmup", "cooldown") if k in more}}
    return {"drop_rate": drop_rate, "schedule": schedule, **more}


def constant(drop_rate: float, **more: Any) -> dict[str, Any]:
    """The same rate at every step."""
    return {"drop_rate": drop_rate, "schedule": {"kind": "constant"}, **more}


ARMS = {
    "dense": Arm("dense"),
    "step": Arm("bar 0.8 per step (the default)", bar()),
    "equal": Arm("dense at the compute of bar 0.8", compute="step"),
    "epoch": Arm("bar 0.8 per epoch (the paper's)", bar(unit="epoch")),
    "constant": Arm("constant 0.4", constant(0.4)),
    "random": Arm("bar 0.8 per step, random channels", bar(criterion="random")),
    "dropout": Arm("dense + Dropout 0.2", dropout=0.2),
    "mixed": Arm("bar 0.4 per step (0.2 on average) + Dropout 0.2", bar(0.4), dropout=0.2),
    "tail": Arm("bar 0.8 per step, last quarter dense", bar(cooldown=0.25)),
    "warmup": Arm("bar 0.8 per step, first quarter dense", bar(warmup=0.25)),
    "tail-equal": Arm("dense at the compute of the dense tail", compute="tail"),
    "amp": Arm("bar 0.8 per step, bfloat16 autocast", bar(), amp=True),
    "dense-amp": Arm("dense, bfloat16 autocast", amp=True),
    "epoch-tail": Arm("bar 0.8 per epoch, last quarter dense", bar(unit="epoch", cooldown=0.25)),
    "weight": Arm("bar 0.8 per step, weight gradients only", bar(gradients="weight")),
    "half": Arm("bar 0.5 per step", bar(0.5)),
    "third": Arm("0.8 at two steps of three", bar(period=3)),
    "l2": Arm("bar 0.8 per step, l2", bar(criterion="l2")),
    "taylor": Arm("bar 0.8 per step, taylor", bar(criterion="taylor")),
    "high": Arm("bar 0.9 per step", bar(0.9)),
}


class ResNet8(nn.Module):
    """A ResNet of three blocks, 16 to 64 channels: (N, 1, 28, 28) → (N, 10). Its stem halves the image."""

    def __init__(self, dropout: float, widths: tuple[int, ...]) -> None:
        super().__init__()
        stem = nn.Conv2d(1, widths[0], 5, 2, 2, bias=False)
        self.stem = nn.Sequential(stem, nn.BatchNorm2d(widths[0]), nn.ReLU())
        blocks: list[nn.Module] = []
        for c, k in zip((widths[0], *widths[:-1]), widths, strict=True):
            blocks += [Block(c, k, 1 if c == k else 2), nn.Dropout(dropout)]
        self.stages = nn.Sequential(*blocks)
        self.head = nn.Linear(widths[-1], 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stages(self.stem(x)).mean((2, 3)))


def resnet18(dropout: float, widths: tuple[int, ...]) -> nn.Module:
    """torchvision's ResNet-18 with the paper's stem: 3×3, stride 1, no pooling; (N, 1, 28, 28) → (N, 10); it has one width."""
    import torchvision

    network = torchvision.models.resnet18(num_classes=10)
    network.conv1 = nn.Conv2d(1, 64, 3, 1, 1, bias=False)
    network.maxpool = nn.Identity()
    for name in ("layer1", "layer2", "layer3", "layer4"):
        setattr(network, name, nn.Sequential(*(nn.Sequential(b, nn.Dropout(dropout)) for b in getattr(network, name))))
    return network


NETWORKS = {"resnet8": ResNet8, "resnet18": resnet18}


# --- training --------------------------------------------------------------------------------------------------------


def make_policy(contents: dict[str, Any], steps: int, per_epoch: int) -> Policy:
    """The policy of an arm for a run of so many steps; its clock is manual, since arms follow one another in a process."""
    schedule = dict(contents["schedule"])
    if schedule.pop("unit", "step") == "epoch":
        schedule["period"] *= per_epoch
    for key in ("warmup", "cooldown"):
        if key in schedule:
            schedule[key] = round(schedule[key] * steps)
            schedule["total"] = steps
    return Policy(**{**contents, "schedule": schedule})


@contextlib.contextmanager
def counting(flops: dict[float, tuple[int, int]], factor: float) -> Iterator[None]:
    """Count the step inside if it is the first at its factor: FLOPs of convolution backwards, and all."""
    if factor in flops:
        yield
        return
    with FlopCounterMode(display=False) as counter:
        yield
    flops[factor] = counter.get_flop_counts()["Global"].get(_BACKWARD, 0), counter.get_total_flops()


def share_of_dense(arm: Arm, regime: Regime, network: str) -> float:
    """FLOPs of the arm's run over those of the dense one, from a counted step at each factor."""
    per_epoch = regime.images // regime.batch
    steps = regime.epochs * per_epoch
    assert arm.policy is not None
    policy = make_policy(arm.policy, steps, per_epoch)
    model = ssprop_fx.transform(NETWORKS[network](arm.dropout, regime.widths), policy)
    images, labels = torch.randn(regime.batch, 1, 28, 28), torch.zeros(regime.batch, dtype=torch.long)
    flops: dict[float, tuple[int, int]] = {}
    for _ in range(steps):
        if policy.factor not in flops:
            with counting(flops, policy.factor):
                F.cross_entropy(model(images), labels).backward()
        policy.step()
    factors = [policy.schedule.factor(step) for step in range(steps)]
    return sum(flops[factor][1] for factor in factors) / (steps * flops[0.0][1])


load = functools.cache(Images.load)


@functools.cache
def pretrained(name: str, seed: int, network: str, device: str, data: str) -> dict[str, Tensor]:
    """Weights after dense training in the regime ``name``, on the images that a seed draws last."""
    return train(ARMS["dense"], REGIMES[name], seed, network, device, data, last=True)["weights"]


def train(arm: Arm, regime: Regime, seed: int, network: str, device: str, data: str, last: bool = False) -> dict[str, Any]:
    """One run. The result holds the accuracy, that on 2,000 test images at the quarters of the run, FLOPs and seconds.

    Args:
        last: train on the images that the seed draws last, instead of first; the result holds the ``weights``, too.
    """
    images = load(data)
    per_epoch = regime.images // regime.batch
    steps = regime.epochs * per_epoch
    if arm.compute:
        steps = round(steps * share_of_dense(ARMS[arm.compute], regime, network))
    torch.manual_seed(seed)
    model = NETWORKS[network](arm.dropout, regime.widths).to(device, memory_format=torch.channels_last)
    if regime.pretrained:
        model.load_state_dict(pretrained(regime.pretrained, seed, network, device, data))
        torch.manual_seed(seed)
    policy = make_policy(arm.policy, steps, per_epoch) if arm.policy else None
    if policy is not None:
        model = ssprop_fx.transform(model, policy)
    optimizer = torch.optim.Adam(model.parameters(), lr=regime.rate)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, regime.rate, total_steps=steps)

    drawn = torch.Generator().manual_seed(seed)
    permuted = torch.randperm(len(images.train), generator=drawn)
    chosen = permuted[-regime.images :] if last else permuted[: regime.images]
    flops: dict[float, tuple[int, int]] = {}
    factors: list[float] = []
    curve: list[dict[str, Any]] = []
    seconds = wall = 0.0
    losses: list[float] = []
    for step in range(steps):
        if step % per_epoch == 0:
            order = chosen[torch.randperm(len(chosen), generator=drawn)]
        index = order[step % per_epoch * regime.batch :][: regime.batch]
        batch = images.train[index].to(device, memory_format=torch.channels_last)
        labels = images.train_labels[index].to(device)
        factor = policy.factor if policy else 0.0
        cpu, start, first = time.process_time(), time.perf_counter(), factor not in flops
        with counting(flops, factor):
            with torch.autocast(device, torch.bfloat16, enabled=arm.amp):
                loss = F.cross_entropy(model(batch), labels)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())  # waits for the device
        if not first:
            seconds += time.process_time() - cpu
            wall += time.perf_counter() - start
        rates.step()
        factors.append(factor)
        if policy:
            policy.step()
        if step + 1 < steps and (step + 1) * 4 // steps > step * 4 // steps:
            curve.append(
                {
                    "step": step + 1,
                    "accuracy": accuracy(model, images.test[:2000], images.test_labels[:2000], device),
                    "conv_backward_flops": sum(flops[f][0] for f in factors),
                    "cpu_seconds": seconds,
                }
            )
    timed = len(factors) / (len(factors) - len(flops))  # the counted steps are not timed
    return {
        "arm": arm.title,
        "policy": policy.to_dict() if policy else None,
        "dropout": arm.dropout,
        "amp": arm.amp,
        "regime": regime.to_dict(),
        "network": network,
        "seed": seed,
        "steps": steps,
        "test_accuracy": accuracy(model, images.test, images.test_labels, device),
        "train_accuracy": accuracy(model, images.train[chosen[:2000]], images.train_labels[chosen[:2000]], device),
        "train_loss": sum(losses[-per_epoch:]) / per_epoch,
        "conv_backward_flops": sum(flops[f][0] for f in factors),
        "all_flops": sum(flops[f][1] for f in factors),
        "cpu_seconds": seconds * timed,
        "wall_seconds": wall * timed,
        "curve": curve,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "ssprop_fx": ssprop_fx.__version__,
        **({"weights": {name: value.clone() for name, value in model.state_dict().items()}} if last else {}),
    }


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor, device: str) -> float:
    """Share of the images that the model, in evaluation mode, gets right; it is in training mode afterwards."""
    model.eval()
    right = sum(
        int((model(part.to(device)).argmax(1).cpu() == truth).sum())
        for part, truth in zip(images.split(500), labels.split(500), strict=True)
    )
    model.train()
    return right / len(images)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="fashion-mnist", help="that, or a folder of its four idx files")
    parser.add_argument("--regimes", default=",".join(REGIMES))
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--network", choices=NETWORKS, default="resnet8")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--images", type=int, help="of the training images, instead of the regime's")
    parser.add_argument("--epochs", type=int, help="instead of the regime's")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results", help="where the JSON files are")
    parser.add_argument("--report", action="store_true", help="write the page from the JSON files; train nothing")
    options = parser.parse_args()
    if options.report:
        from accuracy_report import write

        write(options.out, ROOT / "docs" / "results.md", list(ARMS))
        return
    options.out.mkdir(parents=True, exist_ok=True)
    changed = {key: value for key in ("images", "epochs") if (value := getattr(options, key))}
    for name in options.regimes.split(","):
        regime = replace(REGIMES[name], **changed)
        if options.network == "resnet18" and regime.widths != Regime.widths:
            print(f"{name}: left out, resnet18 comes in one width", flush=True)
            continue
        for seed in map(int, options.seeds.split(",")):
            for arm in options.arms.split(","):
                path = options.out / f"{name}-{arm}-{seed}.json"
                if path.exists():
                    continue
                result = train(ARMS[arm], regime, seed, options.network, options.device, options.data)
                part = path.with_suffix(".part")
                part.write_text(json.dumps(result, indent=1) + "\n")
                part.rename(path)
                print(f"{path.name}: {100 * result['test_accuracy']:.2f} %, {result['cpu_seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    main()
