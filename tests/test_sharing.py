"""The copy that ``transform`` makes: modules are new, tensors are the same, and what refers to a module refers to the new one."""

import collections
import contextlib
import copy
import enum
import functools
import logging
import tempfile
import threading
import types
import weakref

import pytest
import torch
from torch import nn

import ssprop_fx
from ssprop_fx import Policy, inspect, transform
from ssprop_fx.references import reachable

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def policy(**changes):
    return Policy(**({"drop_rate": 0.5, "round_to": 1, "schedule": {"kind": "constant"}} | changes))


class Hiding(nn.Module):
    """Modules and parameters where ``named_modules`` does not look."""

    def __init__(self):
        super().__init__()
        self.conv, self.hidden = nn.Conv2d(3, 8, 3), [nn.Conv2d(8, 8, 1)]
        self.table = {"a": {"b": nn.Parameter(torch.ones(1))}, "c": [[nn.Parameter(torch.ones(1))]]}

    def forward(self, x):
        return self.hidden[0](self.conv(x)) * self.table["a"]["b"] + self.table["c"][0][0]


def test_tensors_of_modules_in_plain_containers_are_shared():
    original = Hiding()
    model = transform(original, policy())
    assert model.hidden[0] is not original.hidden[0]
    assert model.hidden[0].weight is original.hidden[0].weight
    assert model.table["a"]["b"] is original.table["a"]["b"]
    assert model.table["c"][0][0] is original.table["c"][0][0]
    optimizer = torch.optim.SGD([*original.parameters(), *original.hidden[0].parameters()], 0.1)
    model(X).square().mean().backward()
    optimizer.step()
    assert torch.equal(model(X), original(X))


class Listener:
    def __init__(self, layer):
        self.heard = []
        layer.register_forward_hook(self.hear)

    def hear(self, module, arguments, output):
        self.heard.append(module)


class CallableListener(Listener):
    def __init__(self, layer):
        self.heard = []
        layer.register_forward_hook(self)

    __call__ = Listener.hear


class PartialListener:
    def __init__(self, layer):
        self.heard = []
        layer.register_forward_hook(functools.partial(self.hear, self.heard))

    @staticmethod
    def hear(heard, module, arguments, output):
        heard.append(module)


@pytest.mark.parametrize("listener", [Listener, CallableListener, PartialListener])
def test_whoever_listens_to_a_layer_hears_its_copy_and_nothing_of_an_inspection(listener):
    original = nn.Sequential(nn.Conv2d(3, 8, 3))
    outside = listener(original[0])
    model = transform(original, policy())
    inspect(model, X)
    assert outside.heard == []
    model(X)
    assert outside.heard == [model[0]]


