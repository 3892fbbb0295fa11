"""C5 and C9: the transformed model is the user's model, with another backward pass, and nothing else."""

import copy
import functools
import inspect
import io
import pickle
import threading
import types

import functional_helpers
import pytest
import torch
import torch.nn.functional as F
from functional_helpers import Projector, blur
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import ssprop_fx
from ssprop_fx import Policy, PolicyError, TransformError
from ssprop_fx.convolutions import CONVOLUTIONS
from ssprop_fx.coverage import measure
from ssprop_fx.transform import transform, transformation_of

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.nn.utils.weight_norm.*", "ignore:.*torch.jit.*")


def policy(rate=0.5, round_to=1, **contents):
    contents = {"schedule": {"kind": "constant"}} | contents
    return Policy(drop_rate=rate, round_to=round_to, **contents)


def small(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.LazyLinear(4)
    )


def image(seed=1, batch=2, size=6, dtype=torch.float32, channels=3):
    torch.manual_seed(seed)
    return torch.randn(batch, channels, size, size, dtype=dtype)


def ready(model, x=None):
    """The model with its lazy modules materialised."""
    with torch.no_grad():
        model.eval()(image() if x is None else x)
    return model.train()


def step(model, x=None, **arguments):
    """Output and gradients by name of one step; gradients are reset."""
    model.zero_grad()
    output = model(image() if x is None else x, **arguments)
    output.float().square().sum().backward()
    grads = {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    return output.detach(), grads


def same(a, b):
    assert a.keys() == b.keys()
    return all(torch.equal(a[k], b[k]) if a[k] is not None else b[k] is None for k in a)


def zero_rows(grad):
    return int((grad.flatten(1).abs().sum(1) == 0).sum())


def assert_sparse(model, weight="0.weight", x=None, rows=4):
    _, grads = step(model, x)
    assert zero_rows(grads[weight]) == rows


def layers(model, x=None):
    """Layer names after a step."""
    step(model, x)
    return list(transformation_of(model).sites)


# --- it is the same model -----------------------------------------------------------------------------------


class Custom(nn.Module):
    """Attributes of many kinds, and methods that use them."""

    registry: list = []  # noqa: RUF012

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.ModuleList([nn.Conv2d(8, 8, 1) for _ in range(2)])
        self.norm = nn.BatchNorm2d(8)
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("hidden", torch.zeros(2), persistent=False)
        self.last = self.blocks[-1]
        self.forms = {"stem": self.stem, "names": ["a", "b"]}
        self.lock = threading.Lock()
        self.calls = 0
        self.anchor = torch.arange(3.0)

    def forward(self, x, double=False):
        self.calls += 1
        x = self.norm(self.stem(x))
        for block in self.blocks:
            x = x + block(x).relu()
        return x * self.scale * (2 if double else 1)

    def describe(self):
        return f"{type(self).__name__} called {self.calls} times"


def test_class_keys_attributes_and_methods_are_the_same():
    original = Custom()
    model = transform(original, policy())
    assert type(model) is Custom
    assert list(model.state_dict()) == list(original.state_dict())
    assert [n for n, _ in model.named_modules()] == [n for n, _ in original.named_modules()]
    assert [type(m) for m in model.modules()] == [type(m) for m in original.modules()]
    assert repr(model) == repr(original)
    assert model.lock is original.lock
    model(image(), double=True)
    assert model.describe() == "Custom called 1 times"
    assert original.describe() == "Custom called 0 times"
    assert set(vars(original)) < set(vars(model))


def test_parameters_and_buffers_are_shared_and_modules_are_not():
    original = Custom()
    model = transform(original, policy())
    for (a, p), (b, q) in zip(model.named_parameters(), original.named_parameters(), strict=True):
        assert a == b
        assert p is q
    for (a, p), (b, q) in zip(model.named_buffers(), original.named_buffers(), strict=True):
        assert a == b
        assert p is q
    assert not {id(m) for m in model.modules()} & {id(m) for m in original.modules()}
    assert model.anchor is original.anchor


def test_references_between_modules_lead_to_the_copies():
    model = transform(Custom(), policy())
    assert model.last is model.blocks[1]
    assert model.forms["stem"] is model.stem
    assert model.forms["names"] == ["a", "b"]


def test_original_still_runs_dense():
    original = ready(small())
    _, before = step(original)
    model = transform(original, policy())
    _, after = step(original)
    assert same(before, after)
    assert_sparse(model)
    assert zero_rows(step(original)[1]["0.weight"]) == 0
    assert "_conv_forward" not in vars(original[0])


def test_forward_is_bit_equal_in_train_and_eval_mode():
    original = ready(small())
    model = transform(original, policy())
    for mode in (True, False):
        state = copy.deepcopy(original.state_dict())
        expected = original.train(mode)(image())
        after = copy.deepcopy(original.state_dict())
        original.load_state_dict(state)
        assert torch.equal(model.train(mode)(image()), expected)
        assert all(torch.equal(model.state_dict()[k], v) for k, v in after.items())  # running statistics too


def test_optimizer_of_either_trains_both():
    original = ready(small())
    model = transform(original, policy())
    optimizer = torch.optim.SGD(original.parameters(), lr=0.1)
    before = original[0].weight.detach().clone()
    model(image()).sum().backward()
    optimizer.step()
    assert not torch.equal(before, original[0].weight)
    assert torch.equal(model(image()), original(image()))


def test_torchvision_resnet18_is_the_same_model_with_sparse_gradients():
    import torchvision

    torch.manual_seed(0)
    original = torchvision.models.resnet18(weights=None)
    model = transform(original, policy(0.8))
    x = image(size=32)
    state = copy.deepcopy(original.state_dict())
    expected, dense = step(original, x)
    original.load_state_dict(state)
    output, sparse = step(model, x)
    assert torch.equal(output, expected)
    assert type(model) is type(original)
    assert list(model.state_dict()) == list(original.state_dict())
    assert zero_rows(sparse["layer4.1.conv2.weight"]) == 512 - int(0.2 * 512 + 1e-6)
    assert zero_rows(dense["layer4.1.conv2.weight"]) == 0
    assert torch.equal(sparse["fc.weight"], dense["fc.weight"])
    assert measure(model, x).coverage == 1.0


def test_zero_rate_makes_the_models_own_call():
    original = ready(small())
    for chosen in (policy(0.0), policy(0.8, schedule={"kind": "constant", "end": 0.0})):
        model = transform(original, chosen)
        original.eval()
        model.eval()
        expected, output = original(image()), model(image())
        assert output.grad_fn.name() == expected.grad_fn.name()
        found, queue = set(), [model[:4](image()).grad_fn]
        while queue:
            node = queue.pop()
            found.add(node.name())
            queue += [n for n, _ in node.next_functions if n is not None]
        assert "ConvolutionBackward0" in found
        assert not any("_Convolution" in name for name in found)
        assert same(step(original)[1], step(model)[1])


def test_rate_follows_the_clock_between_steps():
    original = ready(small()).eval()
    chosen = Policy(drop_rate=0.5, round_to=1, schedule={"kind": "bar", "period": 2})
    model = transform(original, chosen)
    _, dense = step(original)
    for t in range(4):
        _, grads = step(model)
        assert same(grads, dense) == (t % 2 == 0)
        chosen.step()


def test_rate_is_the_one_when_the_forward_ran():
    original = ready(small()).eval()
    chosen = Policy(drop_rate=0.5, round_to=1, schedule={"kind": "bar", "period": 2})
    chosen.step()
    model = transform(original, chosen)
    output = model(image())
    chosen.step()
    output.square().sum().backward()
    assert zero_rows(model[0].weight.grad) == 4


# --- hooks and computed weights -----------------------------------------------------------------------------


def test_hooks_run_on_the_copy():
    original, seen = small(), []
    ready(original)
    conv = original[0]
    conv.register_forward_pre_hook(lambda m, a: seen.append(("pre", m)))
    conv.register_forward_hook(lambda m, a, o: seen.append(("forward", m)))
    conv.register_full_backward_pre_hook(lambda m, g: seen.append(("backward pre", m)))
    conv.register_full_backward_hook(lambda m, gi, go: seen.append(("backward", m)))
    original.register_forward_hook(lambda m, a, o: o * 2)
    model = transform(original, policy())
    output, _ = step(model)
    assert [name for name, _ in seen] == ["pre", "forward", "backward pre", "backward"]
    assert all(m is model[0] for _, m in seen)
    seen.clear()
    assert torch.equal(output, step(original)[0])
    assert all(m is conv for _, m in seen)


def test_hooks_added_later_run_on_the_module_that_they_were_added_to():
    original = ready(small())
    model, seen = transform(original, policy()), []
    handle = model[0].register_forward_hook(lambda m, a, o: seen.append(m))
    original(image())
    assert seen == []
    model(image())
    assert seen == [model[0]]
    handle.remove()
    model(image())
    assert len(seen) == 1


def test_parameter_hooks_see_the_sparse_gradient():
    model, seen = transform(ready(small()), policy()), []
    model[0].weight.register_hook(lambda g: seen.append(zero_rows(g)))
    model[0].weight.register_post_accumulate_grad_hook(lambda p: seen.append(zero_rows(p.grad)))
    step(model)
    assert seen == [4, 4]


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


# --- subclasses and replaced forwards -----------------------------------------------------------------------


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


class TwoCalls(nn.Conv2d):
    def forward(self, x):
        first = F.conv2d(x, self.weight, self.bias, padding=self.padding)
        return first + F.conv2d(x, self.weight.flip(-1), self.bias, padding=self.padding)


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
        (lambda: TwoCalls(3, 8, 3), ["0", "0#conv2d.1"]),
        (lambda: Up(3, 8, 3), ["0"]),
    ],
    ids=["causal", "standardised", "inside", "conv_forward", "two calls", "transposed"],
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


