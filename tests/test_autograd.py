"""Autograd's less travelled roads: each leads where it does in the dense model, or where the policy says."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import ssprop_fx
from ssprop_fx import Policy

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


X = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def policy(**changes):
    return Policy(**({"drop_rate": 0.5, "round_to": 1, "schedule": {"kind": "constant"}} | changes))


def net(*layers):
    return nn.Sequential(*(layers or (nn.Conv2d(3, 8, 3), nn.Tanh(), nn.Conv2d(8, 8, 1, groups=8)))).double()


def gradients(model, x=X):
    model.zero_grad()
    model(x).square().sum().backward()
    return [p.grad for p in model.parameters()]


SHAPES = {
    "conv1d": (lambda: nn.Conv1d(3, 8, 3), (0, 3, 8)),
    "conv2d": (lambda: nn.Conv2d(3, 8, 3), (0, 3, 8, 8)),
    "conv3d": (lambda: nn.Conv3d(3, 8, 3), (0, 3, 8, 8, 8)),
    "pointwise": (lambda: nn.Conv2d(3, 8, 1), (0, 3, 8, 8)),
    "strided": (lambda: nn.Conv2d(3, 8, 1, stride=2), (0, 3, 8, 8)),
    "grouped": (lambda: nn.Conv2d(4, 8, 3, groups=2), (0, 4, 8, 8)),
    "depthwise": (lambda: nn.Conv2d(8, 8, 3, groups=8), (0, 8, 8, 8)),
    "transposed": (lambda: nn.ConvTranspose2d(3, 8, 3), (0, 3, 8, 8)),
}


@pytest.mark.parametrize("form", SHAPES)
@pytest.mark.parametrize(
    "changes",
    [{"criterion": c} for c in ("l1", "l2", "taylor", "random")]
    + [{"drop_over": d} for d in ("space", "channels_space", "channels_per_sample")],
    ids=str,
)
def test_an_empty_batch_has_gradients_of_zero(form, changes):
    """A detector's head meets one wherever an image shows nothing."""
    make, shape = SHAPES[form]
    model = ssprop_fx.transform(make(), policy(**changes))
    x = torch.randn(shape, requires_grad=True)
    model(x).sum().backward()
    assert x.grad.shape == shape
    assert all(not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("hooked", [False, True], ids=["plain", "saved tensors hooked"])
@pytest.mark.parametrize("inplace", [nn.ReLU(inplace=True), nn.Sequential(nn.Flatten(), nn.ReLU(inplace=True))])
def test_taylor_ranks_an_output_that_was_written_over(inplace, hooked):
    convolution = nn.Conv2d(3, 8, 3)
    expected = gradients(ssprop_fx.transform(net(convolution, nn.ReLU()), policy(criterion="taylor")))
    convolution.zero_grad()
    model = ssprop_fx.transform(net(convolution, inplace), policy(criterion="taylor"))
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda t: t) if hooked else torch.enable_grad():
        loss = model(X).square().sum()
    loss.backward(retain_graph=True)
    first = [p.grad.clone() for p in model.parameters()]
    loss.backward()
    for p, once, right in zip(model.parameters(), first, expected, strict=True):
        torch.testing.assert_close(once, right)
        assert torch.equal(p.grad, 2 * once)


def test_taylor_holds_no_output_after_the_backward_pass():
    model = ssprop_fx.transform(net(nn.Conv2d(3, 8, 3)), policy(criterion="taylor"))
    output = model(X)
    node = output.grad_fn
    assert node.output is not None
    output.sum().backward()
    assert node.output is None


@pytest.mark.parametrize("front", ["model", "parameters"])
def test_forward_mode_is_the_dense_models(front):
    dense = net()
    sparse, tangents = ssprop_fx.transform(dense, policy()), {k: torch.ones_like(v) for k, v in dense.named_parameters()}

    def derivative(model):
        with forward_ad.dual_level():
            if front == "model":
                return forward_ad.unpack_dual(model(forward_ad.make_dual(X, X.cos()))).tangent
            duals = {k: forward_ad.make_dual(v.detach().requires_grad_(), tangents[k]) for k, v in dense.named_parameters()}
            return forward_ad.unpack_dual(torch.func.functional_call(model, duals, (X,))).tangent

    torch.testing.assert_close(derivative(sparse), derivative(dense))
    ours, theirs = (torch.func.jvp(m, (X,), (X.sin(),)) for m in (sparse, dense))
    torch.testing.assert_close(ours, theirs)


