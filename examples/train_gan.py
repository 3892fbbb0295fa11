"""Train a generative adversarial network: two networks, each with an optimizer and a policy of its own.

python examples/train_gan.py                                                # 16×16 digits
python examples/train_gan.py --data fashion-mnist --width 64 --discriminator-policy dense
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from images import Images
from torch import nn
from torch.nn import functional as F
from torchvision.utils import save_image
from training import Run, autocast, batches, load_policy, options, prepare, seed_everything, steps_of_an_epoch

LATENT = 64


def generator(width: int, channels: int) -> nn.Sequential:
    """(N, 64, 1, 1) → (N, channels, 16, 16) in [-1, 1]."""
    return nn.Sequential(
        nn.ConvTranspose2d(LATENT, 4 * width, 4, bias=False),
        nn.BatchNorm2d(4 * width),
        nn.ReLU(),
        nn.ConvTranspose2d(4 * width, 2 * width, 4, 2, 1, bias=False),
        nn.BatchNorm2d(2 * width),
        nn.ReLU(),
        nn.ConvTranspose2d(2 * width, channels, 4, 2, 1),
        nn.Tanh(),
    )


def discriminator(width: int, channels: int) -> nn.Sequential:
    """(N, channels, 16, 16) → (N, 1)."""
    return nn.Sequential(
        nn.Conv2d(channels, 2 * width, 4, 2, 1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(2 * width, 4 * width, 4, 2, 1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(4 * width, 1, 4),
        nn.Flatten(),
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = options(__doc__ or "", __file__, epochs=50, rate=2e-4)
    parser.add_argument("--data", default="digits", help="digits, fashion-mnist, cifar10, cifar100, or a folder")
    parser.add_argument("--size", type=int, default=64, help="height and width of a folder's images")
    parser.add_argument("--width", type=int, default=32, help="a quarter of the channels of the widest layers")
    parser.add_argument("--discriminator-policy", help="as --policy; default: the same contents")
    chosen = parser.parse_args(arguments)

    data = Images.load(chosen.data, chosen.size)
    if chosen.short:
        data, chosen.epochs = data.limited(256), min(chosen.epochs, 2)
    seed_everything(chosen.seed)
    low, high = data.train.amin(), data.train.amax()
    real_images = F.interpolate(2 * (data.train - low) / (high - low) - 1, (16, 16), mode="bilinear")
    channels = real_images.shape[1]

    makers, critics = (
        generator(chosen.width, channels).to(chosen.device),
        discriminator(chosen.width, channels).to(chosen.device),
    )
    # one clock for each network: a shared one would advance twice in an iteration
    per_epoch = steps_of_an_epoch(len(real_images), chosen.batch)
    steps = chosen.epochs * per_epoch
    make_policy = load_policy(chosen.policy, steps)
    judge_policy = load_policy(chosen.discriminator_policy or chosen.policy, steps)
    make, judge = prepare(makers, make_policy, chosen.compile), prepare(critics, judge_policy, chosen.compile)
    make_optimizer = torch.optim.Adam(makers.parameters(), chosen.rate, betas=(0.5, 0.999))
    judge_optimizer = torch.optim.Adam(critics.parameters(), chosen.rate, betas=(0.5, 0.999))

    parts = {
        "generator": makers,
        "discriminator": critics,
        "generator_optimizer": make_optimizer,
        "discriminator_optimizer": judge_optimizer,
        "generator_policy": make_policy,
        "discriminator_policy": judge_policy,
    }
    run = Run(chosen, per_epoch, parts)
    for step in run:
        real = real_images[batches(len(real_images), chosen.batch, step, chosen.seed)].to(chosen.device)
        latent = torch.randn(chosen.batch, LATENT, 1, 1).to(chosen.device)
        with autocast(chosen):
            made = make(latent)
            judge_loss = F.softplus(-judge(real)).mean() + F.softplus(judge(made.detach())).mean()
        judge_loss.backward()
        judge_optimizer.step()
        judge_optimizer.zero_grad()
        with autocast(chosen):
            make_loss = F.softplus(-judge(made)).mean()
        make_loss.backward()
        make_optimizer.step()
        make_optimizer.zero_grad()
        judge_optimizer.zero_grad()  # the generator's loss has reached the discriminator's weights, too
        for policy in filter(None, (make_policy, judge_policy)):  # at the end: both of an iteration's passes are in one phase
            policy.step()
        run.add(generator_loss=make_loss.detach(), discriminator_loss=judge_loss.detach())
        if run.ends_epoch:
            makers.eval()
            with torch.no_grad():
                fixed = torch.randn(32, LATENT, 1, 1, generator=torch.Generator().manual_seed(0))
                save_image(makers(fixed.to(chosen.device)) / 2 + 0.5, chosen.out / f"samples-{run.epoch:03}.png")
            makers.train()
            run.log()


if __name__ == "__main__":
    main()