# --- functional convolutions --------------------------------------------------------------------------------


class Functional(nn.Module):
    def __init__(self, function=None):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 3, 3, 3))
        self.function = function

    def call(self, x):
        return self.function(x, self.weight)

    def forward(self, x):
        return self.call(x)


class Plain(Functional):
    def call(self, x):
        return F.conv2d(x, self.weight)


class Getattr(Functional):
    def call(self, x):
        dimensions = self.weight.dim() - 2
        return getattr(F, f"conv{dimensions}d")(x, self.weight)


class Renamed(Functional):
    def call(self, x):
        return torch.conv2d(input=x, weight=self.weight)


class Aten(Functional):
    def call(self, x):
        return torch.convolution(x, self.weight, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1)


class AtenOverload(Functional):
    def call(self, x):
        return torch.ops.aten.convolution.default(x, self.weight, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1)


class InTable(Functional):
    def __init__(self):
        super().__init__({"one": F.conv1d, "two": F.conv2d})

    def call(self, x):
        return self.function["two"](x, self.weight)


class Closure(Functional):
    def __init__(self):
        super().__init__()
        stride = 1

        def function(x, w):
            return F.conv2d(x, w, stride=stride)

        self.function = function


class ByHelperModule(Functional):
    def call(self, x):
        return functional_helpers.blur(x[:, :1].repeat(1, 8, 1, 1), self.weight[:, :1])


