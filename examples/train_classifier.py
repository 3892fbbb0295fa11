"""Train an image classifier under a policy.

python examples/train_classifier.py                                        # a small ResNet on digits
python examples/train_classifier.py --data fashion-mnist --epochs 15 --amp
python examples/train_classifier.py --data cifar10 --model torchvision:resnet18 --epochs 30 --compile
python examples/train_classifier.py --data FOLDER --model timm:convnext_atto --policy policy.yaml --resume
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from images import Images, shifted
from torch import nn
from torch.nn import functional as F
from training import Run, autocast, batches, load_policy, options, prepare, seed_everything, steps_of_an_epoch

from ssprop_fx.demo import ResNet


def build(name: str, channels: int, classes: int, dropout: float) -> nn.Module:
    """``small``, the ResNet of the demo in a quarter of its width, or a model of torchvision or timm.

    Raises:
        SystemExit: no such model.
    """
    library, _, model = name.partition(":")
    if name == "small":
        network = ResNet((16, 32, 64))
        network.stem[0] = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        network.head = nn.Linear(64, classes)
        network.stages = nn.Sequential(*(nn.Sequential(stage, nn.Dropout(dropout)) for stage in network.stages))
        return network
    if library == "timm":
        import timm

        return timm.create_model(model, num_classes=classes, in_chans=channels, drop_rate=dropout)
    if library == "torchvision":
        import torchvision

        return torchvision.models.get_model(model, weights=None, num_classes=classes)
    raise SystemExit(f"--model {name}: expected small, torchvision:NAME or timm:NAME")


@torch.no_grad()
def accuracy(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, device: str) -> float:
    """Share of the images that the model gets right."""
    model.eval()
    right = sum(
        int((model(part.to(device)).argmax(1).cpu() == truth).sum())
        for part, truth in zip(images.split(256), labels.split(256), strict=True)
    )
    model.train()
    return right / len(images)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = options(__doc__ or "", __file__, epochs=20)
    parser.add_argument("--data", default="digits", help="digits, fashion-mnist, cifar10, cifar100, or a folder")
    parser.add_argument("--size", type=int, default=64, help="height and width of a folder's images")
    parser.add_argument("--model", default="small", help="small, torchvision:NAME or timm:NAME")
    parser.add_argument("--dropout", type=float, default=0.0)
    chosen = parser.parse_args(arguments)

    data = Images.load(chosen.data, chosen.size)
    if chosen.short:
        data, chosen.epochs = data.limited(256), min(chosen.epochs, 2)
    if chosen.model.startswith("torchvision:") and data.train.shape[1] == 1:  # these take colour images
        data = Images(data.train.expand(-1, 3, -1, -1), data.train_labels, data.test.expand(-1, 3, -1, -1), data.test_labels)

    seed_everything(chosen.seed)
    per_epoch = steps_of_an_epoch(len(data.train), chosen.batch)
    policy = load_policy(chosen.policy, chosen.epochs * per_epoch)
    model = build(chosen.model, data.train.shape[1], data.classes, chosen.dropout)
    model = model.to(chosen.device, memory_format=torch.channels_last)
    forward = prepare(model, policy, chosen.compile)
    optimizer = torch.optim.AdamW(model.parameters(), lr=chosen.rate, weight_decay=0.05)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, chosen.rate, total_steps=chosen.epochs * per_epoch)

    run = Run(chosen, per_epoch, {"model": model, "optimizer": optimizer, "rates": rates, "policy": policy})
    for step in run:
        index = batches(len(data.train), chosen.batch, step, chosen.seed)
        images, labels = shifted(data.train[index], 1).to(chosen.device), data.train_labels[index].to(chosen.device)
        with autocast(chosen):
            loss = F.cross_entropy(forward(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        rates.step()
        run.add(loss=loss.detach())
        if policy:
            run.add(factor=policy.factor)
            policy.step()
        if run.ends_epoch:
            run.log(accuracy=accuracy(model, data.test, data.test_labels, chosen.device))


if __name__ == "__main__":
    main()