class Inside(nn.Module):
    """Listens to its own layer; an attribute refers to the listener, too."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.listener = Listener(self.conv)

    def forward(self, x):
        return self.conv(x)


def test_a_listener_of_the_models_own_is_copied_with_it():
    original = Inside()
    model = transform(original, policy())
    model(X)
    assert (len(model.listener.heard), len(original.listener.heard)) == (1, 0)


class Keeping(nn.Module):
    """Keeps what its layer gives, and the handle of the hook for it."""

    def __init__(self):
        super().__init__()
        self.conv, self.kept = nn.Conv2d(3, 8, 3), []
        self.feature_hooks = {"conv": self.conv.register_forward_hook(self.keep)}

    def keep(self, module, arguments, output):
        self.kept.append(module)

    def forward(self, x):
        return self.conv(x)


def test_the_handle_of_a_hook_removes_that_of_the_copy():
    original = Keeping()
    model = transform(original, policy())
    model(X)
    assert (model.kept, original.kept) == ([model.conv], [])
    model.feature_hooks["conv"].remove()
    assert (len(original.conv._forward_hooks), len(model.conv._forward_hooks)) == (1, 0)
    assert model.conv._forward_hooks is not original.conv._forward_hooks


@pytest.mark.parametrize("listener", [Listener, CallableListener, PartialListener])
def test_a_handle_does_not_lead_to_who_else_listens(listener):
    original = Inside()
    outside = listener(original.conv)
    original.listener.handle = original.conv.register_forward_hook(original.listener.hear)
    model = transform(original, policy())
    model(X)
    assert outside.heard == [model.conv]
    assert (model.listener.heard, original.listener.heard) == ([model.conv] * 2, [])
    model.listener.handle.remove()
    assert (len(original.conv._forward_hooks), len(model.conv._forward_hooks)) == (3, 2)


class Helper:
    def __init__(self, owner):
        self.owner, self.lock = owner, threading.Lock()

    def __call__(self, x):
        with self.lock:
            return self.owner.bn(self.owner.conv(x))


class Holder:
    def __init__(self, owner):
        self.owner = owner

    def run(self, x):
        return self.owner.both(x)

    def whose(self):
        return self.owner


class Roundabout(nn.Module):
    """Comes to its layers through something that refers to the model itself."""

    def __init__(self, how):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        conv, holder = self.conv, Holder(self)
        self.call = {
            "closure": lambda x: self.bn(self.conv(x)),
            "closure of a method": self._closure(self.both),
            "closure of a layer": lambda x: self.bn(conv(x)),
            "default": lambda x, model=self: model.both(x),
            "closure over an object": self._closure(Helper(self)),
            "closure over objects in a list": self._through({"a": [Helper(self)]}),
            "default that is an object": lambda x, holder=holder: holder.run(x),
            "object with a lock": Helper(self),
            "partial": functools.partial(lambda model, x: model.both(x), self),
        }[how]

    @staticmethod
    def _closure(method):
        return lambda x: method(x)

    @staticmethod
    def _through(table):
        return lambda x: table["a"][0](x)

    def both(self, x):
        return self.bn(self.conv(x))

    def forward(self, x):
        return self.call(x)


WAYS = (
    "closure", "closure of a method", "closure of a layer", "closure over an object", "closure over objects in a list",
    "default", "default that is an object", "object with a lock", "partial",
)  # fmt: skip


@pytest.mark.parametrize("how", WAYS)
def test_roundabout_ways_lead_to_the_copy(how):
    original = Roundabout(how)
    model = transform(original, policy(rules=[{"layers": "conv", "drop_rate": 0.75}]))
    model(X).square().sum().backward()
    assert int((original.conv.weight.grad.flatten(1).abs().sum(1) > 0).sum()) == 2
    model.eval()
    assert original.bn.training
    assert torch.equal(model(X), original.eval()(X))
    report = inspect(model.train(), X)
    assert [row.layer for row in report.rows] == ["conv"]
    original.conv.weight.grad = None
    original.train()(X).square().sum().backward()
    assert (original.conv.weight.grad.flatten(1).abs().sum(1) > 0).all()


def test_a_method_with_a_cache_is_that_of_the_copy_with_a_cache_of_its_own():
    original = nn.Sequential(nn.Conv2d(3, 8, 3))
    original.itself = types.MethodType(lambda self: self, original)
    original.cached = functools.lru_cache(maxsize=3)(original.itself)
    original.kept = [functools.cache(Holder(original).whose)]
    original.closure = lambda cached=original.cached: cached()
    assert original.cached() is original.kept[0]() is original.closure() is original
    model = transform(original, policy())
    assert model.cached() is model.kept[0]() is model.closure() is model
    assert original.cached() is original
    assert model.cached.cache_parameters() == {"maxsize": 3, "typed": False}


def test_an_object_that_the_function_of_a_hook_refers_to_is_its_users():
    original = nn.Sequential(nn.Conv2d(3, 8, 3))
    collector, heard = Holder(original), []
    original[0].register_forward_hook(lambda *_: heard.append(collector.owner))
    original.data = Holder(None)
    original.of_data = lambda data=original.data: data
    model = transform(original, policy())
    model(X)
    assert heard == [original]
    assert model.of_data() is original.data


def test_what_cannot_be_copied_and_a_function_leads_to_is_named(caplog):
    original = nn.Sequential(nn.Conv2d(3, 8, 3))
    helper = Uncopyable(original)
    original.call = lambda x: helper.model(x)
    with caplog.at_level(logging.WARNING, "ssprop_fx"):
        transform(original, policy())
    assert "<lambda> refers to is shared, not copied, and what it calls of the model is the original" in caplog.text


def test_a_weak_reference_to_the_model_is_one_to_the_copy():
    original = nn.Sequential(nn.Conv2d(3, 8, 3))
    original.parent = original[0].parent = weakref.ref(original)
    model = transform(original, policy())
    assert model.parent() is model
    assert model[0].parent() is model
    assert original.parent() is original


@pytest.fixture(params=[False, True], ids=["", "newer"])
def newer(request, monkeypatch):
    """``copy.deepcopy`` as of Python 3.14: functions and weak references come back before it looks into its memo."""
    if request.param and not hasattr(copy, "_atomic_types"):
        plain = types.FunctionType(copy.deepcopy.__code__, vars(copy), "deepcopy", copy.deepcopy.__defaults__)
        monkeypatch.setattr(copy, "_plain", plain, raising=False)
        atomic = {types.FunctionType, weakref.ref}
        monkeypatch.setattr(copy, "_atomic_types", atomic, raising=False)
        for kind in atomic:
            monkeypatch.delitem(copy._deepcopy_dispatch, kind)
        code = (lambda x, memo=None, _nil=[]: x if type(x) in _atomic_types else _plain(x, memo)).__code__  # noqa: F821
        monkeypatch.setattr(copy.deepcopy, "__code__", code)


def test_functions_and_weak_references_inside_of_others_lead_to_the_copy(newer):
    original = Inside()
    model_of = lambda: original  # noqa: E731
    reference = weakref.ref(original)
    original.plain = [
        [model_of, reference],
        {"a": model_of},
        (model_of, (reference,)),
        collections.deque([model_of]),
        {reference},
    ]
    original.partial = functools.partial(model_of)
    original.factory = collections.defaultdict(model_of)
    original.kept = Holder(functools.partial(map, model_of))
    heard = []
    original.conv.register_forward_hook(lambda *_: heard.append(original))
    model = transform(original, policy())
    model(X)
    first, second, third, fourth, fifth = model.plain
    assert [first[0](), first[1](), second["a"](), third[0](), third[1][0](), fourth[0](), fifth.pop()()] == [model] * 7
    assert [model.partial(), model.factory["a"], model.kept.owner.args[0]()] == [model] * 3
    assert heard == [model]


def test_a_weak_dictionary_knows_the_copies(newer):
    original, trainer = Inside(), Trainer()
    original.state = weakref.WeakKeyDictionary({trainer: 0, original.conv: [original], original.listener: 2})
    original.names = weakref.WeakValueDictionary({"a": original.conv, "b": trainer, "c": original.listener})
    original.all = weakref.WeakSet([original.conv])
    model = transform(original, policy())
    assert dict(model.state) == {trainer: 0, model.conv: [model], model.listener: 2}
    assert dict(model.names) == {"a": model.conv, "b": trainer, "c": model.listener}
    assert set(model.all) == {model.conv}
    assert original.state[original.conv] == [original]


class Logging:
    """Leads to the model, and holds what cannot be copied."""

    def __init__(self, owner, held):
        self.owner, self.held, self.kept = owner, held, [held]

    def __call__(self, x):
        return self.owner.conv(x)


class LoggingInSlots:
    __slots__ = ("held", "kept", "owner")
    __init__, __call__ = Logging.__init__, Logging.__call__


@pytest.mark.parametrize("kind", [Logging, LoggingInSlots])
@pytest.mark.parametrize("what", [open, tempfile.NamedTemporaryFile, lambda *_: threading.Lock()])
def test_an_object_is_copied_around_what_it_holds_and_cannot_be_copied(kind, what, tmp_path, caplog):
    class Model(Inside):
        def forward(self, x):
            return self.helper(x)

    original = Model()
    with contextlib.ExitStack() as stack, caplog.at_level(logging.WARNING, "ssprop_fx"):
        held = stack.enter_context(what(tmp_path / "log.txt", "w") if what is open else what("w"))
        original.helper = kind(original, held)
        model = transform(original, policy())
        assert model.helper.owner is model
        assert model.helper.held is model.helper.kept[0] is held
        assert [row.rewritten for row in inspect(model, X).rows] == [True]
        assert not caplog.records


class Trainer:
    def __init__(self):
        self.data = [[1], [2]]


def test_a_proxy_of_what_is_gone_is_no_obstacle():
    original, trainer = nn.Sequential(nn.Conv2d(3, 8, 3)), Trainer()
    original.trainer = weakref.proxy(trainer)
    original[0].kept = [{"trainer": original.trainer}, threading.Lock()]
    del trainer
    with pytest.raises(ReferenceError):
        _ = original.trainer.data
    model = transform(original, policy())
    assert model(X).shape == (2, 8, 6, 6)
    assert inspect(model, X).coverage == 1


def test_a_proxy_stands_for_the_same_in_the_copy_or_for_the_copy_of_a_module():
    original, trainer = nn.Sequential(nn.Conv2d(3, 8, 3)), Trainer()
    original.trainer, original[0].parent = weakref.proxy(trainer), weakref.proxy(original)
    original.kept = [{"trainer": original.trainer}]
    model = transform(original, policy())
    assert model.trainer.data is model.kept[0]["trainer"].data is trainer.data
    assert model[0].parent.train.__self__ is model
    assert original[0].parent.train.__self__ is original


class Settings(dict):
    """Entries are attributes: HiFi-GAN's configuration, and that of many others."""

    def __init__(self, **entries):
        super().__init__(**entries)
        self.__dict__ = self


