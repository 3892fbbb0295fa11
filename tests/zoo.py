"""Models of six libraries, with random weights and small inputs: the development suite of docs/design.md, and forty more.

At most three belong to a model family. ``python tests/zoo.py docs/models.md`` writes the table of docs/models.md.
"""

from __future__ import annotations

import argparse
import copy
import functools
import gc
import importlib
import importlib.metadata
import itertools
import os
import pickle
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import ssprop_fx
from ssprop_fx import Policy
from ssprop_fx.steps import tensors_of


@dataclass(frozen=True)
class Model:
    """A model to test on.

    Attributes:
        name: unique, for test ids and the table.
        family: what it descends from; at most three models share one.
        library: the distribution's import name; tests skip where it is missing.
        make: builds it with random weights.
        inputs: makes its positional arguments.
    """

    name: str
    family: str
    library: str
    make: Callable[[], nn.Module]
    inputs: Callable[[], tuple]

    def build(self, seed: int = 0) -> nn.Module:
        """The model in training mode, the same weights for the same seed."""
        torch.manual_seed(seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return self.make().train()

    def arguments(self, seed: int = 0) -> tuple:
        """Inputs, the same for the same seed."""
        torch.manual_seed(seed)
        return self.inputs()


def _make(path: str, *args: Any, **kwargs: Any) -> Callable[[], nn.Module]:
    """A maker that imports what it needs when it is called: ``package.module:name``."""

    def make() -> nn.Module:
        module, name = path.split(":")
        return functools.reduce(getattr, name.split("."), importlib.import_module(module))(*args, **kwargs)

    return make


def _random(*shape: int) -> Callable[[], tuple]:
    return lambda: (torch.randn(shape),)


def _torchvision(name: str, **kwargs: Any) -> Callable[[], nn.Module]:
    return _make("torchvision.models:get_model", name, weights=None, **kwargs)


def _timm(name: str, **kwargs: Any) -> Callable[[], nn.Module]:
    return _make("timm:create_model", name, pretrained=False, **kwargs)


def _monai(name: str, **kwargs: Any) -> Callable[[], nn.Module]:
    return _make(f"monai.networks.nets:{name}", **kwargs)


def _smp(name: str, encoder: str, **kwargs: Any) -> Callable[[], nn.Module]:
    path = f"segmentation_models_pytorch:{name}"
    return _make(path, encoder_name=encoder, encoder_weights=None, in_channels=3, classes=4, **kwargs)


def _diffusers(name: str, **kwargs: Any) -> Callable[[], nn.Module]:
    return _make(f"diffusers:{name}", **kwargs)


class OverTime(nn.Module):
    """A spiking network shown the same picture at every time step, its membranes reset first; outputs are summed.

    Args:
        reset: sets the states of all neurons back.
    """

    def __init__(self, net: nn.Module, reset: Callable[[nn.Module], None], steps: int = 3) -> None:
        super().__init__()
        self.net, self.reset, self.steps = net, reset, steps

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, classes)."""
        self.reset(self.net)
        return sum(self.net(x) for _ in range(self.steps))


def _spiking(path: str, multi_step: bool = False, **kwargs: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        from spikingjelly.activation_based import functional, neuron, surrogate

        gc.collect()  # it keeps nets weakly, and Dynamo fails if one that it saw while tracing is collected before the code runs
        neurons = {"spiking_neuron": neuron.LIFNode, "surrogate_function": surrogate.ATan(), "detach_reset": True}
        net = _make(f"spikingjelly.activation_based.model.{path}", **neurons, **kwargs)()
        if multi_step:
            functional.set_step_mode(net, "m")
        return OverTime(net, functional.reset_net, 1 if multi_step else 3)

    return make


def _detection() -> tuple:
    boxes, labels = torch.tensor([[4.0, 4, 40, 44], [10, 12, 60, 60]]), torch.tensor([1, 2])
    return [torch.rand(3, 64, 64) for _ in range(2)], [{"boxes": boxes, "labels": labels} for _ in range(2)]


_DETECTION = {"weights_backbone": None, "min_size": 64, "max_size": 96}
_PICTURE = _random(2, 3, 64, 64)
_VOLUME = _random(1, 1, 32, 32, 32)
_UNET_2D = {
    "sample_size": 16, "in_channels": 4, "out_channels": 4, "layers_per_block": 1, "block_out_channels": (32, 64),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 32, "attention_head_dim": 8, "norm_num_groups": 8,
}  # fmt: skip


def _conditioned() -> tuple:
    return torch.randn(2, 4, 16, 16), torch.tensor([3, 7]), torch.randn(2, 5, 32)


DEVELOPMENT = (
    Model("resnet18", "ResNet", "torchvision", _torchvision("resnet18"), _PICTURE),
    Model("resnext50_32x4d", "ResNet", "torchvision", _torchvision("resnext50_32x4d"), _PICTURE),
    Model(
        "BasicUNet", "U-Net", "monai",
        _monai("BasicUNet", spatial_dims=3, in_channels=1, out_channels=2, features=(8, 8, 16, 16, 32, 8)), _VOLUME,
    ),
    Model(
        "UNet2DConditionModel", "diffusion U-Net", "diffusers", _diffusers("UNet2DConditionModel", **_UNET_2D), _conditioned,
    ),
    Model("tf_efficientnet_cc_b0_4e", "EfficientNet", "timm", _timm("tf_efficientnet_cc_b0_4e"), _PICTURE),
    Model("DeepLabV3Plus", "DeepLab", "segmentation_models_pytorch", _smp("DeepLabV3Plus", "resnet18"), _PICTURE),
    Model("retinanet_resnet50_fpn", "detector", "torchvision", _torchvision("retinanet_resnet50_fpn", **_DETECTION), _detection),
    Model(
        "spiking_resnet18", "spiking ResNet", "spikingjelly",
        _spiking("spiking_resnet:spiking_resnet18", num_classes=10), _random(2, 3, 32, 32),
    ),
)  # fmt: skip


FURTHER = (
    # torchvision
    Model("vgg11_bn", "VGG", "torchvision", _torchvision("vgg11_bn"), _PICTURE),
    Model("mobilenet_v2", "MobileNet", "torchvision", _torchvision("mobilenet_v2"), _PICTURE),
    Model("mobilenet_v3_small", "MobileNet", "torchvision", _torchvision("mobilenet_v3_small"), _PICTURE),
    Model("densenet121", "DenseNet", "torchvision", _torchvision("densenet121"), _PICTURE),
    Model("squeezenet1_1", "SqueezeNet", "torchvision", _torchvision("squeezenet1_1"), _PICTURE),
    Model("shufflenet_v2_x0_5", "ShuffleNet", "torchvision", _torchvision("shufflenet_v2_x0_5"), _PICTURE),
    Model("googlenet", "Inception", "torchvision", _torchvision("googlenet", init_weights=False), _PICTURE),
    Model("swin_t", "Swin", "torchvision", _torchvision("swin_t"), _PICTURE),
    Model("lraspp_mobilenet_v3_large", "MobileNet", "torchvision",
          _torchvision("lraspp_mobilenet_v3_large", weights_backbone=None), _PICTURE),
    Model("maskrcnn_resnet50_fpn", "R-CNN", "torchvision", _torchvision("maskrcnn_resnet50_fpn", **_DETECTION),
          lambda: (_detection()[0], [t | {"masks": torch.ones(2, 64, 64, dtype=torch.uint8)} for t in _detection()[1]])),
    Model("raft_small", "RAFT", "torchvision", _torchvision("raft_small"), lambda: (torch.rand(1, 3, 128, 128), torch.rand(1, 3, 128, 128), 2)),
    Model("r2plus1d_18", "video ResNet", "torchvision", _torchvision("r2plus1d_18"), _random(1, 3, 4, 32, 32)),
    # timm
    Model("nf_regnet_b0", "normaliser-free", "timm", _timm("nf_regnet_b0"), _PICTURE),
    Model("resnetv2_50d_gn", "ResNet v2", "timm", _timm("resnetv2_50d_gn"), _PICTURE),
    Model("mixnet_s", "MixNet", "timm", _timm("mixnet_s"), _PICTURE),
    Model("resnest14d", "ResNeSt", "timm", _timm("resnest14d"), _PICTURE),
    Model("ecaresnet26t", "ECA-ResNet", "timm", _timm("ecaresnet26t"), _PICTURE),
    Model("lambda_resnet26t", "lambda networks", "timm", _timm("lambda_resnet26t", img_size=64), _PICTURE),
    Model("convnextv2_atto", "ConvNeXt", "timm", _timm("convnextv2_atto"), _PICTURE),
    Model("mobilevit_xxs", "MobileViT", "timm", _timm("mobilevit_xxs"), _PICTURE),
    Model("repvgg_a0", "RepVGG", "timm", _timm("repvgg_a0"), _PICTURE),
    Model("resnetblur18", "blur pooling", "timm", _timm("resnetblur18"), _PICTURE),
    Model("vit_tiny_patch16_224", "ViT", "timm", _timm("vit_tiny_patch16_224", img_size=64), _PICTURE),
    # diffusers
    Model("AutoencoderKL", "autoencoder", "diffusers", _diffusers(
        "AutoencoderKL", block_out_channels=(16, 32), norm_num_groups=8, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2), _random(2, 3, 32, 32)),
    Model("AutoencoderKLCogVideoX", "video autoencoder", "diffusers", _diffusers(
        "AutoencoderKLCogVideoX", block_out_channels=(8, 8, 8, 8), norm_num_groups=2, latent_channels=4, layers_per_block=1),
        _random(1, 3, 5, 32, 32)),
    Model("AutoencoderOobleck", "audio autoencoder", "diffusers", _diffusers(
        "AutoencoderOobleck", encoder_hidden_size=8, downsampling_ratios=[2, 4], channel_multiples=[1, 2],
        decoder_channels=8, decoder_input_channels=4, audio_channels=2), _random(1, 2, 256)),
    Model("UNet1DModel", "diffusion U-Net", "diffusers", _diffusers(
        "UNet1DModel", in_channels=2, out_channels=2, block_out_channels=(16, 32, 32), sample_size=64, extra_in_channels=32),
        lambda: (torch.randn(2, 2, 64), torch.tensor([3, 7]))),
    Model("UNet3DConditionModel", "diffusion U-Net", "diffusers", _diffusers(
        "UNet3DConditionModel", sample_size=16, layers_per_block=1, block_out_channels=(32, 64), norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"), up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        cross_attention_dim=32, attention_head_dim=8),
        lambda: (torch.randn(1, 4, 3, 16, 16), torch.tensor([3]), torch.randn(1, 5, 32))),
    # monai
    Model("SegResNet", "SegResNet", "monai", _monai("SegResNet", spatial_dims=3, init_filters=8, out_channels=2), _VOLUME),
    Model("VNet", "V-Net", "monai", _monai("VNet", out_channels=2), _VOLUME),
    Model("DynUNet", "U-Net", "monai", _monai(
        "DynUNet", spatial_dims=3, in_channels=1, out_channels=2, kernel_size=[3, 3, 3], strides=[1, 2, 2],
        upsample_kernel_size=[2, 2], filters=[8, 16, 32], deep_supervision=True, deep_supr_num=1), _VOLUME),
    Model("HighResNet", "HighResNet", "monai", _monai("HighResNet", spatial_dims=3, in_channels=1, out_channels=2),
          _random(1, 1, 16, 16, 16)),
    Model("EfficientNetBN", "EfficientNet", "monai", _monai(
        "EfficientNetBN", model_name="efficientnet-b0", pretrained=False, spatial_dims=2, in_channels=3, num_classes=4), _PICTURE),
    Model("VQVAE", "autoencoder", "monai", _monai(
        "VQVAE", spatial_dims=2, in_channels=1, out_channels=1, channels=(16, 16), num_res_layers=1, num_res_channels=(16, 16),
        downsample_parameters=((2, 4, 1, 1),) * 2, upsample_parameters=((2, 4, 1, 1, 0),) * 2, num_embeddings=16,
        embedding_dim=8), _random(2, 1, 32, 32)),
    # segmentation_models_pytorch
    Model("UnetPlusPlus", "U-Net", "segmentation_models_pytorch", _smp("UnetPlusPlus", "resnet18"), _PICTURE),
    Model("PSPNet", "PSPNet", "segmentation_models_pytorch", _smp("PSPNet", "resnet18"), _PICTURE),
    Model("Segformer", "SegFormer", "segmentation_models_pytorch", _smp("Segformer", "mit_b0"), _PICTURE),
    # spikingjelly
    Model("spiking_vgg11_bn", "spiking VGG", "spikingjelly",
          _spiking("spiking_vgg:spiking_vgg11_bn", num_classes=10, v_threshold=0.1), _random(2, 3, 32, 32)),
    Model("sew_resnet18", "spiking ResNet", "spikingjelly",
          _spiking("sew_resnet:sew_resnet18", multi_step=True, num_classes=10, cnf="ADD"), _random(2, 2, 3, 32, 32)),
    Model("CIFAR10DVSNet", "parametric LIF", "spikingjelly",
          _spiking("parametric_lif_net:CIFAR10DVSNet", channels=8, v_threshold=0.1), _random(2, 2, 128, 128)),
)  # fmt: skip

MODELS = DEVELOPMENT + FURTHER


def policy(rate: float = 0.8, end: float = 1.0, **contents: Any) -> Policy:
    """Every layer at one drop rate, at a factor that stays as it is."""
    return Policy(drop_rate=rate, schedule={"kind": "constant", "end": end}, **contents)


@dataclass(frozen=True)
class Step:
    """What one training step gave: the floating-point outputs that carry a gradient, and gradients by name."""

    outputs: list[Tensor]
    grads: dict[str, Tensor]

    def equals(self, other: Step) -> bool:
        """Bit for bit."""
        return self.outputs_equal(other) and self.grads.keys() == other.grads.keys() and not self.differing(other)

    def outputs_equal(self, other: Step) -> bool:
        """Whether the outputs are equal bit for bit."""
        same = [torch.equal(a, b) for a, b in zip(self.outputs, other.outputs, strict=True)]
        return bool(same) and all(same)

    def differing(self, other: Step) -> list[str]:
        """Names of the parameters whose gradients differ in a bit."""
        return [n for n in self.grads if not torch.equal(self.grads[n], other.grads[n])]


def run_step(model: nn.Module, arguments: tuple | dict, seed: int = 0) -> Step:
    """One training step from a fixed random state; what it changes by itself is put back, gradients left at None."""
    kept = [(t, t.detach().clone()) for t in (*model.buffers(), *model.parameters())]  # a codebook may be a parameter
    torch.manual_seed(seed)
    model.zero_grad()
    result = model(**arguments) if isinstance(arguments, dict) else model(*arguments)
    outputs = [t for t in tensors_of(result) if t.is_floating_point() and t.requires_grad]
    torch.stack([t.double().square().mean() for t in outputs]).sum().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with torch.no_grad():
        for tensor, value in kept:
            tensor.copy_(value)
    return Step([t.detach().clone() for t in outputs], grads)


def in_double(value: Any) -> Any:
    """Tensors in double precision, alone, in tuples and lists, or in dicts; what is no floating-point tensor as it is."""
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: in_double(item) for key, item in value.items()}
    return type(value)(map(in_double, value)) if isinstance(value, tuple | list) else value


def evaluate(model: nn.Module, arguments: tuple, seed: int = 0) -> list[Tensor]:
    """Outputs in evaluation mode without gradients; the mode is put back."""
    training = [m for m in model.modules() if m.training]
    torch.manual_seed(seed)
    try:
        with torch.no_grad():
            return tensors_of(model.eval()(*arguments))
    finally:
        for module in training:
            module.training = True


def pickles(model: nn.Module) -> bool:
    """Whether a model can be pickled and read again."""
    try:
        pickle.loads(pickle.dumps(model))
    except Exception:  # a local function, a lock: whatever a model may hold
        return False
    return True


def families() -> Iterator[Model]:
    """The networks of tests/families, as its tests build them."""
    sys.path.insert(0, os.path.join(os.path.dirname(__file__), "families"))
    tests: Any = importlib.import_module("test_families")
    made: list[tuple[nn.Module, Any]] = []
    tests.assert_trains = lambda original, inputs, *_, **__: made.append((copy.deepcopy(original), inputs))
    for name, test in list(vars(tests).items()):
        if name.startswith("test_"):
            marks = [m.args for m in getattr(test, "pytestmark", ()) if m.name == "parametrize"]
            made.clear()
            for values in marks[0][1] if marks else [()]:
                torch.manual_seed(0)
                test(*([values] if marks else []))
                label = f"{name.removeprefix('test_')}{f' ({values})' if marks else ''}".replace("_", " ")
                for original, inputs in made:
                    yield Model(
                        label, "tests/families", "tests/families", lambda o=original: copy.deepcopy(o), lambda i=inputs: i
                    )
                made.clear()


def graphs_captured(model: Model) -> str:
    """How many graphs Dynamo makes of the transformed model in a training step, or why it makes none."""
    from ssprop_fx.records import state_of

    for inner in ("eager", "aot_eager"):  # PyTorch's own backend "eager" fails where a checkpointed block counts in a buffer
        torch._dynamo.reset()
        gc.collect()  # spikingjelly knows networks by weak reference, and Dynamo counts on their number
        net = ssprop_fx.transform(model.build(), policy())
        rule = net.__dict__["_ssprop"].policy
        try:
            run_step(torch.compile(net, backend="ssprop", options={"inner": inner}, dynamic=False), model.arguments())
        except Exception as problem:
            found = f"none: {type(problem).__name__}"
        else:
            return str(len(state_of(rule).records))
    return found


_COLUMNS = (
    "model",
    "library",
    "family",
    "convolutions",
    "graph",
    "module",
    "call",
    "coverage",
    "Dynamo graphs",
    "transform, s",
)


def table_row(model: Model, compiled: bool) -> tuple[str, ...]:
    """The table's line for one model, measured."""
    net, arguments = model.build(), model.arguments()
    start = time.perf_counter()
    transformed = ssprop_fx.transform(net, policy())
    seconds = time.perf_counter() - start
    report = ssprop_fx.inspect(transformed, arguments)
    rungs = Counter(row.rung for row in report.rows)
    graphs = graphs_captured(model) if compiled else ""
    counts = (str(rungs[rung]) for rung in ("graph", "module", "call"))
    coverage = f"{report.coverage:.0%} of {report.measurement.dense}"
    return model.name, model.library, model.family, str(len(report.rows)), *counts, coverage, graphs, f"{seconds:.2f}"


