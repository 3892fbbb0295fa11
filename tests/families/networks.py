"""Small networks with the structures of published research systems, written afresh: facts about them, none of their code.

Each is the least that shows what is particular about the system: how its convolutions are called, and by whom.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class ConvAttention(nn.Module):
    """Self-attention whose projections are 1-d convolutions over the positions. (N, C, H, W) to the same."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(4, channels)
        self.qkv, self.out = nn.Conv1d(channels, 3 * channels, 1), nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Attend over all H·W positions."""
        q, k, v = self.qkv(self.norm(x).flatten(2)).transpose(1, 2).chunk(3, dim=-1)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return x + self.out(mixed).view_as(x)


class DenoisingUNet(nn.Module):
    """A library's denoising U-Net, then attention by 1-d convolutions."""

    def __init__(self, unet: nn.Module, channels: int) -> None:
        super().__init__()
        self.unet, self.attention, self.head = unet, ConvAttention(channels), nn.Conv2d(channels, 3, 3, padding=1)

    def forward(self, noisy: Tensor, time: Tensor) -> Tensor:
        """The noise in a picture, (N, 3, H, W), at time steps (N,)."""
        return self.head(self.attention(self.unet(noisy, time).sample))


class OrderRestoration(nn.Module):
    """Volumes of several spherical-harmonic orders restored one at a time: each attends to embeddings of all orders.

    Args:
        unet: a conditional 3-d diffusion U-Net with two input channels (the noisy volume and a conditioning volume).
        orders: how many there are.
        width: size of an order's embedding.
    """

    def __init__(self, unet: nn.Module, orders: int, width: int) -> None:
        super().__init__()
        self.unet, self.embedding = unet, nn.Embedding(orders, width)
        self.encode = nn.Sequential(nn.Conv3d(1, width, 4, stride=4), nn.AdaptiveAvgPool3d(1), nn.Flatten())

    def forward(self, noisy: Tensor, time: Tensor, condition: Tensor, orders: Tensor, which: Tensor) -> Tensor:
        """Noise (N, 1, D, H, W), from the volumes of all orders (N, O, D, H, W) and the index (N,) of the wanted one."""
        n, count = orders.shape[:2]
        tokens = self.encode(orders.flatten(0, 1).unsqueeze(1)).view(n, count, -1) + self.embedding.weight
        tokens = torch.cat((tokens, self.embedding(which).unsqueeze(1)), dim=1)
        return self.unet(torch.cat((noisy, condition), dim=1), time, context=tokens)


