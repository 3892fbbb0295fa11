"""The models of the benchmarks, with random weights, and an input for each."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def _torchvision(name: str) -> nn.Module:
    import torchvision

    return torchvision.models.get_model(name, weights=None)


def _unet2d() -> nn.Module:
    import diffusers

    return diffusers.UNet2DModel(
        sample_size=32, block_out_channels=(64, 128, 256, 256), layers_per_block=2, norm_num_groups=32
    )  # fmt: skip


def _unet3d() -> nn.Module:
    import monai

    return monai.networks.nets.BasicUNet(spatial_dims=3, in_channels=1, out_channels=2, features=(32, 32, 64, 128, 256, 32))


# name → (model, shape of its input, further inputs)
MODELS: dict[str, tuple[Callable[[], nn.Module], Sequence[int], Callable[[int], tuple[Any, ...]]]] = {
    "resnet18": (lambda: _torchvision("resnet18"), (16, 3, 128, 128), lambda batch: ()),
    "resnet50": (lambda: _torchvision("resnet50"), (16, 3, 128, 128), lambda batch: ()),
    "mobilenet_v2": (lambda: _torchvision("mobilenet_v2"), (16, 3, 128, 128), lambda batch: ()),
    "convnext_tiny": (lambda: _torchvision("convnext_tiny"), (8, 3, 128, 128), lambda batch: ()),
    "unet2d": (_unet2d, (8, 3, 32, 32), lambda batch: (torch.arange(batch) * 100 % 1000,)),
    "unet3d": (_unet3d, (1, 1, 64, 64, 64), lambda batch: ()),
}


def build(
    name: str, batch: int | None = None, size: int | None = None, contiguous: bool = False, device: str = "cpu"
) -> tuple[nn.Module, tuple[Any, ...]]:
    """Model, in training mode, and inputs, channels-last unless ``contiguous``.

    Args:
        name: of :data:`MODELS`, or what the command ``ssprop-fx`` takes for a model (with 3-channel images then).
        batch, size: of the input; the model's own without.
    """
    torch.manual_seed(0)
    if name in MODELS:
        make, shape, more = MODELS[name]
        model = make()
    else:
        from ssprop_fx.models import load_model

        model, shape, more = load_model(name), (16, 3, 128, 128), lambda batch: ()
    shape = (batch or shape[0], shape[1], *(size or s for s in shape[2:]))
    last = torch.channels_last_3d if len(shape) == 5 else torch.channels_last
    layout = torch.contiguous_format if contiguous else last

    def place(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    inputs = (torch.randn(shape).contiguous(memory_format=layout), *more(shape[0]))
    return model.to(device=device, memory_format=layout).train(), tuple(map(place, inputs))


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of a command for what :func:`build` is to build."""
    parser.add_argument("--model", default="resnet18", help=", ".join(MODELS) + "; or torchvision:NAME")
    parser.add_argument("--batch", type=int, help="of the inputs; the model's own choice without")
    parser.add_argument("--size", type=int, help="length of every spatial dimension")