class ByHelperFunction(Functional):
    def call(self, x):
        return blur(x[:, :1].repeat(1, 8, 1, 1), self.weight[:, :1])


class ByMethodOfObject(Functional):
    def call(self, x):
        return self.function.run(x, self.weight)


class ImportedInside(Functional):
    def call(self, x):
        from functional_helpers import blur as inner

        return inner(x[:, :1].repeat(1, 8, 1, 1), self.weight[:, :1])


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 3, 3, 3))

    def encode(self, x):
        return F.conv2d(x, self.weight)

    def forward(self, x):
        raise AssertionError


class ByMethodOfChild(nn.Module):
    def __init__(self):
        super().__init__()
        self.child = Encoder()

    def forward(self, x):
        return self.child.encode(x)


CALLERS = {
    "plain": Plain,
    "stored function": lambda: Functional(F.conv2d),
    "partial": lambda: Functional(functools.partial(F.conv2d, stride=1)),
    "closure": Closure,
    "table": InTable,
    "getattr": Getattr,
    "torch.conv2d by keyword": Renamed,
    "function of another module": ByHelperModule,
    "imported function": ByHelperFunction,
    "function imported in forward": ImportedInside,
    "callable object": lambda: Functional(Projector()),
    "method of an object": lambda: ByMethodOfObject(Projector()),
    "method of a child": ByMethodOfChild,
    "torch.convolution": Aten,
    "aten.convolution": AtenOverload,
}


