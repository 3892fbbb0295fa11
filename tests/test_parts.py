"""Models of which a part is compiled, wrapped, transformed, or not registered: rules and reports name every layer once."""

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import ssprop_fx
from ssprop_fx import Policy, PolicyError, SSPropError

X = torch.randn(2, 8, 8, 8, generator=torch.Generator().manual_seed(0))
OPTIONS = {"backend": "ssprop", "options": {"inner": "aot_eager"}}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)

    def forward(self, x):
        return self.b(self.a(x).tanh())


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.head, self.encoder = nn.Conv2d(8, 8, 1), Encoder()

    def forward(self, x):
        return self.encoder(self.head(x))


class InList(nn.Module):
    """Convolutions that ``named_modules()`` does not know."""

    def __init__(self):
        super().__init__()
        self.head, self.others = nn.Conv2d(8, 8, 1), [nn.Conv2d(8, 8, 1) for _ in range(2)]

    def forward(self, x):
        x = self.head(x)
        for convolution in self.others:
            x = convolution(x)
        return x


def policy(**contents):
    return Policy(**{"drop_rate": 0.5, "round_to": 1, "schedule": {"kind": "constant"}} | contents)


def options(chosen):
    return {"backend": "ssprop", "options": {"inner": "aot_eager", "policy": chosen}}


def compiled_part(model, chosen):
    model.encoder = torch.compile(model.encoder, **options(chosen))
    return model


def part_compiled_in_place(model, chosen):
    model.encoder.compile(**options(chosen))
    return model


def compiled_convolution(model, chosen):
    model.encoder.b = torch.compile(model.encoder.b, **options(chosen))
    return model


def compiled_around_a_wrapper(model, chosen):
    model.encoder = checkpoint_wrapper(model.encoder)
    return torch.compile(model, **options(chosen))


REACHED = {
    compiled_part: {"encoder.a", "encoder.b"},
    part_compiled_in_place: {"encoder.a", "encoder.b"},
    compiled_convolution: {"encoder.b"},
    compiled_around_a_wrapper: {"head", "encoder.a", "encoder.b"},
}


def used(convolution):
    return int((convolution.bias.grad != 0).sum())


@pytest.mark.parametrize("wrap", REACHED, ids=lambda wrap: wrap.__name__)
def test_layers_inside_wrappers_have_the_names_that_rules_use(wrap):
    model = Model()
    b = model.encoder.b
    made = wrap(model, policy(rules=[{"layers": "encoder.b", "drop_rate": 0.75}]))
    made(X).sum().backward()
    assert used(b) == 2
    for report in (ssprop_fx.inspect(made), ssprop_fx.inspect(made, X)):
        assert sorted(row.layer for row in report.rows) == ["encoder.a", "encoder.b", "head"]
        assert {row.layer for row in report.rows if row.rewritten} == REACHED[wrap]
        assert report["encoder.b"].kept == 2
        assert all("in no captured graph" in row.reason for row in report.rows if not row.rewritten)
    assert ssprop_fx.inspect(made, X).coverage == len(REACHED[wrap]) / 3


@pytest.mark.parametrize("wrap", [compiled_part, compiled_around_a_wrapper], ids=lambda wrap: wrap.__name__)
def test_a_rule_with_a_wrappers_name_is_an_error_that_tells_the_right_one(wrap):
    chosen = policy(rules=[{"layers": "encoder._orig_mod.b", "drop_rate": 0.75}])
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=r"Nearest: encoder\.b") as caught:
        wrap(Model(), chosen)(X)
    assert isinstance(caught.value.inner_exception, PolicyError)


def test_inspecting_the_compiled_part_tells_of_the_whole():
    model = compiled_part(Model(), policy())
    model(X).sum().backward()
    with pytest.raises(SSPropError, match="Encoder is a part of Model"):
        ssprop_fx.inspect(model.encoder)


@pytest.mark.parametrize(
    "thing", [torch.compile(Model().forward), lambda x: x, Model, 3], ids=["compiled", "function", "class", "3"]
)
def test_inspect_says_that_it_takes_a_module(thing):
    with pytest.raises(SSPropError, match="inspect takes a module, got"):
        ssprop_fx.inspect(thing)


def test_unregistered_convolutions_have_the_same_names_in_both_front_ends():
    model = InList()
    compiled = torch.compile(model, **options(policy()))
    compiled(X).sum().backward()
    rows = {row.layer: row.kept for row in ssprop_fx.inspect(compiled).rows}
    assert rows == {"head": 4, "#conv2d.0": 4, "#conv2d.1": 4}
    assert [used(c) for c in model.others] == [4, 4]
    transformed = ssprop_fx.transform(model, policy())
    transformed(X).sum().backward()
    assert {row.layer: row.kept for row in ssprop_fx.inspect(transformed).rows} == rows


def test_a_rule_for_an_unregistered_convolution_is_followed():
    model = InList()
    compiled = torch.compile(model, **options(policy(rules=[{"layers": "#conv2d.1", "drop_rate": 0.75}])))
    compiled(X).sum().backward()
    assert [used(c) for c in (model.head, *model.others)] == [4, 4, 2]


@pytest.mark.parametrize("compiled", [False, True])
def test_what_is_beside_a_transformed_part_is_listed(compiled):
    model = nn.Sequential(ssprop_fx.transform(Encoder(), policy()), nn.Conv2d(8, 5, 1))
    made = torch.compile(model, **OPTIONS) if compiled else model
    made(X).sum().backward()
    assert used(model[1]) == 5
    for report in (ssprop_fx.inspect(made), ssprop_fx.inspect(made, X)):
        assert {row.layer: row.rewritten for row in report.rows} == {"a": True, "b": True, "1": False}
        assert "beside the part that was transformed, '0'" in report["1"].reason
    assert ssprop_fx.inspect(made, X).coverage == pytest.approx(2 / 3)


def test_layers_that_another_backend_compiled_are_said_to_be_unknown():
    model = ssprop_fx.transform(Model(), policy())
    model.encoder.compile(backend="aot_eager")
    model(X).sum().backward()
    assert "2 of the rewritten layers not counted" in ssprop_fx.inspect(model).summary()
    assert "not counted" not in ssprop_fx.inspect(model, X).summary()


def test_of_two_policies_the_report_is_of_the_one_that_trained_last():
    model = Model()
    some, many = (torch.compile(model, **options(policy(drop_rate=rate))) for rate in (0.25, 0.75))
    for compiled, kept in ((some, 6), (many, 2), (some, 6)):
        compiled(X).sum().backward()
        assert ssprop_fx.inspect(compiled)["head"].kept == kept
    dense = torch.compile(model, **options(policy(drop_rate=0.0)))
    dense(X)
    assert ssprop_fx.inspect(dense)["head"].kept == 8
    assert ssprop_fx.inspect(dense)["head"].drop_rate == 0