class TwoReconstructions(nn.Module):
    """One conditional denoiser that is called twice in a step: under the subject's label, and under the healthy one."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, noisy: Tensor, time: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """Both reconstructions, (N, 1, H, W) each."""
        return (
            self.unet(noisy, time, class_labels=label).sample,
            self.unet(noisy, time, class_labels=torch.zeros_like(label)).sample,
        )


def sphere_neighbours(vertices: int) -> Tensor:
    """(V, 7) indices: each of V points spread over a sphere, and its six nearest."""
    i = torch.arange(vertices) + 0.5
    polar, azimuth = torch.acos(1 - 2 * i / vertices), torch.pi * (1 + 5**0.5) * i
    points = torch.stack((azimuth.cos() * polar.sin(), azimuth.sin() * polar.sin(), polar.cos()), dim=1)
    return torch.cdist(points, points).topk(7, largest=False).indices


class MeshConvolution(nn.Module):
    """A filter over seven neighbours on a mesh, (N, C, V) to (N, K, V): a (1, 7) convolution or a linear layer."""

    def __init__(self, ins: int, outs: int, neighbours: Tensor, linear: bool) -> None:
        super().__init__()
        self.register_buffer("neighbours", neighbours)
        self.filter = nn.Linear(7 * ins, outs) if linear else nn.Conv2d(ins, outs, (1, 7))

    def forward(self, x: Tensor) -> Tensor:
        """Gather, then filter."""
        gathered = x[:, :, self.neighbours]
        if isinstance(self.filter, nn.Linear):
            return self.filter(gathered.permute(0, 2, 1, 3).flatten(2)).transpose(1, 2)
        return self.filter(gathered).squeeze(-1)


class SphereDenoiser(nn.Module):
    """Denoises maps on a sphere under a label; the first filter is linear, the others are convolutions."""

    def __init__(self, vertices: int = 42, width: int = 16, labels: int = 3) -> None:
        super().__init__()
        neighbours = sphere_neighbours(vertices)
        self.label, self.time = nn.Embedding(labels, width), nn.Linear(1, width)
        self.first = MeshConvolution(1, width, neighbours, linear=True)
        self.middle = nn.ModuleList(MeshConvolution(width, width, neighbours, linear=False) for _ in range(2))
        self.last = MeshConvolution(width, 1, neighbours, linear=False)

    def forward(self, noisy: Tensor, time: Tensor, label: Tensor) -> Tensor:
        """Noise (N, 1, V) at times (N, 1) for labels (N,)."""
        condition = (self.label(label) + self.time(time)).unsqueeze(-1)
        x = self.first(noisy)
        for layer in self.middle:
            x = x + layer(F.silu(x + condition))
        return self.last(F.silu(x))


class ConceptBottleneck(nn.Module):
    """One backbone per modality, a layer of concepts between them and the diagnosis; a modality may be missing.

    Args:
        backbones: each gives (N, width) features.
    """

    def __init__(self, backbones: Sequence[nn.Module], width: int, concepts: int = 5, classes: int = 2) -> None:
        super().__init__()
        self.branches = nn.ModuleList(backbones)
        self.absent = nn.Parameter(torch.zeros(len(backbones), width))
        self.concepts, self.diagnosis = nn.Linear(width, concepts), nn.Linear(concepts, classes)

    def forward(self, *modalities: Tensor | None) -> tuple[Tensor, Tensor]:
        """Diagnosis (N, classes) and concepts (N, concepts), from one picture per modality or None."""
        size = next(m.shape[0] for m in modalities if m is not None)
        features = [
            self.absent[i].expand(size, -1) if picture is None else branch(picture)
            for i, (branch, picture) in enumerate(zip(self.branches, modalities, strict=True))
        ]
        concepts = torch.sigmoid(self.concepts(torch.stack(features).mean(0)))
        return self.diagnosis(concepts), concepts


class JointRegistration(nn.Module):
    """Three networks in one: inpaint the lesion, register to the atlas, segment the lesion.

    The inpainting network sees the segmentation without a gradient, and is held fixed while the registration passes
    through it; similarity is measured on volumes smoothed with a constant filter, one group per channel.

    Args:
        inpaint, segment: volume to volume, 1 channel.
        register: (moving, fixed) to (warped, displacement).
    """

    def __init__(self, inpaint: nn.Module, segment: nn.Module, register: nn.Module) -> None:
        super().__init__()
        self.inpaint, self.segment, self.register = inpaint, segment, register
        line = torch.tensor([0.25, 0.5, 0.25])
        self.register_buffer("smoothing", torch.einsum("i,j,k->ijk", line, line, line).expand(2, 1, 3, 3, 3).clone())

    def forward(self, image: Tensor, atlas: Tensor) -> dict[str, Tensor]:
        """Volumes (N, 1, D, H, W)."""
        lesion = torch.sigmoid(self.segment(image))
        with torch.no_grad():
            hole = (lesion > 0.5).to(image.dtype)
        filled = image * (1 - hole) + self.inpaint(image * (1 - hole)) * hole
        for p in self.inpaint.parameters():
            p.requires_grad_(False)
        again = self.inpaint(filled)
        for p in self.inpaint.parameters():
            p.requires_grad_(True)
        warped, field = self.register(again, atlas)
        n = image.shape[0]
        identity = torch.eye(3, 4, device=image.device).expand(n, 3, 4)
        grid = F.affine_grid(identity, list(image.shape), align_corners=False)
        moved = F.grid_sample(lesion, grid + 0.05 * field.permute(0, 2, 3, 4, 1), align_corners=False)
        smooth = F.conv3d(torch.cat((warped, atlas), dim=1), self.smoothing, padding=1, groups=2)
        return {"smooth": smooth, "lesion": lesion, "moved": moved, "filled": filled}


class Straight(torch.autograd.Function):
    """One where x is positive, else zero; its gradient is a clipped straight line through."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return (x > 0).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * (x.abs() < 1).to(grad.dtype)


