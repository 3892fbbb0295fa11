"""Functional convolutions are found wherever a forward may get them from, and modules without any are left alone."""

import dataclasses
import functools
import gc
import operator
import sys
import types
import weakref
from typing import NamedTuple

import functional_helpers
import pytest
import torch
import torch.nn.functional as F
from functional_helpers import Projector
from torch import nn

import ssprop_fx
from ssprop_fx import Policy
from ssprop_fx.coverage import measure
from ssprop_fx.mentions import imported
from ssprop_fx.reach import may_call_convolution
from ssprop_fx.survey import functional_callers

PACKAGE, OPERATIONS = types.ModuleType("package_of_two_levels"), types.ModuleType("package_of_two_levels.operations")
PACKAGE.operations, OPERATIONS.package = OPERATIONS, PACKAGE
vars(OPERATIONS).update(convolve=functional_helpers.convolve, Maker=Projector)

TABLE = {"relu": F.relu, "conv": F.conv2d}
MODULES = {"operations": OPERATIONS}
NESTED = [[F.relu, (F.conv2d,)]]
PROJECTOR = Projector()


class Operations:
    @staticmethod
    def static(x, w):
        return F.conv2d(x, w)

    @classmethod
    def of_class(cls, x, w):
        return cls.static(x, w)


@functools.singledispatch
def dispatched(kind, x, w):
    raise TypeError(kind)


@dispatched.register
def _(kind: int, x, w):
    return F.conv2d(x, w)


class Kernel:
    def __init__(self, weight):
        self.weight = weight

    def __matmul__(self, x):
        return F.conv2d(x, self.weight)

    def __enter__(self):
        return self.__matmul__

    def __exit__(self, *problem):
        pass


class Recorded(torch.autograd.Function):
    """Makes a graph of its own, and differentiates it when asked."""

    @staticmethod
    def forward(ctx, x, w):
        with torch.enable_grad():
            ctx.inputs = x.detach().requires_grad_(), w.detach().requires_grad_()
            ctx.output = F.conv2d(*ctx.inputs)
        return ctx.output.detach()

    @staticmethod
    def backward(ctx, grad):
        return torch.autograd.grad(ctx.output, ctx.inputs, grad)


class Free(nn.Module):
    """A module that is no part of a model."""

    def forward(self, x, w):
        return F.conv2d(x, w)


FREE = Free()


class Tools(nn.Module):
    """One whose forward does not convolve."""

    def run(self, x, w):
        return F.conv2d(x, w)

    @staticmethod
    def static(x, w):
        return F.conv2d(x, w)

    def forward(self, x):
        return x


TOOLS, WRAPPED_TOOLS = Tools(), nn.Sequential(Tools())


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 3, 3, 3))


class Configuration:
    class operations:
        operation = staticmethod(F.conv2d)


@dataclasses.dataclass(slots=True)
class Slotted:
    operation: object


class Named(NamedTuple):
    items: object
    values: list


class Descriptive:
    def __get__(self, owner, kind):
        return F.conv2d


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 3, 3, 3))

    def encode(self, x):
        return F.conv2d(x, self.weight)

    def forward(self, x):
        return x


class StaticMethod(Base):
    def forward(self, x):
        return Operations.static(x, self.weight)


class ClassMethod(Base):
    def forward(self, x):
        return Operations.of_class(x, self.weight)


class MadeAndCalled(Base):
    def forward(self, x):
        return Projector()(x, self.weight)


class MadeElsewhere(Base):
    def forward(self, x):
        return functional_helpers.Projector().run(x, self.weight)


class GlobalObject(Base):
    def forward(self, x):
        return PROJECTOR.run(x, self.weight)


class GlobalTable(Base):
    def forward(self, x):
        return TABLE["conv"](x, self.weight)


class GlobalNested(Base):
    def forward(self, x):
        return NESTED[0][1][0](x, self.weight)