def test_a_dictionary_whose_entries_are_its_attributes_is_one_in_the_copy():
    original = Inside()
    original.h = Settings(rate=0.1, inner=Settings(sizes=[3]), layers=[original.conv])
    original.h.itself = original.h
    model = transform(original, policy())
    h = model.h
    assert (h.rate, h["inner"].sizes, h.layers) == (0.1, [3], [model.conv])
    assert h is not original.h
    assert h.itself is h
    h.inner.sizes.append(5)
    h.more = 1
    assert h["more"] == 1
    assert (original.h.inner.sizes, "more" in original.h) == ([3], False)
    assert inspect(model, X).coverage == 1


UNSET = object()


class Kind(enum.Enum):
    PLAIN = 1


class Marked(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.mark, self.kept, self.kind, self.make = nn.Conv2d(3, 8, 3), UNSET, [{"a": UNSET}], Kind.PLAIN, nn.ReLU

    def forward(self, x):
        same = self.mark is UNSET and self.kept[0]["a"] is UNSET and self.kind is Kind.PLAIN and self.make is nn.ReLU
        return self.conv(x) * (2 if same else 0)


def test_what_is_known_by_its_identity_is_the_same_in_the_copy():
    original = Marked()
    model = transform(original, policy())
    assert torch.equal(model(X), original(X))
    assert original(X).any()


class Normalised(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

    def forward(self, x):
        return self.bn(self.conv(x))


def test_a_model_that_was_moved_is_deployed_by_its_state():
    original, moved_first = Normalised(), Normalised().double()
    first, moved = transform(moved_first, policy()), transform(original, policy()).double()
    for model in (first, moved):
        model(X.double())
    assert torch.equal(first.eval()(X.double()), moved_first.eval()(X.double()))
    original.double().load_state_dict(moved.state_dict())  # as documented: its buffers were others
    assert torch.equal(moved.eval()(X.double()), original.eval()(X.double()))


class Uncopyable:
    def __init__(self, model):
        self.model, self.containers = model, [model._modules, [model]]

    def __deepcopy__(self, memo):
        raise RuntimeError("one of its kind")


def test_what_cannot_be_copied_and_refers_to_the_model_is_named(caplog):
    original = nn.Sequential(nn.Conv2d(3, 8, 3))
    original[0].helper = original.helper = Uncopyable(original)
    with caplog.at_level(logging.WARNING, "ssprop_fx"):
        model = transform(original, policy())
    assert model.helper is original.helper
    assert model[0] is not original[0]
    assert "Sequential.helper is shared, not copied" in caplog.text
    caplog.clear()
    assert [row.rewritten for row in inspect(model, X).rows] == [True]
    assert not caplog.records


def test_a_convolution_whose_forward_was_replaced_on_the_instance_keeps_that():
    convolution = nn.Conv2d(3, 8, 3)
    usual = convolution._conv_forward
    convolution._conv_forward = lambda x, weight, bias: usual(x, weight * 0.5, bias)
    original = nn.Sequential(convolution)
    model = transform(original, policy())
    assert torch.equal(model(X), original(X))
    model(X).square().sum().backward()
    assert int((convolution.weight.grad.flatten(1).abs().sum(1) > 0).sum()) == 4


def test_a_layer_that_was_replaced_is_told_as_dense():
    model = transform(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)), policy())
    model[1] = nn.Conv2d(8, 4, 1)
    for report in (inspect(model), inspect(model, X)):
        assert [(row.layer, row.rewritten) for row in report.rows] == [("0", True), ("1", False)]
        assert "after transform" in report.rows[1].reason
    assert report.coverage == 0.5


