"""C5: layers whose weight is computed, whose forward is their own, whose geometry changes."""

import copy
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from transforming import assert_sparse, image, layers, policy, ready, small, step

import ssprop_fx
from ssprop_fx.convolutions import CONVOLUTIONS
from ssprop_fx.coverage import measure
from ssprop_fx.transform import transform, transformation_of

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.nn.utils.weight_norm.*", "ignore:.*torch.jit.*")


class Symmetric(nn.Module):
    def forward(self, weight):
        return weight + weight.flip(-1)


COMPUTED = {
    "pruned": lambda m: prune.l1_unstructured(m, "weight", amount=0.3),
    "legacy weight norm": nn.utils.weight_norm,
    "legacy spectral norm": nn.utils.spectral_norm,
    "weight norm": parametrizations.weight_norm,
    "spectral norm": parametrizations.spectral_norm,
    "parametrized": lambda m: parametrize.register_parametrization(m, "weight", Symmetric()) and m,
}


@pytest.mark.parametrize("kind", COMPUTED)
@pytest.mark.parametrize("function", ["conv2d", "conv_transpose2d"])
def test_computed_weights_stay_computed(kind, function):
    torch.manual_seed(0)
    layer = COMPUTED[kind](CONVOLUTIONS[function].module(3, 8, 3, padding=1))
    original = nn.Sequential(layer, nn.Flatten()).eval()
    model = transform(original, policy())
    assert list(model.state_dict()) == list(original.state_dict())
    for mode in (False, True):  # spectral norm iterates in training mode, on shared buffers
        original.train(mode)
        model.train(mode)
        state = copy.deepcopy({k: v for k, v in original.named_buffers()})
        expected, dense = step(original)
        with torch.no_grad():
            for name, buffer in original.named_buffers():
                buffer.copy_(state[name])
        output, sparse = step(model)
        assert torch.equal(output, expected)
        assert sparse["0.bias"].eq(0).sum() == 4
        assert dense["0.bias"].eq(0).sum() == 0
        assert all(g is not None and g.ne(0).any() for g in sparse.values())


def test_pruning_after_the_transform_takes_effect():
    model = transform(ready(small()), policy())
    prune.random_unstructured(model[0], "weight", amount=0.99)
    output = model[0](image())
    assert torch.equal(output, F.conv2d(image(), model[0].weight, model[0].bias, padding=1))
    assert model[0].weight.eq(0).float().mean() > 0.9


class Causal(nn.Conv1d):
    def forward(self, x):
        return super().forward(F.pad(x, (self.dilation[0] * (self.kernel_size[0] - 1), 0)))


class Standardised(nn.Conv2d):
    def forward(self, x):
        w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, w, self.bias, self.stride, self.padding, self.dilation, self.groups)


class StandardisedInside(nn.Conv2d):
    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input, weight / 2, bias)