class ClassTable(Base):
    table = {"conv": F.conv2d}  # noqa: RUF012

    def forward(self, x):
        return self.table["conv"](x, self.weight)


class Default(Base):
    def forward(self, x, operation=F.conv2d):
        return operation(x, self.weight)


class Namespace(Base):
    def __init__(self):
        super().__init__()
        self.box = types.SimpleNamespace(operation=F.conv2d)

    def forward(self, x):
        return self.box.operation(x, self.weight)


class ObjectInObject(Base):
    def __init__(self):
        super().__init__()
        self.box = types.SimpleNamespace(projector=Projector())

    def forward(self, x):
        return self.box.projector.run(x, self.weight)


class NamedTuples(Base):
    def __init__(self):
        super().__init__()
        self.operations = Named(F.relu, [F.conv2d])

    def forward(self, x):
        return self.operations.values[0](x, self.weight)


class NestedList(Base):
    def __init__(self):
        super().__init__()
        self.operations = [[F.relu, F.conv2d]]

    def forward(self, x):
        return self.operations[0][1](x, self.weight)


class Inherited(StaticMethod):
    def forward(self, x):
        return super().forward(x) + 1


class Property(Base):
    @property
    def operation(self):
        return F.conv2d

    def forward(self, x):
        return self.operation(x, self.weight)


class GlobalModule(Base):
    def forward(self, x):
        return FREE(x, self.weight)


class ModuleMadeInForward(Base):
    def forward(self, x):
        return Free()(x, self.weight)


class ConvolutionMadeInForward(Base):
    def forward(self, x):
        layer = nn.Conv2d(3, 8, 3, bias=False)
        layer.weight = self.weight
        return layer(x)


class HiddenModule(Base):
    def __init__(self):
        super().__init__()
        object.__setattr__(self, "hidden", Free())

    def forward(self, x):
        return self.hidden(x, self.weight)


class HiddenConvolution(Base):
    def __init__(self):
        super().__init__()
        self.hidden = [nn.Conv2d(3, 8, 3, bias=False)]
        self.hidden[0].weight = self.weight

    def forward(self, x):
        return self.hidden[0](x)


class DynamicName(Base):
    def forward(self, x):
        return getattr(F, "".join(["con", "v2d"]))(x, self.weight)


class Evaluated(Base):
    def forward(self, x):
        return eval("F.conv2d(x, self.weight)")


class NamePutTogether(Base):
    kind = "cd"

    def theta_cd(self, x):
        return F.conv2d(x, self.weight)

    def forward(self, x):
        return getattr(self, "theta_" + self.kind)(x)


class NameInAFormat(NamePutTogether):
    def forward(self, x):
        return (lambda kind: getattr(self, f"theta_{kind}")(x))(self.kind)


class PartialMethod(Base):
    def operation(self, function, x):
        return function(x, self.weight)

    convolve = functools.partialmethod(operation, F.conv2d)

    def forward(self, x):
        return self.convolve(x)


class DispatchedOnTheType(Base):
    def forward(self, x):
        return dispatched(0, x, self.weight)


class OperatorOfAnObject(Base):
    def __init__(self):
        super().__init__()
        self.kernel = Kernel(self.weight)

    def forward(self, x):
        return self.kernel @ x


class ManagerOfAContext(Base):
    def forward(self, x):
        with Kernel(self.weight) as operation:
            return operation(x)


class DeeplyKept(Base):
    def __init__(self):
        super().__init__()
        self.kept = [{"a": types.SimpleNamespace(layers=[{"b": [F.conv2d]}])}]

    def forward(self, x):
        return self.kept[0]["a"].layers[0]["b"][0](x, self.weight)


class CalledByName(Base):
    def forward(self, x):
        return operator.methodcaller("conv2d", x, self.weight)(F)


class Operator(Base):
    def forward(self, x):
        return torch.ops.aten.conv2d.default(x, self.weight)