def test_a_bias_alone_may_have_a_tangent():
    dense = net(nn.Conv2d(3, 8, 3))
    for model in (dense, ssprop_fx.transform(dense, policy())):
        with forward_ad.dual_level():
            bias = forward_ad.make_dual(dense[0].bias.detach().requires_grad_(), torch.arange(8.0).double())
            tangent = forward_ad.unpack_dual(torch.func.functional_call(model, {"0.bias": bias}, (X,))).tangent
        assert torch.equal(tangent, torch.arange(8.0).double().view(8, 1, 1).expand_as(tangent))


def test_forward_over_reverse_is_the_derivative_of_the_sparse_gradient():
    model = ssprop_fx.transform(net(nn.Conv2d(1, 6, 3), nn.Tanh(), nn.Flatten(), nn.Linear(24, 1)), policy())
    x = X[:1, :1, :4, :4]
    hessian = torch.func.hessian(lambda v: model(v).sum())(x)
    torch.testing.assert_close(hessian, torch.func.jacrev(torch.func.jacrev(lambda v: model(v).sum()))(x))


@pytest.mark.parametrize("criterion", ["l1", "l2", "taylor"])
def test_a_batch_of_gradients_is_each_of_them(criterion):
    model = net(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 8, 1, stride=2), nn.ConvTranspose2d(8, 4, 2))
    model = ssprop_fx.transform(model.to(memory_format=torch.channels_last), policy(criterion=criterion))
    output = model(X.contiguous(memory_format=torch.channels_last))
    given = torch.randn(4, *output.shape, dtype=output.dtype)
    parameters = list(model.parameters())
    together = torch.autograd.grad(output, parameters, given, is_grads_batched=True, retain_graph=True)
    alone = [torch.autograd.grad(output, parameters, g, retain_graph=True) for g in given]
    for ours, theirs in zip(together, zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(ours, torch.stack(theirs))


class NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return None


class Masks(TorchDispatchMode):
    """The output masks of the convolutions' backward passes."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.convolution_backward.default:
            self.seen.append(tuple(args[-1][:2]))  # a bias' gradient is a sum of its own in a sparse step
        return function(*args, **(kwargs or {}))


ASKED = {
    "everything": lambda model, x: model(x).sum().backward(),
    "the input": lambda model, x: torch.autograd.grad(model(x).sum(), x),
    "a layer's input": lambda model, x: torch.autograd.grad(model(x.tanh()).sum(), x),
    "a penalty": lambda model, x: torch.autograd.grad(model(x).sum(), x, create_graph=True)[0].norm().backward(),
    "one weight": lambda model, x: torch.autograd.grad(model(x).square().sum(), model[2].weight),
    "one bias": lambda model, x: model(x).square().sum().backward(inputs=[model[2].bias]),
    "checkpointed": lambda model, x: torch.autograd.grad(checkpoint(model, x, use_reentrant=False).sum(), x),
}


@pytest.mark.parametrize("asked", ASKED)
def test_only_the_gradients_that_are_asked_for_are_computed(asked):
    """A gradient penalty, an attack, a saliency map: the weights' products would be half of the work."""
    model = net(nn.Conv2d(3, 8, 3), nn.Tanh(), nn.Conv2d(8, 8, 3), nn.Tanh(), nn.Conv2d(8, 4, 3, bias=False))
    counts = []
    for version in (model, ssprop_fx.transform(model, policy())):
        with Masks() as masks:
            ASKED[asked](version, X.clone().requires_grad_())
        counts.append([mask for mask in masks.seen if any(mask)])
    assert counts[0] == counts[1]


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_random_channels_of_gradients_by_sample_are_as_vmap_is_told(randomness):
    torch.manual_seed(0)
    policy = Policy(drop_rate=0.5, criterion="random", round_to=1, schedule={"kind": "constant"})
    model, x = ssprop_fx.transform(nn.Conv2d(3, 32, 3), policy), torch.randn(2, 3, 8, 8)

    def loss(parameters, image):
        return torch.func.functional_call(model, parameters, (image[None],)).square().sum()

    by_sample = torch.func.vmap(torch.func.grad(loss), (None, 0), randomness=randomness)
    kept = by_sample(dict(model.named_parameters()), x)["weight"].flatten(2).abs().sum(2) > 0
    assert kept.sum(1).tolist() == [16, 16]
    assert torch.equal(kept[0], kept[1]) == (randomness == "same")


@pytest.mark.parametrize("frozen", [False, True])
def test_networks_side_by_side_in_vmap_drop_what_each_alone_would(frozen):
    nets = [net(nn.Conv2d(3, 10, 3)) for _ in range(3)]
    model = ssprop_fx.transform(nets[0], policy(drop_rate=0.8))
    inputs = torch.stack([X, X + 1, -X]).requires_grad_()
    if frozen:
        model.requires_grad_(False)
        (got,) = torch.autograd.grad(torch.func.vmap(model)(inputs).tanh().square().sum(), inputs)
        expected = [torch.autograd.grad(model(x).tanh().square().sum(), x)[0] for x in inputs.unbind()]
        torch.testing.assert_close(got, torch.stack(expected))
        return
    stacked, _ = torch.func.stack_module_state(nets)
    outputs = torch.func.vmap(lambda p, x: torch.func.functional_call(model, p, (x,)))(stacked, inputs)
    outputs.square().sum().backward()
    for i, alone in enumerate(nets):
        expected = gradients(ssprop_fx.transform(alone, policy(drop_rate=0.8)), inputs[i].detach())
        torch.testing.assert_close([p.grad[i] for p in stacked.values()], expected)
        assert int((expected[0].flatten(1).abs().sum(1) > 0).sum()) == 2


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_trace_by_jit_is_that_of_the_original():
    model, x = net().eval(), X
    traced = torch.jit.trace(ssprop_fx.transform(model, policy()), x)
    assert str(traced.inlined_graph.findAllNodes("aten::_convolution")).count("aten::_convolution") == 2
    assert torch.equal(traced(x), model(x))


def test_where_no_gradient_comes_from_none_goes():
    """A gradient of zeros would be weight decay's to act upon."""
    model = ssprop_fx.transform(net(nn.Conv2d(3, 8, 3)), policy())
    NoGradient.apply(model(X)).sum().backward()
    assert all(p.grad is None for p in model.parameters())


def test_a_backward_pass_inside_autocast_keeps_the_forwards_types():
    layer = net(nn.Conv2d(3, 16, 1)).float().to(memory_format=torch.channels_last)
    model, x = ssprop_fx.transform(layer, policy()), X.float().contiguous(memory_format=torch.channels_last)
    expected = [g.clone() for g in gradients(model, x)]
    model.zero_grad()
    loss = model(x).square().sum()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss.backward()
    assert all(torch.equal(p.grad, right) for p, right in zip(model.parameters(), expected, strict=True))


def test_complex_convolutions_stay_dense():
    layer = nn.Conv2d(3, 8, 3, dtype=torch.complex64)
    model, x = ssprop_fx.transform(layer, policy()), torch.randn(2, 3, 8, 8, dtype=torch.complex64)
    model(x).abs().square().sum().backward()
    ours = model.weight.grad.clone()
    layer.zero_grad()
    layer(x).abs().square().sum().backward()
    assert torch.equal(ours, layer.weight.grad)
    assert ssprop_fx.inspect(model).rows[0].reason == "complex numbers: only real convolutions are rewritten"


class ComplexFunction(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 3, 3, 3, dtype=torch.complex64))
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x):
        return F.conv2d(x.to(torch.complex64), self.weight).abs() + self.conv(x)