class ByConvForward(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(x, self.weight * 2, self.bias)


class BySuper(nn.Conv2d):
    """Past what may lie on the instance."""

    def forward(self, x):
        return super()._conv_forward(x, self.weight * 2, self.bias)


class ByNameOfABase(ByConvForward):
    def forward(self, x):
        return ByConvForward._conv_forward(self, x, self.weight * 2, self.bias)


class TwoCalls(nn.Conv2d):
    def forward(self, x):
        first = F.conv2d(x, self.weight, self.bias, padding=self.padding)
        return first + F.conv2d(x, self.weight.flip(-1), self.bias, padding=self.padding)


class Partial(nn.Conv2d):
    """Counts, beside its own convolution, what is under the kernel; not again for inputs of the same size."""

    size = None

    def forward(self, x):
        if x.shape != self.size:
            self.size = x.shape
            with torch.no_grad():
                self.ratio = 9 / F.conv2d(torch.ones_like(x), torch.ones_like(self.weight))
        return super().forward(x) * self.ratio


class Scaled(nn.Conv2d):
    """As of XNOR-Net."""

    def forward(self, x):
        scale = F.conv2d(x.abs().mean(1, keepdim=True), torch.full((1, 1, 3, 3), 1 / 9))
        return F.conv2d(x, self.weight.tanh(), self.bias) * scale


@pytest.mark.parametrize("layer", [Partial, Scaled])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_call_beside_a_layers_own_is_not_taken_for_it(layer, compiled):
    chosen = policy(rules=[{"layers": "0", "drop_rate": 0}])
    model = transform(nn.Sequential(layer(3, 8, 3)), chosen)
    run = torch.compile(model, backend="aot_eager") if compiled else model
    for _ in range(2):
        run(image()).square().sum().backward()
        assert model[0].weight.grad.flatten(1).abs().sum(1).gt(0).all()
        model.zero_grad()
    assert set(transformation_of(model).sites) == {"0", "0#conv2d.0"}


class Up(nn.ConvTranspose2d):
    def forward(self, x):
        return F.conv_transpose2d(x, self.weight.abs(), self.bias, self.stride)


@pytest.mark.parametrize(
    ("layer", "names"),
    [
        (lambda: Causal(3, 8, 3), ["0"]),
        (lambda: Standardised(3, 8, 3), ["0"]),
        (lambda: StandardisedInside(3, 8, 3), ["0"]),
        (lambda: ByConvForward(3, 8, 3), ["0"]),
        (lambda: BySuper(3, 8, 3), ["0"]),
        (lambda: ByNameOfABase(3, 8, 3), ["0"]),
        (lambda: TwoCalls(3, 8, 3), ["0", "0#conv2d.1"]),
        (lambda: Up(3, 8, 3), ["0"]),
    ],
    ids=["causal", "standardised", "inside", "conv_forward", "super", "base", "two calls", "transposed"],
)
def test_subclass_keeps_its_own_forward(layer, names):
    torch.manual_seed(0)
    original = nn.Sequential(layer())
    x = torch.randn(2, 3, 9) if isinstance(original[0], nn.Conv1d) else image()
    model = transform(original, policy())
    expected, dense = step(original, x)
    output, sparse = step(model, x)
    assert torch.equal(output, expected)
    assert list(transformation_of(model).sites) == names
    assert measure(model, x).coverage == 1.0
    if len(names) == 1:
        assert sparse["0.bias"].eq(0).sum() == 4
        kept = sparse["0.bias"].ne(0)
        torch.testing.assert_close(sparse["0.bias"][kept], dense["0.bias"][kept])


PATCHES = {
    "conv": (nn.Conv2d, "forward"),
    "conv_forward": (nn.Conv2d, "_conv_forward"),
    "transposed": (nn.ConvTranspose2d, "forward"),
    "linear": (nn.Linear, "forward"),
}


@pytest.mark.parametrize("patch", PATCHES)
def test_a_class_of_torchs_that_somebody_patched_computes_as_patched(patch, monkeypatch):
    cls, name = PATCHES[patch]
    plain = getattr(cls, name)
    monkeypatch.setattr(cls, name, lambda self, *args, **kwargs: plain(self, *args, **kwargs) * 0.5)
    original = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 8, 3), nn.Flatten(2), nn.Linear(36, 8))
    model = transform(original, policy(rules=[{"kind": "linear", "optional": True, "drop_rate": 0.5}]))
    assert torch.equal(model(image()), original(image()))
    assert layers(model)[:2] == ["0", "1"]
    assert ("3" in layers(model)) == (patch != "linear")  # whose calls are not watched for
    assert_sparse(model, rows=2)
    assert len(ssprop_fx.inspect(model, image()).rows) >= 2


