"""``kind: linear``: a linear layer under a policy is held to what convolutions are: oracle, bits, compiler, FLOPs."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import ssprop_fx
from ssprop_fx import Policy

SHAPES = [(6, 10), (2, 3, 10), (10,)]  # (*batch, C)
FEATURES = 12


def policy(drop_rate=0.75, **more):
    rule = {"kind": "linear", "drop_rate": drop_rate, "round_to": 1} | more
    return Policy(rules=[rule], schedule={"kind": "constant"})


def layer(bias=True, dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, FEATURES, bias=bias, dtype=dtype))


def masked(grad, output, criterion, keep):
    """The gradient with all but its ``keep`` most important features, over all leading dimensions, set to zero."""
    g, y = grad.double().reshape(-1, FEATURES), output.double().reshape(-1, FEATURES)
    score = {"l1": g.abs().mean(0), "l2": g.square().sum(0).sqrt(), "taylor": (g * y).sum(0).abs()}[criterion]
    kept = sorted(range(FEATURES), key=lambda feature: -score[feature].item())[:keep]
    return grad * torch.tensor([feature in kept for feature in range(FEATURES)], dtype=grad.dtype)


def compiled(model, used):
    return torch.compile(model, backend="ssprop", options={"policy": used, "inner": "aot_eager"}, dynamic=False)


@pytest.fixture(params=[ssprop_fx.transform, compiled], ids=["transform", "compile"])
def front_end(request):
    yield request.param
    torch._dynamo.reset()


@pytest.mark.parametrize("criterion", ["l1", "l2", "taylor"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_equal_the_masked_dense_ones(shape, criterion, front_end):
    model = layer()
    input = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    output = model(input)
    grad = torch.randn_like(output)
    tensors = [input, *model.parameters()]
    expected = torch.autograd.grad(output, tensors, masked(grad, output.detach(), criterion, 3))
    again = front_end(model, policy(criterion=criterion))(input)
    assert torch.equal(again, output)
    for got, want in zip(torch.autograd.grad(again, tensors, grad), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
        assert got.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precision(dtype, front_end):
    model = layer(dtype=dtype)
    input = torch.randn(8, 10, dtype=dtype, requires_grad=True)
    output = model(input)
    grad = torch.randn_like(output) * torch.linspace(0.1, 1, FEATURES, dtype=dtype)  # no two features are close
    tensors = [input, *model.parameters()]
    wide = [t.detach().double().requires_grad_() for t in tensors]
    kept = masked(grad, output.detach(), "l1", 3).double()
    expected = torch.autograd.grad(nn.functional.linear(*wide), wide, kept)
    got = torch.autograd.grad(front_end(model, policy())(input), tensors, grad)
    for value, want in zip(got, expected, strict=True):
        assert value.dtype == dtype
        torch.testing.assert_close(value.double(), want, rtol=4 * torch.finfo(dtype).eps, atol=16 * torch.finfo(dtype).eps)


def test_no_bias_and_frozen_weights(front_end):
    model = layer(bias=False)
    model[0].weight.requires_grad_(False)
    input = torch.randn(6, 10, dtype=torch.float64, requires_grad=True)
    output = model(input)
    grad = torch.randn_like(output)
    (expected,) = torch.autograd.grad(output, input, masked(grad, output.detach(), "l1", 3))
    (got,) = torch.autograd.grad(front_end(model, policy())(input), input, grad)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_the_input_gradient_stays_dense_with_gradients_weight(front_end):
    model = layer()
    input = torch.randn(6, 10, dtype=torch.float64, requires_grad=True)
    output = model(input)
    grad = torch.randn_like(output)
    dense = torch.autograd.grad(output, [input, model[0].weight], grad, retain_graph=True)
    kept = torch.autograd.grad(output, model[0].weight, masked(grad, output.detach(), "l1", 3))
    got = torch.autograd.grad(front_end(model, policy(gradients="weight"))(input), [input, model[0].weight], grad)
    torch.testing.assert_close(got[0], dense[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got[1], kept[0], rtol=1e-12, atol=1e-12)


def test_a_dense_phase_is_bit_equal():
    model = layer(dtype=torch.float32)
    used = Policy(rules=[{"kind": "linear", "drop_rate": 0.5}], schedule={"period": 2})
    input = torch.randn(6, 10)
    dense = torch.autograd.grad(model(input).square().sum(), list(model.parameters()))
    sparse = ssprop_fx.transform(model, used)
    got = torch.autograd.grad(sparse(input).square().sum(), list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(got, dense, strict=True))
    used.step()
    got = torch.autograd.grad(sparse(input).square().sum(), list(model.parameters()))
    assert not any(torch.equal(a, b) for a, b in zip(got, dense, strict=True))


def test_flops_are_those_of_the_kept_features():
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))
    input = torch.randn(4, 5, 32)
    counts = []
    sparse = ssprop_fx.transform(model, policy(0.75))
    for run in (model, sparse):
        with FlopCounterMode(display=False) as counter:
            loss = run(input).sum()
            forward = counter.get_total_flops()
            loss.backward()
        counts.append(counter.get_total_flops() - forward)
    one = 2 * 20 * 32 * 64
    assert counts == [3 * one, 3 * one // 4]  # the first layer's input needs no gradient
    report = ssprop_fx.inspect(sparse, input)
    assert (report.flops_dense, report.flops_now) == tuple(counts)
    assert [(row.kind, row.kept, row.total) for row in report.rows] == [("linear", 16, 64), ("linear", 8, 32)]


def test_a_forward_on_the_instance_is_that_of_the_layer(front_end):
    """As libraries that move weights around put one there."""
    model, x = layer(), torch.randn(6, 10, dtype=torch.float64)
    old = model[0].forward
    model[0].forward = lambda x: nn.functional.linear(old(x), torch.eye(FEATURES, dtype=x.dtype))
    expected = front_end(layer(), policy())
    rewritten = ssprop_fx.transform(model, policy())
    if front_end is compiled:
        rewritten = torch.compile(rewritten, backend="ssprop", options={"inner": "aot_eager"})
    for net in (expected, rewritten):
        net.zero_grad()
        net(x).square().sum().backward()
    grads = [dict(net.named_parameters()) for net in (expected, rewritten)]
    for a, b in zip(*(g.values() for g in grads), strict=True):
        assert torch.equal(a.grad, b.grad)
    assert model[0].bias.grad.eq(0).sum() == FEATURES - 3  # shared with the original
    (row,) = ssprop_fx.inspect(rewritten).rows
    assert (row.kind, row.reason, row.rewritten) == ("linear", "", True)


def test_linear_layers_are_dense_without_a_rule_that_names_them():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(16, 4))
    sparse = ssprop_fx.transform(model, Policy(rules=[{"layers": "*", "drop_rate": 0.7}], schedule={"kind": "constant"}))
    assert "forward" not in vars(sparse[2])
    input = torch.randn(2, 1, 4, 4)
    dense = torch.autograd.grad(model(input).square().sum(), model[2].weight)[0]
    assert torch.equal(torch.autograd.grad(sparse(input).square().sum(), model[2].weight)[0], dense)