class OperatorOfAnyOverload(Base):
    def forward(self, x):
        return torch.ops.aten.conv2d(x, self.weight, padding="same")


class ModuleInAModule(Base):
    def forward(self, x):
        return PACKAGE.operations.convolve(x, self.weight)


class ClassInAModuleInAModule(Base):
    def forward(self, x):
        return PACKAGE.operations.Maker().run(x, self.weight)


class ModuleAsAnAttribute(Base):
    def __init__(self):
        super().__init__()
        self.library = PACKAGE

    def forward(self, x):
        return self.library.operations.convolve(x, self.weight)


class ModuleInATable(Base):
    def forward(self, x):
        return MODULES["operations"].convolve(x, self.weight)


class ModuleAsADefault(Base):
    def forward(self, x, library=OPERATIONS):
        return library.convolve(x, self.weight)


class ModuleInAClosure(Base):
    forward = (lambda library: lambda self, x: library.convolve(x, self.weight))(OPERATIONS)


class ModuleAskedForAName(Base):
    def forward(self, x):
        return getattr(OPERATIONS, "".join(["con", "volve"]))(x, self.weight)


class ClassInAClass(Base):
    def forward(self, x):
        return Configuration.operations.operation(x, self.weight)


class ClassAsAnAttribute(Base):
    def __init__(self):
        super().__init__()
        self.operations = Operations

    def forward(self, x):
        return self.operations.static(x, self.weight)


class ObjectWithSlots(Base):
    def __init__(self):
        super().__init__()
        self.slotted = Slotted(F.conv2d)

    def forward(self, x):
        return self.slotted.operation(x, self.weight)


class ModuleWithSlots(Base):
    __slots__ = ("operation",)

    def __init__(self):
        super().__init__()
        object.__setattr__(self, "operation", F.conv2d)

    def forward(self, x):
        return self.operation(x, self.weight)


class MethodDispatchedOnTheType(Base):
    @functools.singledispatchmethod
    def run(self, x):
        raise TypeError(x)

    @run.register
    def _(self, x: torch.Tensor):
        return F.conv2d(x, self.weight)

    def forward(self, x):
        return self.run(x)


class PartialForward(Base):
    def operation(self, x, padding):
        return F.conv2d(x, self.weight, padding=padding)

    forward = functools.partialmethod(operation, padding=1)


class AskedForAnAttribute(Base):
    def __getattr__(self, name):
        return functools.partial(F.conv2d, weight=self.weight) if name == "made_up" else super().__getattr__(name)

    def forward(self, x):
        return self.made_up(x)


class Descriptor(Base):
    operation = Descriptive()

    def forward(self, x):
        return self.operation(x, self.weight)


class NameAskedOfAChild(Base):
    def __init__(self):
        super().__init__()
        self.child = Encoder()

    def forward(self, x):
        return [getattr(child, "en" + "code")(x) for child in self.children()][0]


class MethodOfAParametrizedChild(Base):
    def __init__(self):
        super().__init__()
        self.child = nn.utils.parametrizations.weight_norm(Encoder())

    def forward(self, x):
        return self.child.encode(x)


class MethodOfAGlobalModule(Base):
    def forward(self, x):
        return TOOLS.run(x, self.weight)


class MethodOfAPartOfAGlobalModule(Base):
    def forward(self, x):
        return WRAPPED_TOOLS[0].run(x, self.weight)


class MethodOfAModuleInAClosure(Base):
    forward = (lambda tools: lambda self, x: tools.run(x, self.weight))(TOOLS)


class MethodOfAPartOfAHiddenModule(Base):
    def __init__(self):
        super().__init__()
        self.hidden = [WRAPPED_TOOLS]

    def forward(self, x):
        return self.hidden[0][0].run(x, self.weight)


class StaticMethodOfAModule(Base):
    def forward(self, x):
        return Tools.static(x, self.weight)


class StaticMethodOfAModuleByName(Base):
    def forward(self, x):
        return getattr(Tools, "sta" + "tic")(x, self.weight)