@pytest.mark.parametrize("kind", CALLERS)
def test_functional_convolution_is_rewritten_wherever_it_is_called_from(kind):
    torch.manual_seed(0)
    original = nn.Sequential(CALLERS[kind]())
    model = transform(original, policy())
    expected, dense = step(original)
    output, sparse = step(model)
    assert torch.equal(output, expected)
    (weight,) = sparse
    assert zero_rows(dense[weight]) == 0
    assert zero_rows(sparse[weight]) == 4
    (name,) = transformation_of(model).sites
    assert name == "0#conv2d.0"
    assert measure(model, image()).coverage == 1.0


def test_functional_calls_are_numbered_in_their_order_and_named_in_rules():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = (nn.Parameter(torch.randn(8, 8, 1, 1)) for _ in range(2))
            self.stem = nn.Conv2d(3, 8, 1)

        def forward(self, x):
            return F.conv2d(F.conv2d(self.stem(x), self.a).relu(), self.b)

    chosen = policy(rules=[{"layers": "#conv2d.1", "drop_rate": 0}, {"layers": "stem", "drop_rate": 0.25}])
    model = transform(Two(), chosen)
    _, grads = step(model)
    assert list(transformation_of(model).sites) == ["stem", "#conv2d.0", "#conv2d.1"]
    assert zero_rows(grads["stem.weight"]) == 2
    assert zero_rows(grads["a"]) == 4
    assert zero_rows(grads["b"]) == 0


def test_nested_callers_rewrite_each_call_once():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.conv = Plain(), nn.Conv2d(8, 8, 1)
            self.weight = nn.Parameter(torch.randn(8, 8, 1, 1))

        def forward(self, x):
            return F.conv2d(self.conv(self.inner(x)), self.weight)

    model = transform(Outer(), policy())
    x = image()
    assert layers(model, x) == ["conv", "inner#conv2d.0", "#conv2d.0"]
    measured = measure(model, x)
    assert measured.coverage == 1.0
    assert measured.calls == {"conv": 1, "inner#conv2d.0": 1, "#conv2d.0": 1}


def test_modules_without_functional_calls_are_left_alone():
    model = transform(ready(small()), policy())
    assert "forward" not in vars(model)
    assert not any("forward" in vars(m) for m in model.modules())


def test_shared_module_is_one_layer_called_twice():
    conv = nn.Conv2d(3, 3, 3, padding=1)
    original = nn.Sequential(conv, nn.ReLU(), conv)
    model = transform(original, policy(0.6))
    assert model[0] is model[2]
    output, sparse = step(model)
    assert torch.equal(output, original(image()))
    assert list(transformation_of(model).sites) == ["0"]
    assert measure(model, image()).calls == {"0": 2}
    assert 0 <= zero_rows(sparse["0.weight"]) < 3  # each call chose for itself


# --- copies -------------------------------------------------------------------------------------------------


def manual():
    return Policy(drop_rate=0.5, round_to=1, schedule={"kind": "bar", "period": 2})


@pytest.mark.parametrize("make", [lambda: ready(small()), lambda: nn.Sequential(Plain())], ids=["module", "functional"])
def test_deepcopy_is_sparse_independent_and_on_the_same_clock(make):
    chosen = manual()
    model = transform(make(), chosen)
    copied = copy.deepcopy(model)
    weight = next(iter(dict(model.named_parameters())))
    assert zero_rows(step(copied)[1][weight]) == 0
    chosen.step()
    assert_sparse(copied, weight)
    assert not {id(p) for p in copied.parameters()} & {id(p) for p in model.parameters()}
    with torch.no_grad():
        for p in copied.parameters():
            p.zero_()
    assert not copied(image()).any()
    assert model(image()).any()


