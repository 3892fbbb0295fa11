"""Segment generated volumes, balls and boxes in noise, with a 3-d U-Net of monai under a policy.

python examples/segment_volume.py
python examples/segment_volume.py --size 48 --volumes 200 --epochs 40 --amp --compile
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from monai.networks.nets import UNet
from torch import Tensor, nn
from torch.nn import functional as F
from training import Run, autocast, batches, load_policy, options, prepare, seed_everything, steps_of_an_epoch


def volumes(count: int, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Volumes (N, 1, size, size, size), and the class of each voxel (N, size, size, size): nothing, ball or box."""
    drawn = torch.Generator().manual_seed(seed)
    grid = torch.stack(torch.meshgrid(*[torch.arange(size)] * 3, indexing="ij"))
    labels = torch.zeros(count, size, size, size, dtype=torch.long)
    for volume in labels:
        for kind in (1, 2):
            centre = torch.randint(size // 4, 3 * size // 4, (3, 1, 1, 1), generator=drawn)
            radius = int(torch.randint(size // 8, size // 4 + 1, (1,), generator=drawn))
            apart = (grid - centre).abs()
            volume[apart.square().sum(0) <= radius**2 if kind == 1 else apart.amax(0) <= radius * 3 // 4] = kind
    images = (labels > 0).float() + 0.5 * torch.randn(labels.shape, generator=drawn)
    return images.unsqueeze(1), labels


def dice(scores: Tensor, labels: Tensor) -> Tensor:
    """Overlap of each class but the first, 2·|A∩B| / (|A|+|B|), of probabilities (N, classes, ...)."""
    truth = F.one_hot(labels, scores.shape[1]).movedim(-1, 1)
    dims = [0, *range(2, scores.dim())]
    return ((2 * (scores * truth).sum(dims) + 1) / (scores.sum(dims) + truth.sum(dims) + 1))[1:]


@torch.no_grad()
def evaluate(model: nn.Module, images: Tensor, labels: Tensor, device: str) -> float:
    """Mean overlap of the classes that the model chooses."""
    model.eval()
    chosen = torch.cat([model(part.to(device)).argmax(1).cpu() for part in images.split(4)])
    model.train()
    return dice(F.one_hot(chosen, 3).movedim(-1, 1).float(), labels).mean().item()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = options(__doc__ or "", __file__, epochs=20, batch=4)
    parser.add_argument("--volumes", type=int, default=64, help="to train on; an eighth as many to test with")
    parser.add_argument("--size", type=int, default=32, help="of a volume, in voxels each way")
    chosen = parser.parse_args(arguments)
    if chosen.short:
        chosen.volumes, chosen.size, chosen.epochs = 8, 16, min(chosen.epochs, 2)

    images, labels = volumes(chosen.volumes, chosen.size, chosen.seed)
    test_images, test_labels = volumes(max(chosen.volumes // 8, 4), chosen.size, chosen.seed + 1)
    seed_everything(chosen.seed)
    per_epoch = steps_of_an_epoch(len(images), chosen.batch)
    policy = load_policy(chosen.policy, chosen.epochs * per_epoch)
    model = UNet(spatial_dims=3, in_channels=1, out_channels=3, channels=(16, 32, 64), strides=(2, 2), num_res_units=1)
    model = model.to(chosen.device)
    forward = prepare(model, policy, chosen.compile)
    optimizer = torch.optim.AdamW(model.parameters(), lr=chosen.rate)

    run = Run(chosen, per_epoch, {"model": model, "optimizer": optimizer, "policy": policy})
    for step in run:
        index = batches(len(images), chosen.batch, step, chosen.seed)
        volume, truth = images[index].to(chosen.device), labels[index].to(chosen.device)
        with autocast(chosen):
            scores = forward(volume)
            loss = F.cross_entropy(scores, truth) + 1 - dice(scores.softmax(1), truth).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        run.add(loss=loss.detach())
        if policy:
            run.add(factor=policy.factor)
            policy.step()
        if run.ends_epoch:
            run.log(dice=evaluate(model, test_images, test_labels, chosen.device))


if __name__ == "__main__":
    main()