class ForwardOfAClass(Base):
    def __init__(self):
        super().__init__()
        self.up = nn.ConvTranspose2d(3, 8, 2, bias=False)

    def forward(self, x):
        return type(self.up).forward(self.up, x)


class GraphInsideOfAFunction(Base):
    def forward(self, x):
        return Recorded.apply(x, self.weight)


CALLERS = [c for c in vars().copy().values() if isinstance(c, type) and issubclass(c, Base) and c is not Base]


@pytest.mark.parametrize("caller", CALLERS, ids=lambda c: c.__name__)
def test_functional_convolution_is_found(caller):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8)
    original = nn.Sequential(caller())
    model = ssprop_fx.transform(original, Policy(drop_rate=0.5, round_to=1, schedule={"kind": "constant"}))
    assert torch.equal(model(x), original(x))
    measured = measure(model, x)
    assert (measured.sparse, measured.dense) == (1, 1)


class Bank(Base):
    def mix(self, x):
        return F.conv2d(x, self.weight)


class Holder:
    def __init__(self, bank):
        self.banks = {"first": bank}

    def run(self, x):
        return self.banks["first"].mix(x)


class Block(nn.Module):
    """Calls a method of a module that is elsewhere in the model."""

    def __init__(self, bank):
        super().__init__()
        self.bank, self.parent = [bank], lambda: None

    def forward(self, x):
        return self.bank[0].mix(x)


class BlockThatIsGivenIt(Block):
    def forward(self, x, bank):
        return bank.mix(x)


class BlockThatAsksItsParent(Block):
    def forward(self, x):
        return self.parent().mix(x)


class BlockThatPutsTheNameTogether(Block):
    def forward(self, x):
        bank = self.parent()
        return getattr(bank, "".join("mix"))(x)


class BlockThatIsGivenItByAnObject(Block):
    def __init__(self, bank):
        super().__init__(bank)
        self.holder = Holder(bank)

    def forward(self, x):
        return self.holder.run(x)


class BlockWithAHook(Block):
    def __init__(self, bank):
        super().__init__(bank)
        self.register_forward_hook(lambda module, args, output: module.bank[0].mix(output))

    def forward(self, x):
        return x


class BlockThatMakesAnother(Block):
    def forward(self, x):
        made = Block(self.bank[0])
        return made(x)


class Elsewhere(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.bank = Bank()
        self.block = block(self.bank)
        self.block.parent = weakref.ref(self)
        self.mixer = Block(self.bank) if block is BlockThatMakesAnother else None

    def mix(self, x):
        return F.conv2d(x, self.bank.weight)

    def forward(self, x):
        return self.block(x, self.bank) if isinstance(self.block, BlockThatIsGivenIt) else self.block(x)


@pytest.mark.parametrize("block", [Block, *Block.__subclasses__()], ids=lambda c: c.__name__)
def test_method_of_a_module_elsewhere_in_the_model_is_found(block):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8)
    original = Elsewhere(block)
    model = ssprop_fx.transform(original, Policy(drop_rate=0.5, round_to=1, schedule={"kind": "constant"}))
    assert torch.equal(model(x), original(x))
    assert measure(model, x).calls == {"block#conv2d.0": 1}
    assert "bank" not in functional_callers(model)


LATE = {
    "late": "import late.operations\nreturn late.operations.convolve(x, self.weight)",
    "from": "from late.operations import convolve\nreturn convolve(x, self.weight)",
    "through": "from late.through import convolve\nreturn convolve(x, self.weight)",
    "submodule": "from late import operations\nreturn operations.convolve(x, self.weight)",
    "relative": "from .operations import convolve\nreturn convolve(x, self.weight)",
    "namespace": "from late.inner.deep import convolve\nreturn convolve(x, self.weight)",
}
FILES = {
    "__init__": "",
    "operations": "import torch\n\ndef convolve(x, w):\n    return torch.nn.functional.conv2d(x, w)\n\ndef relu(x):\n    return x.relu()\n",
    "through": "from .operations import convolve, relu\n",
    "plain": "def relu(x):\n    return x.relu()\n",
    "inner/deep": "from late.operations import convolve\n",  # in a folder without __init__.py
}