@pytest.mark.parametrize("way", ["pickle", "torch.save"])
@pytest.mark.parametrize("make", [lambda: ready(small()), lambda: nn.Sequential(Plain())], ids=["module", "functional"])
def test_saved_model_is_sparse_and_on_its_own_clock(make, way):
    chosen = manual()
    chosen.step()
    model = transform(make(), chosen)
    if way == "pickle":
        loaded = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
    weight = next(iter(dict(model.named_parameters())))
    for key, value in loaded.state_dict().items():
        assert torch.equal(value, model.state_dict()[key])
    assert_sparse(loaded, weight)
    chosen.step()
    assert_sparse(loaded, weight)  # it did not advance
    assert zero_rows(step(model)[1][weight]) == 0
    own = transformation_of(loaded).policy
    assert own.digest == chosen.digest
    own.step()
    assert zero_rows(step(loaded)[1][weight]) == 0


def test_state_dict_goes_both_ways():
    original = ready(small())
    model = transform(ready(small(seed=5)), policy())
    model.load_state_dict(original.state_dict())
    assert torch.equal(model.eval()(image()), original.eval()(image()))
    ready(small(seed=6)).load_state_dict(model.state_dict())


def test_to_changes_type_and_layout():
    model = transform(ready(small()), policy())
    model.to(torch.float64)
    assert model(image(dtype=torch.float64)).dtype == torch.float64
    assert_sparse(model, x=image(dtype=torch.float64))
    model.to(torch.bfloat16)
    assert_sparse(model, x=image(dtype=torch.bfloat16))
    model.to(torch.float32).to(memory_format=torch.channels_last)
    assert_sparse(model, x=image().to(memory_format=torch.channels_last))
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_ema_copy_averages_and_evaluates():
    chosen = policy()
    model = transform(ready(small()), chosen)
    averaged = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    before = [p.detach().clone() for p in model.parameters()]
    averaged.update_parameters(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(image()).sum().backward()
    optimizer.step()
    averaged.update_parameters(model)
    for p, old, new in zip(averaged.module.parameters(), before, model.parameters(), strict=True):
        torch.testing.assert_close(p, (old + new) / 2)
    with torch.no_grad():
        averaged.eval()(image())
    assert_sparse(averaged.module)


def test_functional_call_uses_the_tensors_that_it_is_given():
    original = ready(small()).eval()
    model = transform(original, policy())
    tensors = {k: v.detach().clone() * 0.5 for k, v in model.named_parameters()}
    leaf = tensors["0.weight"].requires_grad_()
    output = torch.func.functional_call(model, tensors, image())
    assert torch.equal(output, torch.func.functional_call(original, tensors, image()))
    output.square().sum().backward()
    assert zero_rows(leaf.grad) == 4
    assert model[0].weight.grad is None


def test_two_policies_train_one_model_apart():
    original = ready(small())
    first, second = transform(original, policy(0.5)), transform(original, policy(0.75))
    assert zero_rows(step(first)[1]["0.weight"]) == 4
    assert zero_rows(step(second)[1]["0.weight"]) == 6


# --- switches stay live -------------------------------------------------------------------------------------


def test_switches_inside_stay_live():
    original = ready(small()).eval()
    model = transform(original, policy())
    with torch.no_grad():
        assert not model(image()).requires_grad
        assert torch.equal(model(image()), original(image()))
    with torch.inference_mode():
        assert model(image()).is_inference()
    model[0].weight.requires_grad_(False)
    assert original[0].weight.requires_grad is False  # shared
    _, grads = step(model)
    assert grads["0.weight"] is None
    assert grads["0.bias"].eq(0).sum() == 4
    model.requires_grad_(False)
    assert not model(image()).requires_grad
    x = image().requires_grad_()
    model(x).sum().backward()
    assert x.grad.ne(0).any()


def test_switches_in_the_models_own_forward_stay_live():
    class Switched(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3)
            self.drop = nn.Dropout(0.5)

        def forward(self, x):
            with torch.no_grad():
                frozen = self.a(x)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                y = self.b(x)
            return self.drop(y) + frozen if self.training else y

    original = Switched()
    model = transform(original, policy())
    torch.manual_seed(3)
    expected, _ = step(original)
    torch.manual_seed(3)
    output, grads = step(model)
    assert torch.equal(output, expected)
    assert grads["a.weight"] is None
    assert zero_rows(grads["b.weight"]) == 4
    assert model.eval()(image()).dtype == torch.bfloat16


def test_gradients_through_an_autograd_function_are_its_own():
    class Halved(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, w):
            ctx.save_for_backward(x, w)
            return F.conv2d(x, w)

        @staticmethod
        def backward(ctx, g):
            return None, torch.full_like(ctx.saved_tensors[1], 0.5)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 3, 3, 3))
            self.conv = nn.Conv2d(8, 8, 1)

        def forward(self, x):
            return self.conv(Halved.apply(x, self.weight) + F.conv2d(x, self.weight.detach()))

    model = transform(Model(), policy())
    _, grads = step(model)
    assert grads["weight"].eq(0.5).all()
    assert zero_rows(grads["conv.weight"]) == 4