def test_forward_replaced_on_the_instance_is_kept():
    original = nn.Sequential(nn.Conv2d(3, 8, 3))

    def forward(self, x):
        return F.conv2d(x, self.weight * 3, self.bias) + 1

    original[0].forward = types.MethodType(forward, original[0])
    model = transform(original, policy())
    assert torch.equal(model(image()), original(image()))
    assert model[0].forward.args[1].__self__ is model[0]
    assert_sparse(model)
    assert layers(model) == ["0"]


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm"])
@pytest.mark.parametrize("first", [0, 1])
def test_a_parametrization_of_either_model_may_come_and_go(kind, first, hidden):
    original = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1))
    layer = getattr(parametrizations, kind)(original[0]).eval()
    original.hidden = [layer]
    if hidden:
        original[0] = nn.Conv2d(3, 8, 3)
    model = transform(original, policy())
    layers = [layer, model.hidden[0]]
    assert type(layers[1]).__name__ == type(layer).__name__ == "ParametrizedConv2d"
    assert list(model.state_dict()) == list(original.state_dict())
    assert torch.equal(model(image()), original(image()))
    expected = layer(image())
    assert torch.equal(copy.deepcopy(layers[1])(image()), expected)
    parametrize.register_parametrization(layers[first], "bias", nn.Identity())
    assert "bias" not in vars(type(layers[1 - first]))
    parametrize.remove_parametrizations(layers[first], "bias")
    parametrize.remove_parametrizations(layers[first], "weight")
    assert type(layers[first]) is nn.Conv2d
    for each in layers:
        torch.testing.assert_close(each(image()), expected, rtol=0, atol=0.1)  # the norm is estimated again


def test_padding_modes_and_string_padding_are_the_modules_own():
    for mode in ("zeros", "reflect", "replicate", "circular"):
        for padding in (1, "same", (2, 1)):
            original = nn.Sequential(nn.Conv2d(3, 8, (4, 3), padding=padding, padding_mode=mode))
            model = transform(original, policy())
            assert torch.equal(model(image()), original(image()))
            assert_sparse(model)


def test_output_size_of_a_transposed_convolution_is_honoured():
    original = nn.ConvTranspose2d(3, 8, 3, stride=2)
    model = transform(original, policy())
    for size in ((13, 13), (14, 14)):
        got, expected = model(image(), output_size=size), original(image(), output_size=size)
        assert got.shape[2:] == size
        assert torch.equal(got, expected)
    with pytest.raises(ValueError, match="output size"):
        model(image(), output_size=(20, 20))


def test_wrong_inputs_raise_what_they_always_raised():
    original = nn.Sequential(nn.Conv2d(3, 8, 3))
    model = transform(original, policy())
    for wrong in (image(channels=4), torch.randn(3), image(size=2)):
        with pytest.raises(RuntimeError) as expected:
            original(wrong)
        with pytest.raises(RuntimeError) as got:
            model(wrong)
        assert str(got.value) == str(expected.value)
    with pytest.raises(RuntimeError, match=r"[Dd]ouble"):
        model(image(dtype=torch.float64))


def test_a_changed_geometry_is_followed():
    torch.manual_seed(0)
    model = torch.nn.Conv2d(4, 8, 3)
    ours = ssprop_fx.transform(model, ssprop_fx.Policy(schedule={"kind": "constant"}))
    x = torch.randn(2, 4, 9, 9)
    for change in (
        {"stride": (2, 2)},
        {"padding": (1, 1)},
        {"padding": "same", "stride": (1, 1)},
        {"dilation": [2, 2]},
        {"dilation": (1, 1)},
    ):
        for key, value in change.items():
            setattr(model, key, value), setattr(ours, key, value)
        assert torch.equal(ours(x), model(x))
        assert torch.equal(ours(x[0]), model(x[0]))


def test_a_geometry_changed_in_place_is_followed():
    stride = [1, 1]
    model = torch.nn.Conv2d(4, 8, 3)
    ours = ssprop_fx.transform(model, ssprop_fx.Policy(schedule={"kind": "constant"}))
    model.stride = ours.stride = stride
    x = torch.randn(2, 4, 9, 9)
    assert torch.equal(ours(x), model(x))
    stride[:] = 2, 2
    assert torch.equal(ours(x), model(x))


class SameWithTwoKernels(torch.nn.Module):
    """One call site, weights of two sizes, and a padding that depends on them."""

    def __init__(self):
        super().__init__()
        self.small, self.large = (nn.Parameter(torch.randn(8, 4, k, k)) for k in (3, 5))

    def forward(self, x, large):
        return F.conv2d(x, self.large if large else self.small, padding="same")


def test_padding_the_same_follows_the_kernel():
    model = SameWithTwoKernels()
    ours = ssprop_fx.transform(model, ssprop_fx.Policy(schedule={"kind": "constant"}))
    x = torch.randn(2, 4, 9, 9)
    for large in (False, True, False):
        assert torch.equal(ours(x, large), model(x, large))
