"""What ``ssprop-fx demo`` does: one small network on real images, trained dense and under a policy, side by side.

Both models start from the same weights and see the same batches in the same order. Their steps take turns, in an order
drawn by lot, so that whatever else the machine does falls on both.
"""

from __future__ import annotations

import contextlib
import copy
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from ._compat import fake_mode_of
from .inspection import Report, inspect
from .policy import Policy
from .transform import transform

BATCH = 64
EPOCHS = 20
_RATE, _DECAY, _SMOOTHING = 3e-3, 0.05, 0.1
_BACKWARD = torch.ops.aten.convolution_backward

Progress = Callable[[int, int, str], None]  # steps done, steps in all, a line on how it goes


class Block(nn.Module):
    """Two 3×3 convolutions and a shortcut: (N, C, H, W) → (N, K, H/stride, W/stride)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """A ResNet of one block per stage for one-channel images: (N, 1, H, W) → (N, 10)."""

    def __init__(self, widths: tuple[int, ...] = (64, 128, 256)) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, widths[0], 3, padding=1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU())
        inputs = (widths[0], *widths[:-1])
        self.stages = nn.Sequential(*(Block(c, k, 1 if c == k else 2) for c, k in zip(inputs, widths, strict=True)))
        self.head = nn.Linear(widths[-1], 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stages(self.stem(x)).mean((2, 3)))


@dataclass(frozen=True)
class Digits:
    """scikit-learn's digits: images (N, 1, 8, 8) of mean 0 and deviation 1, labels (N,)."""

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    @classmethod
    def load(cls, seed: int, train: int = 1280) -> Digits:
        """The 1797 images, ``train`` of them to train on, split by ``seed``."""
        from sklearn.datasets import load_digits

        raw = load_digits()
        images = torch.tensor(raw.images, dtype=torch.float32).unsqueeze(1)
        images = (images - images.mean()) / images.std()
        labels = torch.tensor(raw.target)
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
        fit, test = order[:train], order[train:]
        return cls(images[fit], labels[fit], images[test], labels[test])


@dataclass(frozen=True)
class Outcome:
    """How one of the two models did.

    Attributes:
        accuracy: share of the test images that it gets right.
        conv_flops: FLOPs of the convolution backward passes of all steps.
        step_flops: FLOPs of all steps, forward and backward.
        step_ms: factor → median time of a step, in milliseconds; the dense model's factor is 0.
        mean_ms: mean over the steps of the median of their factor.
    """

    accuracy: float
    conv_flops: int
    step_flops: int
    step_ms: dict[float, float]
    mean_ms: float

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, for JSON."""
        return vars(self) | {"step_ms": {f"{factor:g}": ms for factor, ms in self.step_ms.items()}}


@dataclass(frozen=True)
class Result:
    """Both outcomes, what they were measured on, and what was rewritten, at the last step of the highest factor."""

    dense: Outcome
    sparse: Outcome
    setting: dict[str, Any]
    report: Report

    @property
    def conv_flops_saved(self) -> float:
        """Share of the convolution backward FLOPs that the policy saved."""
        return 1 - self.sparse.conv_flops / self.dense.conv_flops

    @property
    def step_flops_saved(self) -> float:
        """Share of all FLOPs that the policy saved."""
        return 1 - self.sparse.step_flops / self.dense.step_flops

    @property
    def time_saved(self) -> float:
        """Share of the time that the policy saved."""
        return 1 - self.sparse.mean_ms / self.dense.mean_ms

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, numbers and strings, for JSON."""
        return {
            "setting": self.setting,
            "dense": self.dense.to_dict(),
            "policy": self.sparse.to_dict(),
            "saved": {
                "conv_flops": self.conv_flops_saved,
                "step_flops": self.step_flops_saved,
                "time": self.time_saved,
            },
            "report": self.report.to_dict(),
        }


class Trainee:
    """A model with its optimizer, and what was measured of its steps.

    Args:
        module: to train; evaluated as it is, whatever runs it.
        run: what a step calls: the module, or the module compiled.
        steps: of training in all.
        count: what tells the FLOPs of a step that has just been made; None to run the step under a counter.
    """

    def __init__(
        self, module: nn.Module, run: Callable[[Tensor], Tensor], steps: int, count: Callable[[], int] | None = None
    ) -> None:
        self.module, self.run, self.count = module, run, count
        self.optimizer = torch.optim.AdamW(module.parameters(), lr=_RATE, weight_decay=_DECAY)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, _RATE, total_steps=steps)
        self.flops: dict[float, int] = {}
        self.seconds: dict[float, list[float]] = {}
        self.factors: list[float] = []
        self.loss = 0.0

    def step(self, images: Tensor, labels: Tensor, factor: float) -> None:
        """One training step. The first at each factor compiles and is counted; the others are timed."""
        first = factor not in self.flops
        counter = FlopCounterMode(display=False) if first and self.count is None else None
        start = time.perf_counter()
        with counter or contextlib.nullcontext():
            loss = F.cross_entropy(self.run(images), labels, label_smoothing=_SMOOTHING)
            loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.loss = loss.item()
        seconds = time.perf_counter() - start
        if first:
            self.flops[factor] = self.count() if self.count else counter.get_total_flops()  # type: ignore[union-attr]
            self.seconds[factor] = []
        else:
            self.seconds[factor].append(seconds)
        self.factors.append(factor)
        self.schedule.step()

    @torch.no_grad()
    def outcome(self, digits: Digits, other_flops: int) -> Outcome:
        """Evaluate, and sum up; ``other_flops`` of a step are not for a backward pass of a convolution."""
        self.module.eval()
        right = self.module(digits.test_images).argmax(1) == digits.test_labels
        step_ms = {f: 1e3 * statistics.median(s) for f, s in self.seconds.items() if s}
        timed = [step_ms[f] for f in self.factors if f in step_ms]
        return Outcome(
            right.float().mean().item(),
            sum(self.flops[f] - other_flops for f in self.factors),
            sum(self.flops[f] for f in self.factors),
            step_ms,
            statistics.mean(timed) if timed else float("nan"),
        )