# --- training practice (C9) ---------------------------------------------------------------------------------


class Checkpointed(nn.Module):
    def __init__(self, reentrant=None):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 64, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.GroupNorm(4, 64), nn.ReLU(), nn.Conv2d(64, 64, 1))
            for _ in range(3)
        )
        self.reentrant = reentrant

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        return x


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("round_to", [1, "auto"])
def test_checkpointed_gradients_equal_those_without(reentrant, round_to):
    _, expected = step(transform(Checkpointed(), policy(0.7, round_to)))
    model = transform(Checkpointed(reentrant), policy(0.7, round_to))
    for _ in range(2):
        _, got = step(model)
        assert same(got, expected)
    assert zero_rows(expected["stem.weight"]) > 0


def test_checkpoint_sequential_works_on_the_result():
    model = transform(nn.Sequential(*(nn.Conv2d(8, 8, 3, padding=1) for _ in range(4))), policy())
    x = image(channels=8).requires_grad_()
    _, expected = step(model, x)
    checkpoint_sequential(model, 2, x, use_reentrant=False).square().sum().backward()
    assert same({n: p.grad for n, p in model.named_parameters()}, expected)


def test_accumulated_gradients_are_the_sum():
    model = transform(ready(small()).eval(), policy())
    parts = [step(model, image(seed=i))[1] for i in range(3)]
    for i in range(3):
        model(image(seed=i)).square().sum().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, sum(g[name] for g in parts))


def test_several_forwards_before_their_backwards():
    model = transform(ready(small()).eval(), policy())
    parts = [step(model, image(seed=i))[1] for i in range(2)]
    outputs = [model(image(seed=i)) for i in range(2)]
    for output in reversed(outputs):
        output.square().sum().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, parts[0][name] + parts[1][name])


@pytest.mark.parametrize("criterion", ["l1", "taylor"])
def test_graph_can_be_retained(criterion):
    model = transform(ready(small()).eval(), policy(criterion=criterion))
    loss = model(image()).square().sum()
    loss.backward(retain_graph=True)
    once = {n: p.grad.clone() for n, p in model.named_parameters()}
    loss.backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, 2 * once[name], rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_changed_weight_between_forward_and_backward_is_noticed():
    model = transform(ready(small()).eval(), policy())
    loss = model(image()).sum()
    with torch.no_grad():
        model[3].weight.mul_(2)
    with pytest.raises(RuntimeError, match="inplace operation"):
        loss.backward()


@pytest.mark.parametrize("criterion", ["l1", "l2", "taylor", "random"])
def test_grad_scaler_sees_an_overflow(criterion):
    model = transform(ready(small()).eval(), policy(0.8, criterion=criterion))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    before = [p.detach().clone() for p in model.parameters()]
    output = model(image())
    poison = torch.ones_like(output)
    poison[0, 2] = float("inf")
    scaler.scale((output * poison).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 4.0
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    optimizer.zero_grad()
    scaler.scale(model(image()).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 4.0
    assert not all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))


def test_overflow_in_one_channel_of_a_hidden_layer_reaches_its_gradient():
    model = transform(ready(small()).eval(), policy(0.8))
    model[3].register_full_backward_pre_hook(lambda m, g: (g[0].index_fill(1, torch.tensor([5]), float("nan")),))
    _, grads = step(model)
    assert grads["3.weight"][5].isnan().all()
    assert grads["0.weight"].isnan().any()