def test_parts_transformed_one_by_one_are_inspected_one_by_one():
    parts = [transform(nn.Sequential(nn.Conv2d(c, 8, 3)), policy()) for c in (3, 8)]
    with pytest.raises(ssprop_fx.SSPropError, match=r"2 parts.*\(0, 1\)"):
        inspect(nn.Sequential(*parts))
    assert inspect(parts[0], X).coverage == 1


def test_an_inspection_trains_nothing_and_puts_back_what_it_moved():
    class Moving(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.count, self.seen = nn.Conv2d(3, 8, 3), torch.zeros(1), {"a": torch.zeros(1)}
            self.register_buffer("wide", torch.zeros(1, 1, 1, 1).expand(1, 8, 1, 1))

        def forward(self, x):
            self.count += 1
            self.seen["a"] += 1
            return self.conv(x) + self.wide

    model, calls = transform(Moving(), policy()), []
    optimizers = {p: torch.optim.SGD([p], 0.1) for p in model.parameters()}

    def train(parameter):
        calls.append(parameter)
        optimizers[parameter].step()

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(train)
    before = model.conv.weight.detach().clone()
    inspect(model, X)
    assert torch.equal(model.conv.weight, before)
    assert not calls
    assert float(model.count) == float(model.seen["a"]) == 0
    model(X).sum().backward()
    assert len(calls) == 2


def test_an_inspection_looks_into_slots_for_tensors_and_not_into_the_policy():
    class Slotted:
        __slots__ = ("count",)

        def __init__(self):
            self.count = torch.zeros(1)

    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.kept = nn.Conv2d(3, 8, 3), Slotted()

        def forward(self, x):
            self.kept.count += 1
            return self.conv(x)

    chosen = policy()
    model = transform(Counting(), chosen)
    inspect(model, X)
    assert float(model.kept.count) == 0
    found = list(reachable([model]))
    assert any(value is chosen for value in found)
    assert not any(value is chosen._clock for value in found)


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.weight = nn.ConvTranspose2d(3, 8, 2, stride=2), nn.Parameter(torch.randn(8, 8, 3, 3))

    def forward(self, x):
        return nn.functional.conv2d(self.up(x), self.weight)


def test_a_replica_for_data_parallel_runs_on_its_own_tensors():
    """As ``torch.nn.parallel.replicate`` makes one, which needs several accelerators to be asked itself."""

    def replica_of(model):
        replica, up = model._replicate_for_data_parallel(), model.up._replicate_for_data_parallel()
        replica._modules = {"up": up}
        up.weight, up.bias, replica.weight = model.up.weight * 2, model.up.bias * 3, model.weight * 5
        return replica

    original = Functional()
    model = transform(original, policy())
    replica = replica_of(model)
    assert torch.equal(replica(X), replica_of(original)(X))
    replica(X).square().sum().backward()
    assert int((original.weight.grad.flatten(1).abs().sum(1) > 0).sum()) == 4