class ComplexLayer(nn.Conv2d):
    def forward(self, x):
        weight = torch.complex(self.weight, self.weight.flip(-1))
        return F.conv2d(x.to(torch.complex64), weight).abs()


@pytest.mark.parametrize("factor", [0.0, 1.0])
@pytest.mark.parametrize("make", [ComplexFunction, lambda: nn.Sequential(nn.Conv2d(3, 3, 1), ComplexLayer(3, 8, 3))])
def test_calls_with_complex_weights_are_told_to_stay_dense(make, factor):
    used = Policy(drop_rate=0.5, round_to=1, schedule={"kind": "constant", "end": factor})
    original, x = make(), torch.randn(2, 3, 8, 8)
    model = ssprop_fx.transform(original, used)
    model(x).square().sum().backward()
    for report in (
        ssprop_fx.inspect(model),
        ssprop_fx.inspect(model, x),
        ssprop_fx.inspect(ssprop_fx.transform(make(), used), x),
    ):
        assert len(report.rows) == 2
        assert [row.layer for row in report.rows if "complex numbers" in row.reason] in (["#conv2d.0"], ["1"])
        assert [row.layer for row in report.rows if row.rewritten] in (["conv"], ["0"])


class Checkpointed(nn.Module):
    """A block that ends with a convolution, of a module or of a function."""

    def __init__(self, functional, reentrant=False):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)
        self.functional, self.reentrant = functional, reentrant

    def block(self, x):
        x = x.tanh()
        return F.conv2d(x, self.b.weight, self.b.bias) if self.functional else self.b(x)

    def forward(self, x):
        return checkpoint(self.block, self.a(x), use_reentrant=self.reentrant)


