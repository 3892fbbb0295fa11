"""A diffusion model trained densely, under the default policy, and densely at the policy's compute: loss, samples, distance.

    python benchmarks/diffusion.py                     # all runs that are not in docs/results yet, on the digits
    python benchmarks/diffusion.py --arms dense,step --seeds 0

Each run is one of ``examples/train_ddpm.py``. Afterwards: the loss on test images with noise and times that are the same for
all; 512 samples, the first 32 as a grid; and their Fréchet distance to the test images in the features of a small
classifier of the same digits, by torchmetrics. That is no FID that could be compared with published ones, which need the
weights of Inception; it orders runs on the same data. FLOPs are counted on a dense and on a sparse step.
"""

from __future__ import annotations

import argparse
import functools
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ssprop_fx
from ssprop_fx import Policy

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))
import train_ddpm  # noqa: E402
from diffusers import DDPMScheduler  # noqa: E402
from images import Images  # noqa: E402

TITLES = {
    "dense": "dense",
    "step": "bar 0.8 per step (the default)",
    "equal": "dense at the compute of bar 0.8",
}


def step_flops(images: Tensor, width: int, batch: int) -> dict[str, tuple[int, int]]:
    """(FLOPs of convolution backwards, all FLOPs) of a ``dense`` and of a ``sparse`` step."""
    policy = Policy(schedule={"kind": "bar", "period": 2})
    model = ssprop_fx.transform(train_ddpm.build(width, images.shape[1], images.shape[-1]), policy)
    inputs = {"sample": images[:batch], "timestep": torch.zeros(batch, dtype=torch.long)}
    report = ssprop_fx.inspect(model, inputs)
    found = {}
    for name, at in (("dense", report.at(0)), ("sparse", report.at(1))):
        assert at.conv_flops is not None
        assert at.step_flops is not None
        found[name] = int(at.conv_flops["now"]), int(at.step_flops["now"])
    return found


@torch.no_grad()
def test_loss(model: nn.Module, images: Tensor) -> float:
    """Mean square error of the predicted noise, at noise and times that a fixed seed draws ten times for every image."""
    generator, scheduler = torch.Generator().manual_seed(0), DDPMScheduler(num_train_timesteps=1000)
    losses = []
    for _ in range(10):
        noise = torch.randn(images.shape, generator=generator)
        times = torch.randint(0, 1000, (len(images),), generator=generator)
        losses.append(F.mse_loss(model(scheduler.add_noise(images, noise, times), times).sample, noise).item())
    return sum(losses) / len(losses)


@functools.cache
@torch.enable_grad()
def classifier(data: str) -> nn.Module:
    """A small network that tells the images' classes; without its last layer, it gives 64 features, in double precision."""
    images = Images.load(data)
    torch.manual_seed(0)
    body = nn.Sequential(
        nn.Conv2d(images.train.shape[1], 32, 3, padding=1), nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, stride=2, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )  # fmt: skip
    model, inputs = nn.Sequential(body, nn.Linear(64, 10)), train_ddpm.scaled(images.train)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(30):
        for index in torch.randperm(len(inputs)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(inputs[index]), images.train_labels[index]).backward()
            optimizer.step()
    right = (model(train_ddpm.scaled(images.test)).argmax(1) == images.test_labels).float().mean()
    print(f"the classifier whose features are compared gets {right:.1%} of the test images right")
    return body.eval()


class Features(nn.Module):
    """What torchmetrics asks of a feature extractor."""

    num_features = 64

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, images: Tensor) -> Tensor:
        return self.body(images).double()


@torch.no_grad()
def distance(samples: Tensor, images: Tensor, data: str) -> float:
    """Fréchet distance of two sets of images (N, C, H, W) from -1 to 1 in the classifier's features."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(Features(classifier(data)), normalize=True, input_img_size=tuple(images.shape[1:]))
    metric.update(images, real=True)
    metric.update(samples, real=False)
    return float(metric.compute())


def run(arm: str, seed: int, chosen: argparse.Namespace, images: Images, grid: Path) -> dict[str, Any]:
    """Train, sample, measure."""
    train, test = train_ddpm.scaled(images.train), train_ddpm.scaled(images.test)
    per_epoch, flops = len(train) // chosen.batch, step_flops(train, chosen.width, chosen.batch)
    epochs = chosen.epochs
    if arm == "equal":
        epochs = round(epochs * (flops["dense"][1] + flops["sparse"][1]) / 2 / flops["dense"][1])
    steps = epochs * per_epoch
    policy = Policy(schedule={"kind": "bar", "period": 2}) if arm == "step" else None
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["--data", chosen.data, "--epochs", str(epochs), "--seed", str(seed), "--out", folder]
        arguments += ["--batch", str(chosen.batch), "--width", str(chosen.width), "--policy", "dense"]
        if policy is not None:
            file = Path(folder, "policy.json")  # JSON is YAML, too
            file.write_text(json.dumps(policy.to_dict()))
            arguments[-1] = str(file)
        cpu = time.process_time()
        train_ddpm.main([*arguments, "--sampling-steps", "10"])
        seconds = time.process_time() - cpu
        log = [json.loads(line) for line in Path(folder, "log.jsonl").read_text().splitlines()]
        state = torch.load(Path(folder, "checkpoint.pt"), weights_only=True)["model"]
    model = train_ddpm.build(chosen.width, train.shape[1], train.shape[-1])
    model.load_state_dict(state)
    noise, shape = DDPMScheduler(num_train_timesteps=1000), (512, *train.shape[1:])
    samples = train_ddpm.sample(model, noise, shape, 100, "cpu")
    train_ddpm.write_grid(samples[:32], grid)
    model.eval()
    sparse = sum(policy.schedule.factor(step) > 0 for step in range(steps)) if policy else 0
    return {
        "arm": TITLES[arm], "policy": policy.to_dict() if policy else None, "data": chosen.data, "seed": seed,
        "width": chosen.width, "batch": chosen.batch, "epochs": epochs, "steps": steps,
        "train_loss": log[-1]["loss"], "test_loss": test_loss(model, test),
        "distance": distance(2 * samples - 1, test, chosen.data),
        "conv_backward_flops": sparse * flops["sparse"][0] + (steps - sparse) * flops["dense"][0],
        "all_flops": sparse * flops["sparse"][1] + (steps - sparse) * flops["dense"][1],
        "cpu_seconds": seconds, "torch": torch.__version__, "ssprop_fx": ssprop_fx.__version__,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits")
    parser.add_argument("--arms", default=",".join(TITLES))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results" / "ddpm")
    chosen = parser.parse_args()
    chosen.out.mkdir(parents=True, exist_ok=True)
    images = Images.load(chosen.data)
    for seed in map(int, chosen.seeds.split(",")):
        for arm in chosen.arms.split(","):
            path = chosen.out / f"{arm}-{seed}.json"
            if not path.exists():
                grid = Path(tempfile.mkdtemp()) / "grid.png"
                result = run(arm, seed, chosen, images, grid)
                path.write_text(json.dumps(result, indent=1) + "\n")
                if seed == 0:
                    shutil.copy(grid, chosen.out / f"{arm}.png")
                print(f"{path.name}: test loss {result['test_loss']:.5f}, distance {result['distance']:.3f}", flush=True)


if __name__ == "__main__":
    main()