@pytest.fixture
def late(tmp_path, monkeypatch):
    """A package that nothing has imported yet."""
    (tmp_path / "late" / "inner").mkdir(parents=True)
    for name, text in FILES.items():
        (tmp_path / "late" / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in [n for n in sys.modules if n.partition(".")[0] == "late"]:
        del sys.modules[name]


def importing(body):
    lines = body.replace("\n", "\n    ")
    space = {"__name__": "late.model", "__package__": "late"}
    exec(f"def forward(self, x):\n    {lines}", space)
    return type("Importing", (Base,), {"forward": space["forward"]})


@pytest.mark.parametrize("way", LATE)
def test_what_a_forward_imports_when_it_runs_is_found(late, way):
    assert may_call_convolution(importing(LATE[way])())
    assert "late.operations" not in sys.modules  # nothing was loaded to find out


def test_what_a_lazy_module_makes_when_it_is_asked_may_be_anything(monkeypatch):
    monkeypatch.setitem(sys.modules, "lazy", LAZY)
    assert may_call_convolution(importing("from lazy import convolve\nreturn convolve(x, self.weight)")())


def test_an_import_of_what_does_not_convolve_is_left_alone(late):
    for body in (
        "from late.plain import relu\nreturn relu(x)",
        "from late import __version__\nreturn x",
        "import not_installed_at_all\nreturn x",
        "from late.nowhere import relu\nreturn relu(x)",
        "import torch.testing, math\nfrom collections import deque\nreturn x",
    ):
        assert not may_call_convolution(importing(body)())


def test_what_is_outermost_is_not_looked_for_in_a_module_that_is_no_package(late):
    for name in ("late.plain.torch", "late.plain.torch.nn", "late.plain.late.inner", "late.plain.late.inner.deep"):
        assert not list(imported(importing(f"import {name}\nreturn x").forward))


def test_what_a_generator_convolves_between_its_items_is_found():
    class Scales(Base):
        def forward(self, x):
            asked = 1
            while asked:
                asked = yield F.conv2d(x[..., ::asked, ::asked], self.weight).square().mean()

    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.scales, self.outside = Scales(), nn.Parameter(torch.randn(8, 3, 3, 3))

        def forward(self, x):
            steps = self.scales(x)
            total = next(steps) + steps.send(2)
            with pytest.raises(StopIteration):
                steps.send(0)
            return total

    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8)
    original = Sum()
    model = ssprop_fx.transform(original, Policy(drop_rate=0.5, round_to=1, schedule={"kind": "constant"}))
    assert torch.equal(model(x), original(x))
    measured = measure(model, x)
    assert (measured.sparse, measured.dense) == (2, 2)
    assert set(measured.calls) == {"scales#conv2d.0", "scales#conv2d.1"}


def test_a_forward_that_was_replaced_is_looked_at_again():
    class Patched(Base):
        def forward(self, x):
            return x

    assert not may_call_convolution(Patched())
    Patched.forward = lambda self, x: F.conv2d(x, self.weight)
    assert may_call_convolution(Patched())


def helper(x, w):
    return x * w.mean()


class ByHelper(Base):
    def forward(self, x):
        return helper(x, self.weight)


def test_a_helper_that_was_defined_again_is_looked_at_again(monkeypatch):
    """As by a notebook's cell."""
    model, watched = ByHelper(), Policy(rules=[{"layers": "#conv2d.*", "drop_rate": 0.5}])
    with pytest.raises(ssprop_fx.TransformError):
        ssprop_fx.transform(model)
    monkeypatch.setitem(globals(), "helper", F.conv2d)
    x = torch.randn(2, 3, 8, 8)
    assert measure(ssprop_fx.transform(model, watched), x).sparse == 1


