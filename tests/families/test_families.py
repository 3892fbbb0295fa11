"""Networks with the structures of twenty published research systems: each trains under the pass, through both front ends."""

import copy
import gc

import networks
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from zoo import policy

import ssprop_fx
from ssprop_fx import SSPropError
from ssprop_fx.steps import tensors_of

pytestmark = pytest.mark.filterwarnings("ignore")
slow = pytest.mark.slow


@pytest.fixture(autouse=True)
def fresh():
    torch.manual_seed(0)
    gc.collect()  # spikingjelly knows networks by weak reference, and Dynamo counts on their number
    yield
    torch._dynamo.reset()


def run(model, inputs, seed=1):
    """The model on its inputs, from a fixed random state."""
    torch.manual_seed(seed)
    return model(**inputs) if isinstance(inputs, dict) else model(*inputs)


def losses(model, inputs, loss, steps=6, rate=3e-3):
    """The loss at each of a few steps on one batch."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], rate)
    found = []
    for _ in range(steps):
        value = loss(run(model, inputs))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        found.append(float(value))
    return found


def assert_trains(original, inputs, loss, *, alone=True, contents=None, **training):
    """C1, C4 and a falling loss under ``transform``, under the backend, and under both.

    Args:
        loss: of the model's outputs.
        alone: whether the backend by itself sees every convolution; where graphs break it must name those that it missed.
        contents: more keys of the policy.
    """
    contents = {"rate": 0.5} | (contents or {})
    start = copy.deepcopy(original)
    state = copy.deepcopy(original.state_dict())
    expected = tensors_of(run(copy.deepcopy(start), inputs))

    model = ssprop_fx.transform(original, policy(**contents))
    assert_equal(tensors_of(run(model, inputs)), expected)
    assert_covered(ssprop_fx.inspect(model, inputs))
    original.load_state_dict(state)
    assert_falls(losses(model, inputs, loss, **training))
    original.load_state_dict(state)

    gc.collect()
    options = {"inner": "aot_eager"}
    both = torch.compile(ssprop_fx.transform(copy.deepcopy(start), policy(**contents)), backend="ssprop", options=options,
                         dynamic=False)  # fmt: skip
    assert_close(tensors_of(run(both, inputs)), expected)
    assert_falls(losses(both, inputs, loss, **training))
    assert_covered(ssprop_fx.inspect(both, inputs))

    torch._dynamo.reset()
    gc.collect()
    rule = policy(**contents)
    compiled = torch.compile(copy.deepcopy(start), backend="ssprop", options=options | {"policy": rule}, dynamic=False)
    assert_close(tensors_of(run(compiled, inputs)), expected)
    assert_falls(losses(compiled, inputs, loss, **training))
    report = ssprop_fx.inspect(compiled, inputs)
    if alone:
        assert_covered(report)
    else:
        missed = {row.layer: row for row in report.rows if not row.rewritten}
        measured = report.measurement
        assert set(missed) == set(measured.missed)
        assert all("no captured graph" in row.reason for row in missed.values())
        assert sum(calls for calls, *_ in measured.missed.values()) == measured.dense - measured.sparse > 0


def assert_covered(report):
    assert report.measurement.dense > 0
    assert report.coverage == 1.0, str(report)
    assert all(row.rewritten for row in report.rows), str(report)


def assert_falls(values):
    assert values[-1] < values[0], values


def assert_equal(got, expected):
    assert len(got) == len(expected) > 0
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def assert_close(got, expected):
    assert len(got) == len(expected) > 0
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def classes(count, size=2):
    """A loss: cross-entropy to fixed labels."""
    labels = torch.arange(size) % count
    return lambda output: F.cross_entropy(output, labels)


def mse(target):
    """A loss: mean square difference to a target."""
    return lambda output: F.mse_loss(output, target)


def unet_2d(**changes):
    """A small diffusers ``UNet2DModel``."""
    diffusers = pytest.importorskip("diffusers", exc_type=ImportError)
    settings = {
        "sample_size": 16, "in_channels": 3, "out_channels": 3, "layers_per_block": 1, "block_out_channels": (16, 32),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "norm_num_groups": 8, "attention_head_dim": 8,
    }  # fmt: skip
    return diffusers.UNet2DModel(**settings | changes)


def monai():
    """``monai.networks.nets``, or a skipped test."""
    pytest.importorskip("monai", exc_type=ImportError)
    import monai.networks.nets

    return monai.networks.nets


def unet_3d(ins=1, outs=1, channels=(8, 16), **changes):
    """A small monai ``UNet``, with transposed convolutions on the way up."""
    return monai().UNet(spatial_dims=3, in_channels=ins, out_channels=outs, channels=channels,
                        strides=(2,) * (len(channels) - 1), **changes)  # fmt: skip


def test_ssprop_classifier():
    torchvision = pytest.importorskip("torchvision")
    net = torchvision.models.resnet18(weights=None, num_classes=10)
    assert_trains(net, (torch.randn(4, 3, 32, 32),), classes(10, 4), contents={"rate": 0.8}, rate=1e-3)


@slow
def test_ssprop_denoising_unet_with_1d_attention_projections():
    net = networks.DenoisingUNet(unet_2d(out_channels=8), 8)
    noise = torch.randn(2, 3, 16, 16)
    assert_trains(net, (noise * 0.7 + 0.3, torch.tensor([3, 7])), mse(noise), contents={"rate": 0.8})


@slow
def test_fod_restoration():
    pytest.importorskip("einops")  # which monai's attention asks for, and does not bring
    unet = monai().DiffusionModelUNet(
        spatial_dims=3, in_channels=2, out_channels=1, num_res_blocks=1, channels=(8, 16), attention_levels=(False, True),
        norm_num_groups=4, num_head_channels=4, with_conditioning=True, cross_attention_dim=12,
    )  # fmt: skip
    net = networks.OrderRestoration(unet, orders=4, width=12)
    volume = torch.randn(1, 1, 8, 8, 8)
    inputs = (volume, torch.tensor([5]), torch.randn_like(volume), torch.randn(1, 4, 8, 8, 8), torch.tensor([2]))
    assert_trains(net, inputs, mse(volume))


@slow
def test_tau_pet_anomaly_detection():
    svm = pytest.importorskip("sklearn.svm")
    net = networks.TwoReconstructions(unet_2d(in_channels=1, out_channels=1, num_class_embeds=2))
    picture = torch.randn(4, 1, 16, 16)
    inputs = (picture, torch.full((4,), 9), torch.tensor([0, 1, 0, 1]))

    def loss(outputs):
        return F.mse_loss(outputs[0], picture) + F.mse_loss(outputs[1], picture)

    assert_trains(net, inputs, loss)
    with torch.no_grad():
        own, healthy = ssprop_fx.transform(net, policy())(*inputs)
    maps = (own - healthy).abs().flatten(1).numpy()
    assert svm.SVC().fit(maps, inputs[2].numpy()).predict(maps).shape == (4,)


def test_spherical_normative_model():
    net = networks.SphereDenoiser()
    noise = torch.randn(3, 1, 42)
    inputs = (noise + 0.5, torch.rand(3, 1), torch.tensor([0, 1, 2]))
    assert_trains(net, inputs, mse(noise))


def test_spherical_normative_model_with_sparse_linear_filter():
    net = networks.SphereDenoiser()
    noise = torch.randn(3, 1, 42)
    inputs = (noise + 0.5, torch.rand(3, 1), torch.tensor([0, 1, 2]))
    model = ssprop_fx.transform(
        net, policy(0.5, rules=[{"layers": "first.filter", "kind": "linear", "drop_rate": 0.5, "round_to": 1}])
    )
    mse(noise)(model(*inputs)).backward()
    assert int((net.first.filter.weight.grad.abs().sum(1) == 0).sum()) == 8
    assert_falls(losses(model, inputs, mse(noise)))


@slow
def test_imaging_plane_self_supervision():
    smp = pytest.importorskip("segmentation_models_pytorch", exc_type=ImportError)
    settings = {"encoder_name": "resnet18", "encoder_weights": None, "in_channels": 1, "decoder_channels": (32, 16, 16, 8, 8)}
    net = smp.Unet(classes=1, aux_params={"classes": 2}, **settings)
    slices, heat, order = torch.randn(2, 1, 32, 32), torch.rand(2, 1, 32, 32), torch.tensor([0, 1])

    def pretext(outputs):
        return F.mse_loss(outputs[0], heat) + F.cross_entropy(outputs[1], order)

    assert_trains(net, (slices,), pretext, rate=1e-3)

    downstream = smp.Unet(classes=3, **settings)
    missing, unexpected = downstream.load_state_dict(
        {k: v for k, v in ssprop_fx.transform(net, policy()).state_dict().items() if not k.startswith("segmentation_head")},
        strict=False,
    )
    assert all(k.startswith("segmentation_head") for k in missing)
    assert all(k.startswith("classification_head") for k in unexpected)
    model = ssprop_fx.transform(downstream, policy(0.5))
    assert_covered(ssprop_fx.inspect(model, (slices,)))
    assert_falls(losses(model, (slices,), lambda out: F.cross_entropy(out, heat[:, 0].mul(2.99).long()), rate=1e-3))


@slow
def test_choroid_concept_bottleneck():
    timm = pytest.importorskip("timm", exc_type=ImportError)
    backbones = [timm.create_model("test_resnet", pretrained=False, num_classes=0) for _ in range(3)]
    net = networks.ConceptBottleneck(backbones, backbones[0].num_features)
    pictures = [torch.randn(4, 3, 32, 32) for _ in range(3)]
    concepts = torch.rand(4, 5).round()

    def loss(outputs):
        return classes(2, 4)(outputs[0]) + F.binary_cross_entropy(outputs[1], concepts)

    assert_trains(net, (*pictures,), loss)
    model = ssprop_fx.transform(net, policy(0.5))
    missing = (pictures[0], None, pictures[2])
    assert_falls(losses(model, missing, loss))
    assert ssprop_fx.inspect(model, missing).coverage == 1.0


@slow
def test_girnet():
    nets = monai()
    fields = nets.VoxelMorphUNet(spatial_dims=3, in_channels=2, unet_out_channels=8, channels=(8, 8), final_conv_channels=(8,))
    register = nets.VoxelMorph(backbone=fields, integration_steps=0, spatial_dims=3)
    net = networks.JointRegistration(unet_3d(), unet_3d(), register)
    image, atlas = torch.rand(1, 1, 16, 16, 16), torch.rand(1, 1, 16, 16, 16)

    def loss(outputs):
        similar = F.mse_loss(outputs["smooth"][:, :1], outputs["smooth"][:, 1:])
        return similar + F.mse_loss(outputs["filled"], image) + outputs["moved"].mean() + outputs["lesion"].square().mean()

    assert_trains(net, (image, atlas), loss, alone=False)  # its own forward is abandoned where requires_grad is switched


class Rates(nn.Module):
    """A converted network run over time; its mean output."""

    def __init__(self, net, reset, steps=4):
        super().__init__()
        self.net, self.reset, self.steps = net, reset, steps

    def forward(self, x):
        self.reset(self.net)
        return sum(self.net(x) for _ in range(self.steps)) / self.steps


def vgg(width=8):
    """Two convolutions with batch norm, one linear layer."""
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.AvgPool2d(2),
        nn.Conv2d(width, 2 * width, 3, padding=1), nn.BatchNorm2d(2 * width), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(2 * width, 4),
    )  # fmt: skip


def converted(net, pictures, recipe, **settings):
    """A network turned spiking by spikingjelly, over several time steps."""
    pytest.importorskip("spikingjelly", exc_type=ImportError)
    from spikingjelly.activation_based import ann2snn, functional

    data = [(pictures, torch.zeros(len(pictures), dtype=torch.long))]
    spiking = ann2snn.Converter(getattr(ann2snn, recipe)(data, **settings)).convert(net.eval())
    return Rates(spiking.train(), functional.reset_net)


@slow
def test_snn_conversion_and_layerwise_calibration():
    pictures = torch.rand(4, 3, 8, 8)
    net = vgg().eval()
    with torch.no_grad():
        target = net(pictures)
    model = converted(net, pictures, "RateCodingRecipe", mode="Max", fuse_flag=True)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules()), "batch norm was to be folded"
    assert_trains(model, (pictures,), mse(target))

    calibrated = ssprop_fx.transform(model, policy(0.5))
    for layer in [m for m in calibrated.modules() if isinstance(m, nn.Conv2d)]:  # one layer after the other
        model.requires_grad_(False)
        layer.requires_grad_(True)
        assert_falls(losses(calibrated, (pictures,), mse(target), steps=4, rate=1e-3))


@slow
def test_dynamic_sparse_convolution():
    layers = pytest.importorskip("timm.layers", exc_type=ImportError)

    def conditional(ins, outs, kernel, groups):
        return layers.CondConv2d(ins, outs, kernel, padding=kernel // 2, groups=groups, num_experts=2)

    net = networks.DynamicMobileNet(conditional)
    assert_trains(net, (torch.randn(4, 3, 16, 16),), classes(4, 4))


def test_temporal_efficient_training():
    def loss(outputs):
        return sum(classes(4, 4)(step) for step in outputs) / len(outputs)

    assert_trains(networks.SpikingVGG(), (torch.rand(4, 3, 8, 8) * 2,), loss, steps=10)


def test_stock_movement_prediction():
    inputs = {"prices": torch.randn(4, 3, 10), "words": torch.randint(0, 50, (4, 12))}
    assert_trains(networks.StockMovement(), inputs, classes(2, 4))


def test_low_shot_segmentation():
    net = networks.LowShotSegmentation(unet_3d(outs=8, num_res_units=1), 8)
    labels = torch.randint(0, 3, (1, 8, 8, 8))
    assert_trains(net, (torch.randn(1, 1, 8, 8, 8),), lambda out: F.cross_entropy(out, labels))


def test_snn_calibration():
    assert_trains(networks.ConvertedNet(), (torch.rand(4, 3, 8, 8) * 3,), classes(4, 4), steps=40, rate=1e-2)


@slow
def test_optimal_ann_snn_conversion():
    pictures = torch.rand(4, 3, 8, 8)
    model = converted(vgg(), pictures, "LocalThresholdBalancingRecipe")
    assert_trains(model, (pictures,), classes(4, 4), steps=10)


@slow
def test_voxel_importance_maps():
    predictor = small_resnet().eval()
    net = networks.ImportanceMap(unet_3d(), predictor)

    def loss(outputs):
        return classes(2, 2)(outputs[0]) - outputs[1].mean()

    assert_trains(net, (torch.randn(2, 1, 16, 16, 16),), loss)
    assert all(p.grad is None for p in predictor.parameters())


def small_resnet():
    """A 3-d ResNet of monai with one block a stage."""
    return monai().ResNet(
        "basic", [1, 1, 1, 1], [4, 8, 8, 8], spatial_dims=3, n_input_channels=1, conv1_t_size=3, num_classes=2
    )


@slow
def test_tsan_brain_age():
    ages = torch.tensor([[0.2], [0.9], [0.5]])

    def loss(outputs):
        rough, fine = outputs
        ranking = F.margin_ranking_loss(fine[:-1], fine[1:], (ages[:-1] - ages[1:]).sign(), margin=0.1)
        return F.mse_loss(rough, ages) + F.mse_loss(fine, ages) + ranking

    assert_trains(networks.TwoStageAge(), (torch.randn(3, 1, 8, 8, 8), torch.tensor([[0.0], [1.0], [1.0]])), loss)


@slow
def test_tgb_gan_age_synthesis():
    nets = monai()
    makes = nets.Generator((6,), (8, 4, 4, 4), channels=(8, 1), strides=(2, 1), num_res_units=1)
    critic = networks.CriticWithAge(
        nets.Discriminator((1, 8, 8, 8), channels=(8, 8), strides=(2, 2), num_res_units=0, dropout=None, last_act=None)
    )
    rules = policy(0.5), policy(0.8)
    generator, discriminator = ssprop_fx.transform(makes, rules[0]), ssprop_fx.transform(critic, rules[1])
    latent, real, age = torch.randn(2, 6), torch.randn(2, 1, 8, 8, 8), torch.rand(2, 1)
    assert torch.equal(run(generator, (latent,)), run(makes, (latent,)))
    assert_equal(run(discriminator, (real,)), run(critic, (real,)))
    assert_covered(ssprop_fx.inspect(generator, (latent,)))
    assert_covered(ssprop_fx.inspect(discriminator, (real,)))
    assert {row.drop_rate for row in ssprop_fx.inspect(generator).rows} == {0.5}
    assert {row.drop_rate for row in ssprop_fx.inspect(discriminator).rows} == {0.8}

    def critic_loss(net):
        fake = generator(latent).detach()
        between = (0.3 * real + 0.7 * fake).requires_grad_()
        (slope,) = torch.autograd.grad(net(between)[0].sum(), between, create_graph=True)
        penalty = (slope.flatten(1).norm(dim=1) - 1).square().mean()
        score, guess = net(real)
        return net(fake)[0].mean() - score.mean() + 10 * penalty + F.mse_loss(guess, age)

    def fooled():
        return discriminator(generator(latent))[0].mean().neg()

    # one after the other: while both move, the critic's loss rises in dense training, too
    for trained, loss in ((discriminator, lambda: critic_loss(discriminator)), (generator, fooled)):
        optimizer, found = torch.optim.Adam(trained.parameters(), 3e-3), []
        for _ in range(8):
            value = loss()
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            found.append(value.item())
        assert_falls(found)

    compiled = torch.compile(discriminator, backend="ssprop", options={"inner": "aot_eager"}, dynamic=False)
    with pytest.raises((SSPropError, RuntimeError), match="double backward"):
        critic_loss(compiled).backward()
    torch._dynamo.reset()
    target = torch.randn(2, 1, 8, 8, 8)
    assert_trains(makes, (latent,), mse(target))


def contrastive(features):
    """Voxels of two volumes at the same place are pulled together, others pushed apart."""
    a, b = (F.normalize(f.flatten(1)[:, ::7], dim=0) for f in features)
    return F.cross_entropy(a.t() @ b / 0.1, torch.arange(a.shape[1]))


@slow
@pytest.mark.parametrize("library", ["monai", "dynamic_network_architectures"])
def test_neuron_segmentation(library):
    if library == "monai":
        net = unet_3d(outs=8, num_res_units=1)
    else:
        unet = pytest.importorskip("dynamic_network_architectures.architectures.unet", exc_type=ImportError)
        net = unet.PlainConvUNet(1, 2, (8, 16), nn.Conv3d, 3, (1, 2), 1, 8, 1, conv_bias=True, norm_op=nn.InstanceNorm3d,
                                 nonlin=nn.LeakyReLU)  # fmt: skip
    assert_trains(net, (torch.randn(2, 1, 8, 8, 8),), contrastive)


@slow
def test_raw_mri_resnet_with_checkpointing():
    assert_trains(networks.CheckpointedStages(small_resnet()), (torch.randn(2, 1, 32, 32, 32),), classes(2))


@slow
def test_taylor_pruning():
    torchvision = pytest.importorskip("torchvision")
    pruning = pytest.importorskip("torch_pruning", exc_type=ImportError)
    net = torchvision.models.resnet18(weights=None, num_classes=4)
    pictures = torch.randn(4, 3, 32, 32)
    classes(4, 4)(net(pictures)).backward()
    pruner = pruning.pruner.MetaPruner(
        net, pictures, importance=pruning.importance.TaylorImportance(), pruning_ratio=0.3, ignored_layers=[net.fc]
    )
    pruner.step()
    net.zero_grad()
    net.bn1 = nn.Sequential(net.bn1, networks.Gate(net.bn1.num_features))
    assert any(m.out_channels % 2 for m in net.modules() if isinstance(m, nn.Conv2d)), "odd channel counts were wanted"
    assert_trains(net, (pictures,), classes(4, 4), contents={"criterion": "taylor"}, rate=1e-3)
