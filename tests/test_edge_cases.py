"""Models at the edge: each is handled as its user would expect, or refused with what to do, through both front ends."""

import pickle

import pytest
import torch
from torch import nn

import ssprop_fx
from ssprop_fx import Policy, SSPropError, TransformError
from ssprop_fx.dataflow import operations

pytestmark = pytest.mark.filterwarnings("ignore")

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def policy(**changes):
    return Policy(**({"drop_rate": 0.5, "round_to": 1, "schedule": {"kind": "constant"}} | changes))


def transformed(model, rule):
    return ssprop_fx.transform(model, rule)


def compiled(model, rule):
    return torch.compile(model, backend="ssprop", options={"policy": rule, "inner": "aot_eager"})


front_ends = pytest.mark.parametrize("front_end", [transformed, compiled])


def step(model, x=X):
    model.zero_grad()
    model(x).square().mean().backward()
    return {n.removeprefix("_orig_mod."): p.grad for n, p in model.named_parameters()}


def zero_rows(grad):
    return int((grad.flatten(1).abs().sum(1) == 0).sum())


def refused(front_end, model, match, x=X):
    """The error of the front end, which comes with the first step where the compiler is in between."""
    with pytest.raises(Exception, match=match) as error:
        step(front_end(model, policy()), x)
    return getattr(error.value, "inner_exception", error.value)


@front_ends
def test_a_model_without_convolutions_is_refused_and_its_layers_listed(front_end):
    model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
    error = refused(front_end, model, r"Sequential has no convolution.*2 × Linear, 1 × ReLU")
    assert isinstance(error, TransformError)


@front_ends
def test_a_model_without_convolutions_is_welcome_where_a_rule_asks_for_linear_layers(front_end):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.ReLU(), nn.Linear(8, 2))
    grads = step(front_end(model, policy(rules=[{"kind": "linear", "layers": "1", "drop_rate": 0.75}])))
    assert zero_rows(grads["1.weight"]) == 6
    assert zero_rows(grads["3.weight"]) == 0


def frozen():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 4))
    for layer in (model[0], model[2]):
        layer.requires_grad_(False)
    return model


@front_ends
def test_frozen_convolutions_train_the_rest_as_ever_and_the_report_says_why_they_save_nothing(front_end):
    expected = step(frozen())
    model = front_end(frozen(), policy())
    got = step(model)
    assert got["0.weight"] is got["2.bias"] is None
    assert torch.equal(got["4.weight"], expected["4.weight"])
    report = ssprop_fx.inspect(model)
    assert [row.layer for row in report.rows] == ["0", "2"]
    assert all("no gradient" in row.reason for row in report.rows)
    measured = ssprop_fx.inspect(model, X).measurement
    assert (measured.dense, measured.sparse, measured.coverage) == (0, 0, 1.0)


@front_ends
def test_the_gradient_that_flows_through_a_frozen_convolution_is_sparse(front_end):
    x = X.clone().requires_grad_()
    dense = torch.autograd.grad(frozen()(x).square().mean(), x)[0]
    model = front_end(frozen(), policy())
    (grad,) = torch.autograd.grad(model(x).square().mean(), x)
    assert grad.shape == dense.shape
    assert not torch.equal(grad, dense)
    assert ssprop_fx.inspect(model).flops_now < ssprop_fx.inspect(model).flops_dense


def lazy():
    torch.manual_seed(0)
    return nn.Sequential(nn.LazyConv2d(8, 3), nn.ReLU(), nn.LazyConvTranspose2d(6, 3))


def test_a_lazy_convolution_is_refused_by_name_and_taken_after_a_forward_pass():
    model = lazy()
    error = refused(transformed, model, r"^0 is a lazy module that has no weight yet.*forward")
    assert isinstance(error, TransformError)
    with torch.no_grad():
        model(X)
    grads = step(transformed(model, policy()))
    assert zero_rows(grads["0.weight"]) == 4


def test_a_model_with_lazy_layers_of_other_kinds_is_inspected_before_and_after_they_have_run():
    original = nn.Sequential(nn.Conv2d(3, 8, 3), nn.LazyBatchNorm2d(), nn.Flatten(), nn.LazyLinear(4))
    model = transformed(original, policy())
    assert [row.rewritten for row in ssprop_fx.inspect(model).rows] == [True]
    with pytest.raises(SSPropError, match=r"^lazy layers of Sequential have not run yet: 1, 3;.*Run one forward pass"):
        ssprop_fx.inspect(model, X)
    assert all(isinstance(layer, nn.modules.lazy.LazyModuleMixin) for layer in (model[1], model[3], original[3]))
    assert nn.parameter.is_lazy(original[3].weight)
    model(X)
    assert ssprop_fx.inspect(model, X).coverage == 1
    assert torch.equal(original(X), model(X))