class DynamicMask(nn.Module):
    """Zeroes the positions whose saliency is under a threshold that is learnt."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.saliency, self.threshold = nn.Conv2d(channels, 1, 3, padding=1), nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to the same."""
        return x * Straight.apply(self.saliency(x) - self.threshold)


class DynamicMobileNet(nn.Module):
    """Inverted residuals with masks, and kernels mixed per sample.

    Args:
        conditional: (ins, outs, kernel, groups) to a layer called as (x, routing weights).
        experts: kernels that are mixed.
    """

    def __init__(self, conditional: Callable[..., nn.Module], experts: int = 2, width: int = 12, classes: int = 4) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, stride=2, padding=1)
        self.expand, self.depthwise = nn.Conv2d(width, 2 * width, 1), conditional(2 * width, 2 * width, 3, 2 * width)
        self.project, self.mask = conditional(2 * width, width, 1, 1), DynamicMask(2 * width)
        self.routing, self.head = nn.Linear(width, experts), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) to (N, classes)."""
        x = F.relu6(self.stem(x))
        weights = torch.sigmoid(self.routing(x.mean((2, 3))))
        y = self.mask(F.relu6(self.depthwise(F.relu6(self.expand(x)), weights)))
        return self.head((x + self.project(y, weights)).mean((2, 3)))


class ItemSurrogate(torch.autograd.Function):
    """A spike where the potential passes the threshold; the triangle of its gradient is as wide as a saved number."""

    @staticmethod
    def forward(ctx, potential, width):
        ctx.save_for_backward(potential, width)
        return (potential > 0).to(potential.dtype)

    @staticmethod
    def backward(ctx, grad):
        potential, width = ctx.saved_tensors
        gamma = width.item()
        return grad * (gamma - potential.abs()).clamp(min=0) / gamma**2, None


class LeakyNeurons(nn.Module):
    """Leaky integrate-and-fire over the first axis, which is time. (T, N, ...) to spikes of the same shape."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("width", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        """Hard reset after a spike."""
        potential, spikes = torch.zeros_like(x[0]), []
        for current in x:
            potential = 0.5 * potential + current
            spikes.append(ItemSurrogate.apply(potential - 1.0, self.width))
            potential = potential * (1 - spikes[-1])
        return torch.stack(spikes)


class PerStep(nn.Module):
    """Runs a layer on (T, N, ...) with time and batch as one axis."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """Fold, run, unfold."""
        return self.layer(x.flatten(0, 1)).unflatten(0, x.shape[:2])


class SpikingVGG(nn.Module):
    """A VGG of leaky neurons whose output at every time step is trained."""

    def __init__(self, steps: int = 3, classes: int = 4) -> None:
        super().__init__()
        self.steps = steps
        layers, ins = [], 3
        for outs in (8, 16):
            layers += [PerStep(nn.Sequential(nn.Conv2d(ins, outs, 3, padding=1), nn.BatchNorm2d(outs))), LeakyNeurons()]
            layers.append(PerStep(nn.AvgPool2d(2)))
            ins = outs
        self.features, self.head = nn.Sequential(*layers), nn.Linear(ins, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) to (T, N, classes)."""
        return self.head(self.features(x.expand(self.steps, *x.shape)).mean((-1, -2)))