_INTRODUCTION = """# Models

Written by `python tests/zoo.py docs/models.md`, on PyTorch {torch}: random weights, small inputs, one dense and one sparse training
step of each model, counted with `ssprop_fx.inspect(model, inputs)`.

- *convolutions*: layers, as in the report; a layer may run many times in a step.
- *graph*, *module*, *call*: how many were rewritten on which rung ([design.md](design.md), *Eager mode*).
- *coverage*: the share of the step's `aten.convolution_backward` calls that the policy reaches, of how many.
- *Dynamo graphs*: graphs in a training step of the transformed model under `torch.compile(backend="ssprop")`; breaks are the
  model's own. Empty where it was not measured (`--no-compile`).
- *transform, s*: seconds that `transform` took.

The first eight are the development suite; forty models of the same libraries follow, and the networks of `tests/families`, which
have the structures of published research systems. `pip install -e '.[families]'` installs the libraries, {versions} here. spikingjelly
requires torchaudio, whose compiled part must fit the installed torch; where it does not, `import transformers` (and with it
diffusers) fails: `pip uninstall torchaudio` then, nothing here needs it.

"""


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", help="where the table goes, docs/models.md")
    parser.add_argument("--only", nargs="*", help="names of models")
    parser.add_argument("--skip", nargs="*", default=(), help="names of models to leave out")
    parser.add_argument("--no-compile", action="store_true", help="leave the graphs of Dynamo out")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    rows = [_COLUMNS]
    for model in itertools.chain(MODELS, families()):
        if (options.only is None or model.name in options.only) and model.name not in options.skip:
            rows.append(table_row(model, not options.no_compile))
            print("  ".join(rows[-1]), flush=True)
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|" + "---|" * len(_COLUMNS))
    libraries = dict.fromkeys(model.library for model in MODELS)  # families use them, too
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in libraries)
    with open(options.file, "w", encoding="utf-8") as file:
        file.write(_INTRODUCTION.format(torch=torch.__version__, versions=versions) + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