def test_the_compiler_materialises_a_lazy_convolution_first():
    model = compiled(lazy(), policy())
    with torch.no_grad():
        model(X)
    assert zero_rows(step(model)["0.weight"]) == 4
    assert {row.layer for row in ssprop_fx.inspect(model).rows if row.rewritten} == {"0", "2"}


@front_ends
def test_the_meta_device_gives_shapes(front_end):
    with torch.device("meta"):
        original = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 4, 2))
    model = front_end(original, policy())
    output = model(torch.empty(2, 3, 8, 8, device="meta"))
    assert (output.shape, output.device.type) == ((2, 4, 7, 7), "meta")
    output.sum().backward()
    assert {n: p.grad.shape for n, p in original.named_parameters()} == {n: p.shape for n, p in original.named_parameters()}


def scripted():
    return torch.jit.script(nn.Sequential(nn.Conv2d(3, 8, 3)))


def test_a_scripted_model_is_refused_and_by_the_compiler_too():
    assert isinstance(
        refused(transformed, scripted(), r"scripted or traced by torch\.jit.*on the Python model"), TransformError
    )
    traced = torch.jit.trace(nn.Sequential(nn.Conv2d(3, 8, 3)), X)
    assert isinstance(refused(transformed, traced, r"scripted or traced by torch\.jit"), TransformError)
    try:
        torch.compile(scripted(), backend="aot_eager")
    except RuntimeError:  # PyTorch's own refusal, which older releases did not have
        with pytest.raises(RuntimeError, match=r"does not support compiling torch\.jit\.script"):
            compiled(scripted(), policy())


def test_a_transformed_model_is_not_scripted_and_stays_as_it_is():
    original = nn.Sequential(nn.Conv2d(3, 8, 3))
    model = transformed(original, policy())
    for whole in (model, nn.Sequential(model)):
        with pytest.raises(TransformError, match="script the original model"):
            torch.jit.script(whole)
    assert zero_rows(step(model)["0.weight"]) == 4
    assert torch.equal(torch.jit.script(original)(X), model(X))


@front_ends
@pytest.mark.parametrize("multiple", [10**9, 10**30, 10**400])
def test_a_multiple_that_no_layer_has_channels_for_keeps_one_of_them(front_end, multiple):
    model = front_end(nn.Sequential(nn.Conv2d(3, 8, 3)), policy(round_to=multiple))
    assert zero_rows(step(model)["0.weight"]) == 7


