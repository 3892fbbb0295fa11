"""``drop_over``: what is dropped equals the dense backward of a gradient with those units set to zero, and saves nothing."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import ssprop_fx
from ssprop_fx import Policy, PolicyError

OVERS = ("space", "channels_space", "channels_per_sample")


def policy(over, drop_rate=0.5, **more):
    return Policy(drop_rate=drop_rate, drop_over=over, round_to=1, schedule={"kind": "constant"}, **more)


def reference(grad, output, criterion, over, groups, share):
    """The masked gradient, unit by unit."""
    n, k, *spatial = grad.shape
    g, y = grad.double().reshape(n, k, -1), output.double().reshape(n, k, -1)

    def score(g, y):
        return {"l1": g.abs().mean(), "l2": g.square().sum().sqrt(), "taylor": (g * y).sum().abs()}[criterion]

    kept = torch.zeros_like(g, dtype=torch.bool)
    if over == "channels_per_sample":
        per_group = k // groups
        sets = [range(k)] if per_group == 1 else [range(i * per_group, (i + 1) * per_group) for i in range(groups)]
        for sample in range(n):
            for members in sets:
                ranked = sorted(members, key=lambda c: -score(g[sample, c], y[sample, c]).item())
                kept[sample, ranked[: max(1, int(share * len(ranked)))]] = True
    elif over == "space":
        positions = sorted(range(g.shape[2]), key=lambda p: -score(g[:, :, p], y[:, :, p]).item())
        kept[:, :, positions[: max(1, int(share * len(positions) + 0.5))]] = True
    else:
        elements = [(c, p) for c in range(k) for p in range(g.shape[2])]
        elements.sort(key=lambda at: -score(g[:, at[0], at[1]], y[:, at[0], at[1]]).item())
        for c, p in elements[: max(1, int(share * len(elements) + 0.5))]:
            kept[:, c, p] = True
    return torch.where(kept.view(grad.shape), grad, 0)


FORMS = {
    "conv2d": (lambda: nn.Conv2d(3, 8, 3), (4, 3, 6, 7)),
    "strided, grouped": (lambda: nn.Conv2d(4, 8, 3, 2, 1, groups=2), (3, 4, 6, 5)),
    "depthwise": (lambda: nn.Conv2d(6, 6, 3, groups=6, bias=False), (2, 6, 5, 5)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 2, 2), (2, 4, 3, 4)),
    "conv1d": (lambda: nn.Conv1d(3, 6, 2), (3, 3, 8)),
    "conv3d": (lambda: nn.Conv3d(2, 4, 2), (2, 2, 3, 4, 3)),
}


@pytest.mark.parametrize("criterion", ["l1", "l2", "taylor"])
@pytest.mark.parametrize("over", OVERS)
@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_those_of_the_masked_gradient(form, over, criterion):
    torch.manual_seed(0)
    build, shape = FORMS[form]
    module = build().double()
    input = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    output = module(input)
    grad = torch.randn_like(output)
    masked = reference(grad, output.detach(), criterion, over, getattr(module, "groups", 1), 0.5)
    assert not torch.equal(masked, grad)
    tensors = [input, *module.parameters()]
    expected = torch.autograd.grad(output, tensors, masked)
    sparse = ssprop_fx.transform(module, policy(over, criterion=criterion))
    again = sparse(input)
    assert torch.equal(again, output)
    for got, want in zip(torch.autograd.grad(again, tensors, grad), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("over", OVERS)
def test_the_input_gradient_stays_dense_with_gradients_weight(over):
    torch.manual_seed(0)
    module = nn.Conv2d(3, 8, 3)
    input = torch.randn(4, 3, 6, 6, requires_grad=True)
    sparse = ssprop_fx.transform(module, policy(over, gradients="weight"))
    dense = torch.autograd.grad(module(input).square().sum(), [input, module.weight])
    got = torch.autograd.grad(sparse(input).square().sum(), [input, module.weight])
    assert torch.equal(got[0], dense[0])
    assert not torch.allclose(got[1], dense[1])


@pytest.mark.parametrize("shape", [(5, 6), (2, 3, 6)])
def test_a_linear_layer_chooses_for_each_row(shape):
    torch.manual_seed(0)
    module = nn.Linear(6, 8).double()
    input = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    rule = {"kind": "linear", "drop_rate": 0.75, "drop_over": "channels_per_sample", "round_to": 1}
    sparse = ssprop_fx.transform(nn.Sequential(module), Policy(rules=[rule], schedule={"kind": "constant"}))
    output = module(input)
    grad = torch.randn_like(output)
    best = grad.abs().topk(2, dim=-1).indices  # of eight output features, for every row
    masked = torch.zeros_like(grad).scatter(-1, best, grad.gather(-1, best))
    tensors = [input, module.weight, module.bias]
    expected = torch.autograd.grad(output, tensors, masked)
    for got, want in zip(torch.autograd.grad(sparse(input), tensors, grad), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("over", OVERS)
def test_random_keeps_the_share(over):
    torch.manual_seed(0)
    module = nn.Conv2d(3, 10, 1, bias=False)
    sparse = ssprop_fx.transform(module, policy(over, 0.8, criterion="random"))
    input = torch.eye(3).repeat(4, 1, 1).view(4, 3, 3, 1)
    (grad,) = torch.autograd.grad(sparse(input), module.weight, torch.ones(4, 10, 3, 1))
    # the weight's gradient counts the kept elements of a channel at each of its three one-hot positions
    kept = {"space": 4 * 10 * 1, "channels_space": 4 * 6, "channels_per_sample": 4 * 2 * 3}[over]
    assert grad.sum().item() == kept


@pytest.mark.parametrize("over", OVERS)
def test_compiled_gradients_equal_the_eager_ones(over):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3, groups=2), nn.Flatten(), nn.Linear(24, 5))
    linear = {"kind": "linear", "drop_rate": 0.5, "drop_over": "channels_per_sample"}
    input = torch.randn(4, 3, 6, 6)
    found = []
    for compiled in (False, True):
        used = policy(over, rules=[linear])
        if compiled:
            run = torch.compile(model, backend="ssprop", options={"policy": used, "inner": "aot_eager"})
        else:
            run = ssprop_fx.transform(model, used)
        found.append(torch.autograd.grad(run(input).square().sum(), list(model.parameters())))
        torch._dynamo.reset()
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, eager)


@pytest.mark.parametrize("over", OVERS)
def test_flops_and_report_say_that_nothing_is_saved(over):
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3))
    input = torch.randn(2, 3, 8, 8)
    counts = []
    for run in (model, ssprop_fx.transform(model, policy(over, 0.8))):
        with FlopCounterMode(display=False) as counter:
            run(input).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1]
    report = ssprop_fx.inspect(run, input)
    assert report.flops_now == report.flops_dense > 0
    assert all("saves nothing" in row.reason and row.criterion == f"l1 over {over}" for row in report.rows)
    assert f"l1 over {over}" in str(policy(over).explain(model))


def test_dropped_units_may_be_infinite():
    module = nn.Conv2d(2, 4, 1, bias=False)
    input = torch.randn(1, 2, 4, 4, requires_grad=True)
    sparse = ssprop_fx.transform(module, policy("space"))
    grad = torch.ones(1, 4, 4, 4)
    grad[..., 0, 0] = torch.inf  # ranks first: kept
    (got,) = torch.autograd.grad(sparse(input), input, grad)
    assert not got[..., 0, 0].isfinite().all()
    assert got.isfinite().sum() == 2 * 15


def test_linear_layers_have_no_space():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(64, 4))
    with pytest.raises(PolicyError, match="linear layers such as 2 have no space"):
        ssprop_fx.transform(model, policy("space", rules=[{"kind": "linear", "drop_rate": 0.5}]))
    ssprop_fx.transform(model, policy("space"))


def test_a_wrong_unit_is_an_error_with_the_nearest():
    with pytest.raises(PolicyError, match="Nearest: channels_space"):
        Policy(drop_over="channel_space")