def test_autocast_dense_phase_is_bit_equal_and_sparse_phase_is_sparse():
    original = ready(small()).eval()
    model = transform(original, Policy(drop_rate=0.5, round_to=1, schedule={"kind": "bar", "period": 2}))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, dense = step(original)
        output, grads = step(model)
        assert torch.equal(output, expected)
        assert same(grads, dense)
        transformation_of(model).policy.step()
        output, grads = step(model)
    assert torch.equal(output, expected)
    assert output.dtype == torch.bfloat16
    assert zero_rows(grads["0.weight"]) == 4
    assert grads["0.weight"].dtype == torch.float32


def test_double_backward_through_the_model():
    original = ready(small().double(), image(dtype=torch.float64)).eval()
    model = transform(original, policy())
    x = image(dtype=torch.float64).requires_grad_()
    (g,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    g.square().sum().backward()
    assert zero_rows(model[3].weight.grad) == 4  # of a dropped channel nothing depends on the weight


# --- refusals -----------------------------------------------------------------------------------------------


def test_refuses_a_model_without_convolutions_and_lists_what_it_holds():
    with pytest.raises(TransformError, match=r"Sequential has no convolution.*2 × Linear, 1 × ReLU"):
        transform(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)), policy())


def test_refuses_lazy_modules_by_name_and_says_what_to_do():
    with pytest.raises(TransformError, match=r"1 is a lazy module.*forward pass"):
        transform(nn.Sequential(nn.ReLU(), nn.LazyConv2d(8, 3)), policy())


def test_lazy_linear_layers_are_none_of_its_business():
    model = transform(small(), policy())
    ready(model)
    assert_sparse(model)


def test_refuses_scripted_transformed_compiled_and_wrapped_models():
    model = nn.Sequential(nn.Conv2d(3, 8, 3))
    with pytest.raises(TransformError, match="scripted or traced"):
        transform(torch.jit.script(model), policy())
    with pytest.raises(TransformError, match="transformed already"):
        transform(transform(model, policy()), policy())
    with pytest.raises(TransformError, match="transformed already"):
        transform(nn.Sequential(transform(model, policy())), policy())
    with pytest.raises(TransformError, match=r"already compiled.*transform first"):
        transform(torch.compile(model), policy())
    inner = nn.Sequential(nn.Conv2d(3, 8, 3))
    inner[0].compile()
    with pytest.raises(TransformError, match="already compiled"):
        transform(inner, policy())
    with pytest.raises(TransformError, match=r"wrapped in DataParallel.*wrap its result"):
        transform(nn.DataParallel(model), policy())


@pytest.mark.parametrize("thing", [nn.Conv2d, lambda x: x, 3, None])
def test_refuses_what_is_no_module(thing):
    with pytest.raises(TransformError, match=r"takes a torch\.nn\.Module") as error:
        transform(thing, policy())
    assert ("on the instance, not on the class" in str(error.value)) == (thing is nn.Conv2d)


def test_refuses_rules_that_match_nothing_and_names_the_nearest():
    with pytest.raises(PolicyError, match=r"blocks\.3.*Nearest: blocks\.[01]"):
        transform(Custom(), policy(rules=[{"layers": "blocks.3", "drop_rate": 0.5}]))
    with pytest.raises(PolicyError, match="conv3d"):
        transform(Custom(), policy(rules=[{"kind": "conv3d", "drop_rate": 0.5}]))
    transform(Custom(), policy(rules=[{"layers": "blocks.3", "drop_rate": 0.5, "optional": True}]))


def test_scripted_part_is_named_and_the_rest_is_rewritten():
    original = nn.Sequential(nn.Conv2d(3, 8, 3), torch.jit.script(nn.Sequential(nn.Conv2d(8, 8, 1))))
    model = transform(original, policy())
    assert torch.equal(model(image()), original(image()))
    assert_sparse(model)
    report = ssprop_fx.inspect(model)
    assert [r.layer for r in report.rows if not r.rewritten] == ["1.0"]
    assert "scripted" in report["1.0"].reason
    assert measure(model, image()).coverage == 0.5


