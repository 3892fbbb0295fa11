"""Train a denoising diffusion model under a policy; sample grids are written as PNG after every epoch.

python examples/train_ddpm.py                                          # 8×8 digits
python examples/train_ddpm.py --data fashion-mnist --width 64 --epochs 20 --amp --device cuda
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import DDPMScheduler, UNet2DModel
from images import Images
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.utils import save_image
from training import Run, autocast, batches, load_policy, options, prepare, seed_everything, steps_of_an_epoch


def scaled(images: Tensor) -> Tensor:
    """Images (N, C, H, W) from -1 to 1, padded to a height and width that the network halves three times."""
    low, high = images.amin(), images.amax()
    images = 2 * (images - low) / (high - low) - 1
    return F.pad(images, [p for side in images.shape[:1:-1] for p in (-side % 8 // 2, (-side % 8 + 1) // 2)], value=-1)


def build(width: int, channels: int, size: int) -> UNet2DModel:
    """A U-Net of three levels with attention in the last."""
    return UNet2DModel(
        sample_size=size,
        in_channels=channels,
        out_channels=channels,
        layers_per_block=1,
        block_out_channels=(width, 2 * width, 2 * width),
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
    )


@torch.no_grad()
def sample(model: nn.Module, noise: DDPMScheduler, shape: Sequence[int], steps: int, device: str) -> Tensor:
    """Images of a shape (N, C, H, W) in [0, 1]; the same noise every time, and no other generator is touched."""
    generator = torch.Generator().manual_seed(0)
    model.eval()
    x = torch.randn(shape, generator=generator).to(device)
    noise.set_timesteps(steps)
    for t in noise.timesteps:
        x = noise.step(model(x, t).sample.cpu(), t, x.cpu(), generator=generator).prev_sample.to(device)
    model.train()
    return (x.cpu() / 2 + 0.5).clamp(0, 1)


def write_grid(images: Tensor, path: Path) -> None:
    """The images as rows of eight."""
    save_image(F.interpolate(images, scale_factor=4), path, nrow=8)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = options(__doc__ or "", __file__, epochs=50, rate=1e-3)
    parser.add_argument("--data", default="digits", help="digits, fashion-mnist, cifar10, cifar100, or a folder")
    parser.add_argument("--size", type=int, default=64, help="height and width of a folder's images")
    parser.add_argument("--width", type=int, default=32, help="channels of the first level")
    parser.add_argument("--timesteps", type=int, default=1000, help="of the diffusion")
    parser.add_argument("--sampling-steps", type=int, default=100)
    chosen = parser.parse_args(arguments)

    data = Images.load(chosen.data, chosen.size)
    if chosen.short:
        data, chosen.epochs, chosen.sampling_steps = data.limited(256), min(chosen.epochs, 2), 5
    seed_everything(chosen.seed)
    images = scaled(data.train)
    channels, size = images.shape[1], images.shape[-1]
    per_epoch = steps_of_an_epoch(len(images), chosen.batch)
    policy = load_policy(chosen.policy, chosen.epochs * per_epoch)
    model = build(chosen.width, channels, size).to(chosen.device)
    forward = prepare(model, policy, chosen.compile)
    noise = DDPMScheduler(num_train_timesteps=chosen.timesteps)
    optimizer = torch.optim.AdamW(model.parameters(), lr=chosen.rate)

    run = Run(chosen, per_epoch, {"model": model, "optimizer": optimizer, "policy": policy})
    for step in run:
        clean = images[batches(len(images), chosen.batch, step, chosen.seed)].to(chosen.device)
        eps = torch.randn(clean.shape).to(chosen.device)
        times = torch.randint(0, chosen.timesteps, (len(clean),)).to(chosen.device)
        with autocast(chosen):
            loss = F.mse_loss(forward(noise.add_noise(clean, eps, times), times).sample, eps)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        run.add(loss=loss.detach())
        if policy:
            run.add(factor=policy.factor)
            policy.step()
        if run.ends_epoch:
            grid = sample(model, noise, (32, channels, size, size), chosen.sampling_steps, chosen.device)
            write_grid(grid, chosen.out / f"samples-{run.epoch:03}.png")
            run.log()


if __name__ == "__main__":
    main()
