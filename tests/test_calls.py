"""Functional convolutions: wherever they are called from, each is rewritten once, under a name that rules can use."""

import copy
import functools
import pickle

import functional_helpers
import pytest
import torch
import torch.nn.functional as F
from functional_helpers import Projector, blur
from torch import nn
from transforming import Functional, Plain, image, layers, policy, ready, same, small, step, zero_rows

import ssprop_fx
from ssprop_fx import Policy, PolicyError
from ssprop_fx.coverage import measure
from ssprop_fx.transform import transform, transformation_of

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.nn.utils.weight_norm.*", "ignore:.*torch.jit.*")


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


class Adapted(nn.Module):
    """Computes nothing itself; its hooks do."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 3, 3, 3))

    def adapt(self, x):
        return F.conv2d(x, self.weight)

    def forward(self, x, scale=1):
        return x * scale


def before(module, args):
    return F.conv2d(args[0], module.weight)


def before_with_keywords(module, args, kwargs):
    return (F.conv2d(args[0], module.weight),), kwargs


def after(module, args, output):
    return F.conv2d(output, module.weight)


def after_with_keywords(weight, module, args, kwargs, output):
    return F.conv2d(output, weight if weight is not None else module.weight)


def after_by_method(module, args, output):
    return module.adapt(output)


HOOKS = {
    "before": lambda m: m.register_forward_pre_hook(before),
    "before, keywords": lambda m: m.register_forward_pre_hook(before_with_keywords, with_kwargs=True),
    "after": lambda m: m.register_forward_hook(after),
    "after, keywords": lambda m: m.register_forward_hook(functools.partial(after_with_keywords, None), with_kwargs=True),
    "always": lambda m: m.register_forward_hook(after, always_call=True),
    "method": lambda m: m.register_forward_hook(after_by_method),
}


@pytest.mark.parametrize("hook", HOOKS)
def test_hook_that_convolves_is_rewritten(hook):
    torch.manual_seed(0)
    original = nn.Sequential(nn.Identity(), Adapted())
    original[1].handle = HOOKS[hook](original[1])
    expected, dense = step(original)
    model = transform(original, policy())
    for ours in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        output, sparse = step(ours)
        assert torch.equal(output, expected)
        assert zero_rows(sparse["1.weight"]) == 4
        assert list(transformation_of(ours).sites) == ["1#conv2d.0"]
        measured = measure(ours, image())
        assert (measured.sparse, measured.dense) == (1, 1)
    assert same(step(original)[1], dense)
    assert torch.equal(torch.compile(model, backend="eager")(image()), expected)
    model[1].handle.remove()
    assert torch.equal(model(image()), image())
    assert torch.equal(original(image()), expected)


def test_hook_that_convolves_is_no_call_of_its_layer():
    model = nn.Sequential(nn.Conv2d(3, 3, 3))
    weight = nn.Parameter(torch.randn(8, 3, 3, 3))
    model[0].register_forward_hook(lambda module, args, output: F.conv2d(output, weight))
    model = transform(model, policy(rules=[{"layers": "0#conv2d.0", "drop_rate": 0}]))
    assert {name: site.settings.drop_rate for name, site in transformation_of(model).sites.items()} == {"0": 0.5}
    assert layers(model) == ["0", "0#conv2d.0"]
    assert transformation_of(model).sites["0#conv2d.0"].settings.drop_rate == 0


def test_hook_that_does_not_convolve_is_left_alone():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), Adapted())
    hooks = [lambda module, args, output: output * 2, after]
    for hook in hooks:
        model[1].register_forward_hook(hook)
    plain, convolving = transform(model, policy())[1]._forward_hooks.values()
    assert plain is hooks[0]
    assert convolving is not hooks[1]


class Uncopied:
    def __deepcopy__(self, memo):
        raise RuntimeError("there is only one")


def test_hook_that_cannot_be_copied_is_rewritten_on_the_copy_alone():
    original = nn.Sequential(Adapted())
    hook = Free()
    hook.kept = Uncopied()
    original[0].register_forward_hook(hook)
    model = transform(original, policy())
    assert list(original[0]._forward_hooks.values()) == [hook]
    assert measure(model, image()).sparse == 1
    assert len(model[0]._forward_hooks) == 1  # measuring puts its own on copies


class Free(nn.Module):
    """A hook that is a module."""

    def forward(self, module, args, output):
        return F.conv2d(output, module.weight)