class StockMovement(nn.Module):
    """Prices through 1-d convolutions, tweets through attention, both fused to up or down."""

    def __init__(self, vocabulary: int = 50, width: int = 16) -> None:
        super().__init__()
        self.prices = nn.Sequential(
            nn.Conv1d(3, width, 3, padding=1), nn.ReLU(), nn.Conv1d(width, width, 3, padding=2, dilation=2), nn.ReLU()
        )
        self.words, self.ngrams = nn.Embedding(vocabulary, width), nn.Conv1d(width, width, 3, padding=1)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.across, self.head = nn.MultiheadAttention(width, 2, batch_first=True), nn.Linear(2 * width, 2)

    def forward(self, prices: Tensor, words: Tensor) -> Tensor:
        """Prices (N, 3, days), words (N, length) to (N, 2)."""
        p = self.prices(prices).transpose(1, 2)
        w = self.ngrams(self.words(words).transpose(1, 2)).relu().transpose(1, 2)
        w, _ = self.attention(w, w, w, need_weights=False)
        fused, _ = self.across(p, w, w, need_weights=False)
        return self.head(torch.cat((p.mean(1), fused.mean(1)), dim=1))


class LowShotSegmentation(nn.Module):
    """Voxel embeddings, classed by their cosine to prototypes; each class is a mixture of several, with weights.

    Args:
        unet: volume to (N, width, D, H, W).
    """

    def __init__(self, unet: nn.Module, width: int, classes: int = 3, components: int = 2) -> None:
        super().__init__()
        self.unet = unet
        self.prototypes = nn.Parameter(torch.randn(classes, components, width))
        self.mixture, self.scale = nn.Parameter(torch.zeros(classes, components)), nn.Parameter(torch.tensor(5.0))

    def forward(self, x: Tensor) -> Tensor:
        """Scores (N, classes, D, H, W)."""
        features, prototypes = F.normalize(self.unet(x), dim=1), F.normalize(self.prototypes, dim=-1)
        cosine = torch.einsum("nwdhq,kcw->nkcdhq", features, prototypes)
        logits = self.scale * cosine + self.mixture.log_softmax(1)[None, :, :, None, None, None]
        return logits.logsumexp(2)


class ConvertedLayer(nn.Module):
    """A layer of a converted network: it keeps the function and the keywords, and another module's weight.

    The weight is that of the layer it was made from; the bias is its own and is calibrated. The membrane stays from step
    to step until it is reset.
    """

    def __init__(self, source: nn.Conv2d, threshold: float = 1.0) -> None:
        super().__init__()
        self.function, self.source = F.conv2d, [source]  # in a list, so that it is no submodule
        self.keywords = {"stride": source.stride, "padding": source.padding, "groups": source.groups}
        self.weight, self.bias = source.weight, nn.Parameter(source.bias.detach().clone())
        self.threshold, self.membrane = threshold, None

    def forward(self, x: Tensor) -> Tensor:
        """Integrate, fire (with a straight line through as gradient), subtract."""
        current = self.function(x, self.weight, self.bias, **self.keywords)
        membrane = current if self.membrane is None else self.membrane + current
        spikes = Straight.apply(membrane - self.threshold) * self.threshold
        self.membrane = membrane - spikes
        return spikes