class Partly(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.rest = nn.Conv2d(3, 8, 3), torch.jit.trace(nn.Sequential(nn.Conv2d(8, 8, 1)), torch.ones(1, 8, 2, 2))

    def forward(self, x):
        return self.rest(self.stem(x))


@front_ends
def test_a_traced_part_stays_dense_and_is_named(front_end):
    model = front_end(Partly(), policy())
    grads = step(model)
    assert zero_rows(grads["stem.weight"]) == 4
    assert zero_rows(grads["rest.0.weight"]) == 0
    left = {row.layer: row.reason for row in ssprop_fx.inspect(model).rows if not row.rewritten}
    assert left.keys() == {"rest.0"}
    assert "scripted" in left["rest.0"]


class Wrapped(nn.Module):
    """As a LightningModule holds its network."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x)


def test_a_report_of_a_wrapper_is_that_of_what_it_holds():
    def head():
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 2))

    def put_in():
        model = transformed(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)), policy())
        model[1] = nn.Sequential(model[1], nn.Conv2d(8, 8, 1))
        return model

    linear = policy(rules=[{"kind": "linear", "drop_rate": 0.5}])
    for net in (transformed(Partly(), policy()), put_in(), transformed(head(), linear)):
        alone, wrapped = ssprop_fx.inspect(net, X), ssprop_fx.inspect(Wrapped(net), X)
        assert wrapped.rows == alone.rows
        assert wrapped.coverage == alone.coverage <= 1
        assert wrapped.measurement.hidden == alone.measurement.hidden
        assert [o.shape for c in wrapped.captures for o in operations(c)] == [
            o.shape for c in alone.captures for o in operations(c)
        ]


def test_a_transformed_model_is_not_transformed_again():
    model = transformed(nn.Sequential(nn.Conv2d(3, 8, 3)), policy())
    for again in (model, nn.Sequential(model), nn.ModuleDict({"net": model})):
        with pytest.raises(TransformError, match=r"transformed already.*on the original model"):
            transformed(again, policy())


class General(nn.Module):
    """``torch.convolution``, which autocast passes over on the CPU."""

    def __init__(self, function):
        super().__init__()
        self.function, self.stem = function, nn.Conv2d(3, 3, 1)
        self.weight = nn.Parameter(torch.randn(8, 3, 3, 3))

    def forward(self, x):
        x = self.stem(x).float()
        return self.function(x, self.weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1)


@pytest.mark.parametrize("function", [torch.convolution, torch.ops.aten.convolution])
@pytest.mark.parametrize("factor", [0.0, 1.0])
@pytest.mark.parametrize("front_end", ["transform", "backend", "both"])
def test_the_general_function_under_autocast_is_the_models_own(front_end, factor, function):
    torch.manual_seed(0)
    model, rule = General(function), policy(schedule={"kind": "constant", "end": factor})
    ours = transformed(model, rule) if front_end != "backend" else model
    if front_end != "transform":
        ours = compiled(ours, rule)
    with torch.autocast("cpu", torch.bfloat16):
        expected, got = model(X), ours(X)
    assert expected.dtype == got.dtype == torch.float32
    assert torch.equal(expected, got)
    got.square().mean().backward()
    assert (zero_rows(model.weight.grad), zero_rows(model.stem.weight.grad)) == ((4, 2) if factor else (0, 0))


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 3, 3, 3))

    def forward(self, x):
        return nn.functional.conv2d(x, self.weight)


@pytest.mark.parametrize("part", [lambda: nn.Conv2d(3, 8, 3), lambda: nn.ConvTranspose2d(3, 8, 3), Functional])
def test_parts_of_a_transformed_model_are_not_transformed_again(part):
    """Their old policy would go on deciding, whatever the new one and its report say."""
    model = transformed(nn.Sequential(part(), nn.ReLU()), policy())
    for again in (model[0], nn.Sequential(*model.children(), nn.Conv2d(8, 8, 3))):
        with pytest.raises(TransformError, match="part of a model that has been transformed already"):
            transformed(again, policy(drop_rate=0.0))


def test_what_torch_fx_makes_of_a_transformed_model():
    """Its modules' convolutions stay sparse; a functional one is traced as what the model's code says."""
    model = nn.Sequential(nn.Conv2d(3, 3, 3), Functional())
    traced = torch.fx.symbolic_trace(transformed(model, policy()))
    assert torch.equal(traced(X), model(X))
    grads = step(traced)
    assert zero_rows(grads["0.weight"]) == 2  # of three, one is kept
    assert zero_rows(grads["1.weight"]) == 0
    first = transformed(torch.fx.symbolic_trace(model), policy())
    assert zero_rows(step(first)["1.weight"]) == 4


@pytest.mark.parametrize("within", [False, True])
def test_a_graph_of_torch_fx_is_transformed_and_compiled(within):
    """Dynamo asks a GraphModule's forward, which interception replaces, for its code."""
    graph = torch.fx.symbolic_trace(Functional())
    first = transformed(nn.Sequential(graph, nn.ReLU()) if within else graph, policy())
    model = torch.compile(first, backend="ssprop", options={"inner": "aot_eager"}, fullgraph=True)
    assert [zero_rows(grad) for grad in step(model).values()] == [4]


def without_its_last_operation(graph):
    for node in list(graph.graph.nodes)[-2:-1]:
        node.replace_all_uses_with(node.args[0])
        graph.graph.erase_node(node)
    graph.graph.eliminate_dead_code()
    graph.graph.lint()
    graph.recompile()


@pytest.mark.parametrize("within", [False, True])
@pytest.mark.parametrize("first", [lambda: nn.Conv2d(3, 8, 3), Functional])
def test_a_graph_of_torch_fx_and_its_transformed_copy_are_changed_one_by_one(first, within):
    """Its code lies in its class, of which there is one for each."""
    graph = torch.fx.symbolic_trace(nn.Sequential(first(), nn.BatchNorm2d(8), nn.Dropout(0.0), nn.ReLU(), nn.ReLU()))
    original = nn.Sequential(graph) if within else graph
    whole = transformed(original, policy())
    model = whole[0] if within else whole
    y = original(X)
    assert (y >= 0).all()
    without_its_last_operation(graph)
    without_its_last_operation(graph)
    changed = original(X)
    assert (changed < 0).any()
    assert torch.equal(whole(X), y)
    without_its_last_operation(model)
    without_its_last_operation(model)
    assert torch.equal(whole(X), changed)
    assert ssprop_fx.inspect(whole, X).coverage == 1
    assert torch.equal(whole(X), changed)
    assert zero_rows(next(grad for grad in step(whole).values() if grad.dim() == 4)) == 4
    without_its_last_operation(model)
    assert torch.equal(original(X), changed)
    assert type(model).__name__ == type(graph).__name__
    assert isinstance(model.graph.owning_module, torch.fx.GraphModule)
    assert type(pickle.loads(pickle.dumps(model))(X)) is torch.Tensor


def test_a_feature_extractor_of_torchvision_changes_its_graph_with_the_mode():
    """It has two graphs, one for evaluation, and puts one or the other into its class."""
    features = pytest.importorskip("torchvision.models.feature_extraction")

    class Dropping(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.inner = nn.Conv2d(3, 3, 3), Functional()

        def forward(self, x):
            y = self.inner(self.conv(x))
            return nn.functional.dropout(y, 0.5, self.training)

    original = features.create_feature_extractor(Dropping(), ["dropout"])
    model = transformed(original, policy())
    model.eval()
    assert torch.equal(model(X)["dropout"], model(X)["dropout"])
    assert (original(X)["dropout"] == 0).any()
    model.train()
    assert (model(X)["dropout"] == 0).any()
    model(X)["dropout"].sum().backward()
    assert [zero_rows(p.grad) for p in model.parameters() if p.dim() == 4] == [2, 4]


def test_the_original_of_a_transformed_model_is_compiled_under_another_policy():
    for _ in range(3):
        torch._dynamo.reset()
        original = Functional()
        copied = transformed(original, policy())
        step(copied)
        assert zero_rows(step(compiled(original, policy(drop_rate=0.75)))["weight"]) == 6
        assert zero_rows(step(torch.compile(copied, backend="ssprop", options={"inner": "aot_eager"}))["weight"]) == 4


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_a_sharded_model_is_refused():
    from torch.distributed.fsdp import FSDPModule

    sharded = type("FSDPSequential", (FSDPModule, nn.Sequential), {"__new__": lambda cls, *args: object.__new__(cls)})
    inner = sharded(nn.Conv2d(3, 8, 3))
    for model in (inner, nn.Sequential(inner)):
        with pytest.raises(TransformError, match="sharded by FSDP; call transform first"):
            transformed(model, policy())


def test_a_transformed_model_is_compiled_under_its_own_policy_and_no_other():
    rule = policy()
    model = transformed(nn.Sequential(nn.Conv2d(3, 8, 3)), rule)
    assert zero_rows(step(compiled(model, rule))["0.weight"]) == 4
    torch._dynamo.reset()
    error = refused(compiled, model, "transformed under one policy and is compiled with another")
    assert isinstance(error, SSPropError)


class ScriptedFunction(nn.Module):
    """A convolution function that only TorchScript's interpreter sees, below a convolution module."""

    def __init__(self):
        super().__init__()
        self.stem, self.kernel = nn.Conv2d(3, 4, 3), nn.Parameter(torch.randn(4, 4, 3, 3))
        self.blur = torch.jit.script(_blur)

    def forward(self, x):
        return self.blur(self.stem(x), self.kernel)


def _blur(x, w):
    return torch.conv2d(x, w)


def test_a_convolution_in_a_scripted_function_stays_dense_and_is_named_with_its_module():
    model = nn.Sequential(ScriptedFunction(), nn.Conv2d(4, 2, 1))
    report = ssprop_fx.inspect(transformed(model, policy()), X)
    assert report.coverage == pytest.approx(2 / 3)
    left = {row.layer: row.reason for row in report.rows if row.rung == "-"}
    assert list(left) == ["0#convolution"]
    assert left["0#convolution"].startswith("1 in a step, made by code that transform did not recognise")
    assert report.measurement.hidden == {"0": 1}


def test_a_scripted_part_is_named_once():
    model = nn.Sequential(torch.jit.script(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())), nn.Conv2d(4, 2, 1))
    report = ssprop_fx.inspect(transformed(model, policy()), X)
    assert [row.layer for row in report.rows if row.rung == "-"] == ["0.0"]
    assert report.measurement.hidden == {}


def test_the_backend_reaches_a_convolution_in_a_scripted_function():
    model = nn.Sequential(ScriptedFunction(), nn.Conv2d(4, 2, 1))
    ours = compiled(model, policy())
    step(ours)
    assert ssprop_fx.inspect(ours, X).coverage == 1


def test_a_compiled_model_is_not_transformed():
    for model in (torch.compile(nn.Conv2d(3, 8, 3)), nn.Sequential(torch.compile(nn.Conv2d(3, 8, 3)))):
        with pytest.raises(TransformError, match=r"already compiled.*transform first"):
            transformed(model, policy())


@pytest.mark.parametrize(
    "thing",
    [nn.Conv2d, lambda x: x, 3, None, "resnet18", [nn.Conv2d(3, 8, 3)]],
    ids=["class", "function", "number", "None", "name", "list"],
)
def test_what_is_no_module_is_refused(thing):
    with pytest.raises(TransformError, match=rf"takes a torch\.nn\.Module, got {type(thing).__name__}"):
        transformed(thing, policy())
    with pytest.raises(TransformError, match=rf"explain takes a torch\.nn\.Module, got {type(thing).__name__}"):
        policy().explain(thing)


def test_a_compiled_function_of_a_module_is_a_model_like_any_other():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3))
    compiled(lambda x: model(x).relu(), policy())(X).sum().backward()
    assert zero_rows(model[0].weight.grad) == 4
    assert ssprop_fx.inspect(model)["0"].rewritten