@pytest.mark.parametrize("criterion", ["l1", "taylor"])
@pytest.mark.parametrize("functional", [False, True], ids=["module", "functional"])
def test_a_checkpointed_block_computes_nothing_that_the_dense_one_does_not(functional, criterion):
    dense = Checkpointed(functional).double()
    model = ssprop_fx.transform(dense, policy(criterion=criterion))
    plain = ssprop_fx.transform(nn.Sequential(dense.a, nn.Tanh(), dense.b), policy(criterion=criterion))
    expected = [g.clone() for g in gradients(plain)]
    for got, right in zip(gradients(model), expected, strict=True):
        torch.testing.assert_close(got, right)
    forwards = []
    for m in (dense, model):
        with FlopCounterMode(display=False) as counter:
            gradients(m)
        forwards.append(counter.get_flop_counts()["Global"][torch.ops.aten.convolution])
    again = criterion == "taylor"  # the output, for the ranking
    assert forwards[1] - forwards[0] == again * 2 * 2 * 4 * 4 * 8 * 8 * 9
    report = ssprop_fx.inspect(model, X)
    assert report.coverage == 1


def test_what_a_reentrant_checkpoint_makes_again_outside_of_the_forward_is_told():
    model = ssprop_fx.transform(Checkpointed(functional=True, reentrant=True).double(), policy())
    report = ssprop_fx.inspect(model, X)
    assert report.coverage == 0.5
    (row,) = [row for row in report.rows if not row.rewritten]
    assert "use_reentrant=False" in row.reason


@pytest.mark.parametrize("padding", ["same", "full"])
def test_a_padding_that_pytorch_refuses_is_refused(padding):
    class Padded(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 3, 3, 3))

        def forward(self, x):
            return F.conv2d(x, self.weight, stride=2, padding=padding)

    with pytest.raises(RuntimeError, match=r"[Pp]adding"):
        ssprop_fx.transform(Padded(), policy())(X.float())


@pytest.mark.parametrize(
    "activation", [lambda x: F.relu(x, inplace=True), lambda x: x.mul_(2), lambda x: F.elu(x, inplace=True)]
)
@pytest.mark.parametrize("first", [True, False])
def test_taylor_before_an_activation_in_place_in_compiled_code(activation, first):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)

        def forward(self, x):
            return self.second(activation(self.first(x)))

    def sparse():
        return Policy(drop_rate=0.5, round_to=1, criterion="taylor", schedule={"kind": "constant"})

    torch.manual_seed(0)
    model, x = Net(), torch.randn(2, 3, 8, 8)
    ssprop_fx.transform(model, sparse())(x).square().sum().backward()
    expected = [p.grad for p in model.parameters()]
    model.zero_grad()
    torch._dynamo.reset()
    options = {"inner": "aot_eager"} | ({} if first else {"policy": sparse()})
    torch.compile(ssprop_fx.transform(model, sparse()) if first else model, backend="ssprop", options=options)(
        x
    ).square().sum().backward()
    for p, wanted in zip(model.parameters(), expected, strict=True):
        assert torch.equal(p.grad, wanted)


def test_compiled_autograd_of_one_convolution_right_behind_another():
    torch.manual_seed(0)
    rule = policy()
    model, x = ssprop_fx.transform(nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1)), rule), torch.randn(2, 3, 8, 8)
    model(x).square().sum().backward()
    expected = [p.grad for p in model.parameters()]
    model.zero_grad()
    forward = torch._dynamo.disable(model)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(compiled_autograd=True):
        torch.compile(lambda: forward(x).square().sum().backward(), backend="aot_eager")()
    for p, wanted in zip(model.parameters(), expected, strict=True):
        assert torch.equal(p.grad == 0, wanted == 0)
        torch.testing.assert_close(p.grad, wanted)  # there in PyTorch's operations