class ConvertedNet(nn.Module):
    """Depthwise-separable network turned spiking, run over several time steps."""

    def __init__(self, steps: int = 4, width: int = 8, classes: int = 4) -> None:
        super().__init__()
        sources = (
            nn.Conv2d(3, width, 3, stride=2, padding=1),
            nn.Conv2d(width, width, 3, padding=1, groups=width),
            nn.Conv2d(width, 2 * width, 1),
        )
        self.steps, self.layers = steps, nn.ModuleList(map(ConvertedLayer, sources))
        self.head = nn.Linear(2 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) to (N, classes)."""
        for layer in self.layers:
            layer.membrane = None
        total = 0.0
        for _ in range(self.steps):
            y = x
            for layer in self.layers:
                y = layer(y)
            total = total + self.head(y.mean((2, 3)))
        return total / self.steps


class ImportanceMap(nn.Module):
    """Noise is put where a map allows it; what a frozen predictor still gets right shows where it looks.

    Args:
        generator: volume to the logarithm of the noise's strength.
        predictor: trained already; held fixed, gradients flow through it.
    """

    def __init__(self, generator: nn.Module, predictor: nn.Module) -> None:
        super().__init__()
        self.generator, self.predictor = generator, predictor.requires_grad_(False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Prediction on the noisy volume, and the strength of the noise."""
        strength = torch.sigmoid(self.generator(x))
        return self.predictor(x + strength * torch.randn_like(x)), strength


class ParallelKernels(nn.Module):
    """Kernels of four shapes side by side, their results stacked on the input: a dense block."""

    def __init__(self, ins: int, growth: int) -> None:
        super().__init__()
        shapes = ((3, 3, 3), (1, 1, 3), (3, 1, 1), (1, 3, 1))
        self.paths = nn.ModuleList(nn.Conv3d(ins, growth, s, padding=[k // 2 for k in s]) for s in shapes)
        self.norm = nn.BatchNorm3d(growth * len(shapes))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, ...) to (N, C + 4·growth, ...)."""
        return torch.cat((x, F.elu(self.norm(torch.cat([path(x) for path in self.paths], dim=1)))), dim=1)


class AgeStage(nn.Module):
    """One stage of an age regression; the second is told the first's rough age."""

    def __init__(self, told: int) -> None:
        super().__init__()
        self.wide = nn.Conv3d(1, 4, 7, padding=6, dilation=2)
        self.blocks = nn.Sequential(ParallelKernels(4, 2), nn.AvgPool3d(2), ParallelKernels(12, 2))
        self.head = nn.Sequential(nn.Linear(20 + told, 16), nn.ELU(), nn.Linear(16, 1))

    def forward(self, x: Tensor, *known: Tensor) -> Tensor:
        """(N, 1, D, H, W) to (N, 1)."""
        return self.head(torch.cat((self.blocks(self.wide(x)).mean((2, 3, 4)), *known), dim=1))


class TwoStageAge(nn.Module):
    """A rough age, then a correction of the rounded one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = AgeStage(1), AgeStage(2)

    def forward(self, x: Tensor, sex: Tensor) -> tuple[Tensor, Tensor]:
        """Volumes (N, 1, D, H, W) and sex (N, 1) to two ages, (N, 1)."""
        rough = self.first(x, sex)
        rounded = rough + (rough.round() - rough).detach()
        return rough, rough + self.second(x, sex, rounded)


class CriticWithAge(nn.Module):
    """A critic with a second branch that regresses the age."""

    def __init__(self, critic: nn.Module) -> None:
        super().__init__()
        self.critic = critic
        self.age = nn.Sequential(nn.Conv3d(1, 8, 3, stride=2, padding=1), nn.SiLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten())
        self.regress = nn.Linear(8, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Volumes to (score, age)."""
        return self.critic(x), self.regress(self.age(x))


class CheckpointedStages(nn.Module):
    """A library's 3-d ResNet of which each stage is computed again in the backward pass."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        """(N, 1, D, H, W) to (N, classes)."""
        net = self.net
        x = net.maxpool(net.act(net.bn1(net.conv1(x))))
        for stage in (net.layer1, net.layer2, net.layer3, net.layer4):
            x = checkpoint(stage, x, use_reentrant=False)
        return net.fc(net.avgpool(x).flatten(1))


class Gate(nn.Module):
    """A factor per channel that stays one; its gradient times it is the channel's first-order importance."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, ...) to the same."""
        return x * self.factor.view(-1, *[1] * (x.dim() - 2))