def test_a_model_with_one_convolution_at_the_root_has_an_empty_name():
    torch.manual_seed(0)
    model = transformed(nn.Conv2d(3, 8, 3), policy())
    assert zero_rows(step(model)["weight"]) == 4
    assert [row.layer for row in ssprop_fx.inspect(model).rows] == [""]


@pytest.mark.parametrize("last", [False, True], ids=["channels first", "channels last"])
@pytest.mark.parametrize(
    "cls",
    [nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d],
    ids=lambda c: c.__name__,
)
def test_geometry_in_numpys_integers_is_that_in_pythons(cls, last):
    """PyTorch's convolutions take them; computed paddings often are."""
    numpy = pytest.importorskip("numpy")
    dim = int(cls.__name__[-2])
    written = {"stride": 2, "padding": 1, "dilation": 1} | ({"output_padding": 1} if "Transpose" in cls.__name__ else {})
    results = []
    for per_dim, groups in (lambda n: (n,) * dim, 2), (lambda n: tuple(numpy.array([n] * dim)), numpy.int64(2)):
        torch.manual_seed(0)
        model = transformed(cls(8, 16, 3, groups=groups, **{k: per_dim(n) for k, n in written.items()}), policy())
        x = torch.randn(2, 8, *[7] * dim)
        if last and dim > 1:
            x = x.to(memory_format=torch.channels_last if dim == 2 else torch.channels_last_3d)
        x.requires_grad_()
        for _ in range(2):  # the second call's geometry is known from the first
            grads = step(model, x)
        results.append([x.grad, *grads.values()])
    for numbers, given in zip(*results, strict=True):
        assert torch.equal(numbers, given)