def test_code_that_was_replaced_is_looked_at_again():
    """As by autoreload, which leaves a function the same object."""

    class Reloaded(Base):
        def forward(self, x):
            return x * self.weight.mean()

    class Edited(Base):
        def forward(self, x):
            return F.conv2d(x, self.weight)

    assert not functional_callers(Reloaded())
    Reloaded.forward.__code__ = Edited.forward.__code__
    assert functional_callers(Reloaded())


@pytest.mark.parametrize("slots", [(), ("kept",)])
def test_a_class_and_what_it_closes_over_are_not_kept_alive(slots):
    def transformed():
        teacher = nn.Linear(1, 1)

        class Student(nn.Conv2d):
            __slots__ = slots

            def forward(self, x):
                return super().forward(x) * teacher.weight

        ssprop_fx.transform(nn.Sequential(Student(3, 8, 3)))
        return weakref.ref(teacher)

    teacher = transformed()
    gc.collect()
    assert teacher() is None


class Layers(nn.Module):
    """Has layers of such names, and calls them."""

    def __init__(self):
        super().__init__()
        self.convolution, self.conv2d = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)

    def forward(self, x):
        return self.conv2d(self.convolution(x))


class FunctionOfThatName(Layers):
    def forward(self, x):
        return F.conv2d(self.convolution(x), self.conv2d.weight)


def test_a_layer_of_a_functions_name_is_no_function():
    assert not may_call_convolution(Layers())
    assert may_call_convolution(FunctionOfThatName())


class Forbidding:
    """An object that stands for something which is not installed."""

    def __getattr__(self, name):
        raise ImportError(name)


MISSING = Forbidding()
LAZY = types.ModuleType("lazy")
LAZY.__getattr__ = MISSING.__getattr__  # type: ignore[method-assign]


class Optional(nn.Module):
    """Has what it needs only in some installations."""

    def __init__(self):
        super().__init__()
        self.conv, self.missing = nn.Conv2d(3, 8, 3), MISSING

    def forward(self, x):
        if x.dim() == 7:
            x = MISSING.operation(LAZY.operation(self.missing(x)))
        return self.conv(x)


class OwnCall(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(x, self.weight * 2, self.bias)


class Choice(NamedTuple):
    """A tuple whose fields are called as the methods of a table."""

    name: str
    values: list


CHOICES = [Choice("scale", [1.0, 2.0])]


def scaled(x):
    return x * CHOICES[0].values[1]


scaled.registry = [Choice]  # whatever its user keeps there


class Routing(nn.Module):
    """Keeps what ``topk`` gave in its last forward."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.chosen = torch.arange(8).topk(2)

    def forward(self, x):
        return scaled(self.conv(x))


class Checked(nn.Module):
    """Refers to its children's class and to functions of the standard library, and calls no function that convolves."""

    def __init__(self):
        super().__init__()
        self.inner = Optional()

    def forward(self, x):
        if not isinstance(self.inner, Optional):
            raise TypeError
        types.SimpleNamespace(x=x)
        return F.relu(self.inner(x))


@pytest.mark.parametrize(
    "module", [Optional, Routing, Checked, lambda: OwnCall(3, 8, 3), lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())]
)
def test_module_without_functional_convolutions_is_left_alone(module):
    assert not may_call_convolution(module())


def test_a_table_that_is_filled_while_one_looks_at_it_is_no_error():
    class Lazy:
        def __init__(self, table):
            self.table = table

        @property
        def __class__(self):
            self.table[len(self.table)] = F.conv2d
            return Lazy

    module = Checked()
    module.table = {}
    module.table["lazy"] = Lazy(module.table)
    assert may_call_convolution(Checked()) is False
    may_call_convolution(module)  # whatever it says: what is put in meanwhile may be seen or not
    assert len(module.table) > 1