def test_meta_device_works():
    with torch.device("meta"):
        original = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 4, 2))
    model = transform(original, policy())
    output = model(torch.empty(2, 3, 6, 6, device="meta"))
    assert output.shape == (2, 4, 5, 5)
    output.sum().backward()
    assert model[0].weight.grad.shape == (8, 3, 3, 3)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for p in model.parameters():
            p.normal_()
    assert_sparse(model)


@pytest.mark.parametrize("given", [None, {"drop_rate": 0.5}, "file"])
def test_policy_may_be_default_mapping_or_file(given, tmp_path):
    if given == "file":
        (tmp_path / "policy.yaml").write_text("drop_rate: 0.5\n")
        given = str(tmp_path / "policy.yaml")
    model = transform(nn.Sequential(nn.Conv2d(3, 8, 3)), given)
    assert transformation_of(model).policy.drop_rate == (0.8 if given is None else 0.5)


def test_forward_keeps_its_signature():
    """Trainers choose which columns of a data set to pass on by the names of forward's arguments."""

    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 4, 3)

        def forward(self, pixels, labels=None, *, scale: float = 1.0):
            return F.conv2d(self.conv(pixels), torch.ones(1, 4, 1, 1)) * scale

    model = ssprop_fx.transform(Root(), Policy())
    assert inspect.signature(model.forward) == inspect.signature(Root().forward)
    assert inspect.signature(copy.deepcopy(model).forward) == inspect.signature(Root().forward)


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


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_functional_call_of_several_kinds_follows_the_rule_of_each(order):
    class Sampled(nn.Module):
        def __init__(self):
            super().__init__()
            self.depthwise, self.full = nn.Parameter(torch.randn(10, 1, 3, 3)), nn.Parameter(torch.randn(10, 10, 3, 3))

        def forward(self, x, which):
            return F.conv2d(x, self.full) if which else F.conv2d(x, self.depthwise, groups=10)

    rules = [{"kind": "depthwise", "drop_rate": 0}]
    chosen = Policy(drop_rate=0.8, round_to=1, schedule={"kind": "constant"}, rules=rules)
    model = ssprop_fx.transform(Sampled(), chosen)
    for which in (*order, *order):
        model(torch.randn(2, 10, 8, 8), which).square().sum().backward()
    rows = [int((w.grad.flatten(1).abs().sum(1) > 0).sum()) for w in (model.depthwise, model.full)]
    assert rows[0] == 10
    assert rows[1] <= 4  # two in each of two steps
    first, second = order
    names = ("#conv2d.0:depthwise+grouped", "#conv2d.0:full")
    rates = {row.layer: row.drop_rate for row in ssprop_fx.inspect(model).rows}
    assert rates == {"#conv2d.0": (0, 0.8)[first], names[second]: (0, 0.8)[second]}


def test_a_rule_may_name_any_functional_call_and_only_wrong_rules_are_at_fault():
    class Many(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4, 1, 1))

        def forward(self, x):
            for _ in range(12):
                x = F.conv2d(x, self.weight).tanh()
            return x

    rules = [{"layers": "#conv2d.11", "drop_rate": 0}, {"kind": "functional", "criterion": "l2"}]
    chosen = Policy(drop_rate=0.5, schedule={"kind": "constant"}, rules=rules[:1])
    model = ssprop_fx.transform(Many(), chosen)
    model(torch.randn(2, 4, 6, 6)).sum().backward()
    assert (chosen.drop_rates()["#conv2d.11"], chosen.drop_rates()["#conv2d.10"]) == (0, 0.5)
    with pytest.raises(PolicyError) as error:
        ssprop_fx.transform(Many(), Policy(rules=[rules[1], {"layers": "nope", "drop_rate": 0}]))
    assert [problem.key for problem in error.value.problems] == ["rules[1]"]


def test_what_a_module_keeps_in_slots_is_there_in_the_copy():
    class Slotted(nn.Module):
        __slots__ = ("__hidden", "scale")

        def __init__(self):
            super().__init__()
            self.conv, self.scale, self.__hidden = nn.Conv2d(3, 8, 3), 3, [2]

        def forward(self, x):
            return self.conv(x) * self.scale * self.__hidden[0]

    original, x = Slotted(), torch.randn(1, 3, 8, 8)
    assert torch.equal(ssprop_fx.transform(original, Policy(drop_rate=0.5))(x), original(x))