WRONG = {
    "none": lambda x: None,
    "numpy": lambda x: x.numpy(),
    "list": lambda x: x.tolist(),
    "double": lambda x: x.double(),
    "whole numbers": lambda x: x.long(),
    "channels": lambda x: x[:, :2],
    "dimensions": lambda x: x[None],
    "unbatched channels": lambda x: x[0, :2],
    "smaller than the kernel": lambda x: x[..., :2],
}
LAYERS = {
    "conv": lambda: nn.Conv2d(3, 8, 3),
    "same": lambda: nn.Conv2d(3, 8, 3, padding="same"),
    "transposed": lambda: nn.ConvTranspose2d(3, 8, 3, bias=False),
    "padding": lambda: nn.Conv2d(3, 8, 3, padding=(1, 2, 3)),
    "frozen": lambda: nn.Conv2d(3, 8, 3).requires_grad_(False),
    "called under another name": Functional,
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_a_sparse_step_tells_errors_as_the_original_does(make, wrong):
    model = make()
    sparse, x, errors = transformed(model, policy()), X.clone(), []
    given = wrong(x)
    if isinstance(given, torch.Tensor) and given.is_floating_point():
        given.requires_grad_()
    for network in (model, sparse):
        try:
            network(given)
        except Exception as problem:
            errors.append((type(problem), str(problem), problem.__context__ is None or problem.__suppress_context__))
        else:
            errors.append((None, "", True))
    assert errors[0] == errors[1]
    assert errors[1][2]


def test_an_error_of_a_users_own_hook_is_told_as_it_is():
    model, packed = transformed(nn.Conv2d(3, 8, 3), policy()), []

    def pack(tensor):
        packed.append(tensor)
        raise ValueError("of the hook")

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), pytest.raises(ValueError, match="of the hook"):
        model(X)
    assert len(packed) == 1
    assert zero_rows(step(model)["weight"]) == 4