def train(
    policy: Policy,
    seed: int = 0,
    epochs: int = EPOCHS,
    compiled: bool = False,
    progress: Progress = lambda done, total, line: None,
) -> Result:
    """Train the network dense and under ``policy``; compiled through Inductor and the backend ``ssprop``, if so asked.

    Raises:
        SSPropError: the policy does not fit the network.
        ModuleNotFoundError: scikit-learn is not installed.
    """
    digits = Digits.load(seed)
    # Two optimizers step in this process, and `clock: optimizer` would count both.
    policy.load_state_dict({**policy.state_dict(), "clock": "manual"})
    torch.manual_seed(seed)
    network = ResNet()
    batches = len(digits.images) // BATCH
    steps = epochs * batches
    conv_flops, forward_flops, all_flops = _dense_flops(network, digits.images[:BATCH], digits.labels[:BATCH])
    twin = copy.deepcopy(network)
    if compiled:
        dense = Trainee(network, torch.compile(network, fullgraph=True), steps, lambda: all_flops)
        run: Any = torch.compile(twin, backend="ssprop", fullgraph=True, options={"policy": policy})  # type: ignore[dict-item]
        sparse = Trainee(twin, run, steps, lambda: forward_flops + _lowered_flops(run, policy, all_flops - forward_flops))
    else:
        run = transform(twin, policy)
        dense, sparse = Trainee(network, network, steps, lambda: all_flops), Trainee(run, run, steps)

    factor_at = policy.schedule.quantized_factor if compiled else policy.schedule.factor
    shuffle, lot = torch.Generator().manual_seed(seed), random.Random(seed)
    for step in range(steps):
        if step % batches == 0:
            order = torch.randperm(len(digits.images), generator=shuffle)
        index = order[step % batches * BATCH :][:BATCH]
        images, labels = _shifted(digits.images[index], shuffle), digits.labels[index]
        turns = [(dense, 0.0), (sparse, factor_at(step))]
        lot.shuffle(turns)
        for trainee, factor in turns:
            trainee.step(images, labels, factor)
        policy.step()
        progress(step + 1, steps, f"loss {dense.loss:.3f} dense, {sparse.loss:.3f} policy")
    setting = {
        "parameters": sum(p.numel() for p in network.parameters()),
        "images": len(digits.images),
        "test_images": len(digits.test_images),
        "steps": steps,
        "batch": BATCH,
        "seed": seed,
        "compiled": compiled,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "policy": policy.to_dict(),
    }
    other_flops = all_flops - conv_flops
    outcomes = dense.outcome(digits, other_flops), sparse.outcome(digits, other_flops)
    last = max(range(steps), key=lambda step: (factor_at(step), step))
    policy.load_state_dict({**policy.state_dict(), "steps": last})
    return Result(*outcomes, setting, inspect(run))


def _dense_flops(network: nn.Module, images: Tensor, labels: Tensor) -> tuple[int, int, int]:
    """FLOPs of a step: of the convolutions' backward passes, of the forward pass, of all."""
    with FlopCounterMode(display=False) as counter:
        loss = F.cross_entropy(copy.deepcopy(network)(images), labels)
        forward = counter.get_total_flops()
        loss.backward()
    return counter.get_flop_counts()["Global"][_BACKWARD], forward, counter.get_total_flops()


def _lowered_flops(compiled: Any, policy: Policy, dense: int) -> int:
    """FLOPs of the backward graph that ran last, counted by running it on tensors without data."""
    graph = inspect(compiled).graphs.get(f"graph 0/backward, factor {policy.quantized_factor:g}")
    if graph is None:  # nothing in it follows the policy
        return dense
    inputs = [node.meta["val"] for node in graph.graph.find_nodes(op="placeholder")]
    with fake_mode_of(inputs), FlopCounterMode(display=False) as counter:
        graph(*inputs)
    return counter.get_total_flops()


def _shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """A batch moved by up to one pixel."""
    x, y = torch.randint(0, 3, (2,), generator=generator).tolist()
    height, width = images.shape[2:]
    return F.pad(images, (1, 1, 1, 1), mode="replicate")[:, :, y : y + height, x : x + width].contiguous()
