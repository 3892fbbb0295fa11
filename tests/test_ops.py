"""The operator pair is a well-behaved PyTorch operator: schema, fake kernels, autograd, autocast, FLOPs, double backward."""

import pytest
import torch
from oracle import CRITERIA
from torch.utils.flop_counter import FlopCounterMode

import ssprop_fx
from ssprop_fx import ops
from ssprop_fx.convolutions import CONVOLUTIONS, ConvArgs
from ssprop_fx.errors import SSPropError

ops.register_flop_formulas()

# name: function, in, out, groups, spatial, options
FORMS = {
    "1d": ("conv1d", 3, 8, 1, (7,), {"stride": 2}),
    "2d": ("conv2d", 3, 8, 1, (6, 5), {"padding": 1}),
    "2d strided dilated": ("conv2d", 3, 8, 1, (9, 9), {"stride": (2, 1), "dilation": (1, 2)}),
    "3d": ("conv3d", 2, 8, 1, (4, 4, 3), {"padding": 1}),
    "pointwise": ("conv2d", 5, 8, 1, (4, 4), {"kernel": 1}),
    "grouped": ("conv2d", 4, 12, 2, (5, 5), {"padding": 1}),
    "depthwise": ("conv2d", 8, 8, 8, (5, 5), {"padding": 1}),
    "depthwise, two inputs a group": ("conv2d", 16, 8, 8, (5, 5), {"padding": 1}),
    "transposed 1d": ("conv_transpose1d", 3, 8, 1, (6,), {"stride": 2, "output_padding": 1}),
    "transposed 2d": ("conv_transpose2d", 3, 8, 1, (4, 4), {"stride": 2, "padding": 1}),
    "transposed 3d": ("conv_transpose3d", 2, 8, 1, (3, 3, 3), {"stride": 2}),
    "transposed grouped": ("conv_transpose2d", 4, 12, 2, (4, 4), {"stride": 2}),
    "transposed depthwise": ("conv_transpose2d", 8, 8, 8, (4, 4), {}),
}
MASKS = {
    "all": (True, True, True),
    "no bias": (True, True, False),
    "frozen weight": (True, False, True),
    "frozen input": (False, True, True),
    "bias only": (False, False, True),
    "input only": (True, False, False),
}


def tensors(form, dtype=torch.float32, bias=True, channels_last=False):
    """(input, weight, bias), all requiring a gradient, and the geometry."""
    name, ins, outs, groups, spatial, options = FORMS[form]
    spec = CONVOLUTIONS[name]
    torch.manual_seed(0)
    options = dict(options)
    module = spec.module(ins, outs, options.pop("kernel", 3), groups=groups, bias=bias, **options).to(dtype)
    input = torch.randn(2, ins, *spatial, dtype=dtype)
    if channels_last:
        input, module = (t.to(memory_format=torch.channels_last) for t in (input, module))
    call = spec.prepare(input, module.weight, groups=groups, **options)
    leaves = [t if t is None else t.detach().clone().requires_grad_() for t in (module.weight, module.bias)]
    return (input.requires_grad_(), *leaves), call.args


def settings(rate=0.5, criterion="l1", round_to=1, gradients="all"):
    return "layer", rate, criterion, round_to, gradients, ""


def channels(form):
    _, _, outs, groups, _, _ = FORMS[form]
    return groups if outs == groups else outs // groups


# --- the operators as PyTorch checks them -------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_conv_passes_opcheck(form):
    given, args = tensors(form)
    torch.library.opcheck(ops.conv, (*given, *args, *settings()))


@pytest.mark.parametrize(
    "changes",
    [
        {"criterion": "l2"},
        {"criterion": "taylor"},
        {"round_to": 4},
        {"round_to": 0},
        {"gradients": "weight"},
        {"rate": 0.0},
    ],
    ids=str,
)
def test_conv_passes_opcheck_under_every_setting(changes):
    for form in ("grouped", "depthwise", "transposed 2d"):
        given, args = tensors(form, bias=False)
        torch.library.opcheck(ops.conv, (*given, *args, *settings(**changes)))


def test_conv_passes_opcheck_with_channels_last_and_frozen_tensors():
    for frozen in range(3):
        given, args = tensors("2d", channels_last=True)
        given[frozen].requires_grad_(False)
        torch.library.opcheck(ops.conv, (*given, *args, *settings()))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("form", FORMS)
def test_conv_backward_passes_opcheck(form, mask):
    given, args = tensors(form)
    input, weight, bias = (t.detach() for t in given)
    output = torch.convolution(input, weight, bias, *args)
    grad = torch.randn_like(output)
    for changes in ({}, {"criterion": "taylor"}, {"gradients": "weight"}):
        y = output if changes.get("criterion") == "taylor" else None
        call = (grad, input, weight, y, *args, list(MASKS[mask]), *settings(**changes))
        torch.library.opcheck(
            ops.conv_backward, call, test_utils=("test_schema", "test_autograd_registration", "test_faketensor")
        )


@pytest.mark.parametrize("form", FORMS)
def test_forward_is_bit_equal(form):
    for bias in (True, False):
        given, args = tensors(form, bias=bias)
        assert torch.equal(ops.conv(*given, *args, *settings()), torch.convolution(*given, *args))


@pytest.mark.parametrize("form", FORMS)
def test_dense_gradients_are_bit_equal_at_rate_zero(form):
    given, args = tensors(form)
    grad = torch.randn_like(torch.convolution(*given, *args))
    expected = torch.autograd.grad(torch.convolution(*given, *args), given, grad)
    got = torch.autograd.grad(ops.conv(*given, *args, *settings(rate=0.0)), given, grad)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_gradients_of_frozen_tensors_are_not_computed():
    given, args = tensors("2d")
    given[1].requires_grad_(False)
    output = ops.conv(*given, *args, *settings())
    with FlopCounterMode(display=False) as counter:
        output.sum().backward()
    assert given[1].grad is None
    assert counter.get_total_flops() == ops.conv_backward_flops(output.shape, given[1].shape, 1) // 2


def test_an_allocation_that_is_gone_is_named():
    given, args = tensors("2d")
    output = ops.conv(*given, *args, *settings()[:-1], "0123456789ab.999")
    with pytest.raises(SSPropError, match=r"0123456789ab\.999.*no longer exists"):
        output.sum().backward()


# --- autocast -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["1d", "2d", "grouped", "depthwise", "transposed 2d"])
def test_autocast_casts_as_for_a_convolution(form):
    given, args = tensors(form)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = ops.conv(*given, *args, *settings(rate=0.0))
        expected = torch.convolution(*(t.bfloat16() for t in given), *args)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, expected)
    grad = torch.randn_like(got)
    mine = torch.autograd.grad(got, given, grad)
    dense = torch.autograd.grad(expected, given, grad)
    assert [g.dtype for g in mine] == [torch.float32] * 3
    assert all(torch.equal(a, b) for a, b in zip(mine, dense, strict=True))


def test_autocast_leaves_float64_alone():
    given, args = tensors("2d", dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ops.conv(*given, *args, *settings()).dtype == torch.float64


def test_autocast_sparse_gradients_are_those_of_the_lower_precision():
    given, args = tensors("2d")
    low = [t.detach().bfloat16().requires_grad_() for t in given]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = ops.conv(*given, *args, *settings())
    expected = ops.conv(*low, *args, *settings())
    grad = torch.randn_like(output)
    mine = torch.autograd.grad(output, given, grad)
    theirs = torch.autograd.grad(expected, low, grad)
    assert all(torch.equal(a, b.float()) for a, b in zip(mine, theirs, strict=True))


# --- FLOPs --------------------------------------------------------------------------------------------------


def flops(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


@pytest.mark.parametrize("form", FORMS)
def test_flop_formulas_equal_those_of_the_dense_operators(form):
    given, args = tensors(form)
    dense = torch.convolution(*given, *args)
    mine = ops.conv(*given, *args, *settings(rate=0.0))
    forward = flops(lambda: torch.convolution(*given, *args))
    backward = flops(lambda: torch.autograd.grad(dense, given, torch.ones_like(dense)))
    assert forward > 0
    if args.groups > 1:  # PyTorch's own formula counts the weight's gradient as if there were no groups
        backward = 2 * forward
    assert flops(lambda: ops.conv(*given, *args, *settings(rate=0.0))) == forward
    assert flops(lambda: torch.autograd.grad(mine, given, torch.ones_like(mine))) == backward


@pytest.mark.parametrize("form", FORMS)
def test_sparse_backward_counts_the_kept_share(form):
    given, args = tensors(form)
    half = channels(form) // 2
    share = half / channels(form)
    forward = flops(lambda: torch.convolution(*given, *args))
    for gradients, expected in (("all", 2 * share), ("weight", 1 + share)):
        output = ops.conv(*given, *args, *settings(gradients=gradients))
        got = flops(lambda output=output: torch.autograd.grad(output, given, torch.ones_like(output)))
        assert got == int(forward * expected)


# --- double backward and torch.func -------------------------------------------------------------------------


def masked_dense(given, args, grad, keep):
    """Gradients of the dense convolution whose output gradient is masked, from differentiable operations."""
    with torch.no_grad():
        score = grad.abs().sum([0, *range(2, grad.dim())])
        groups = 1 if grad.shape[1] == args.groups else args.groups
        index = score.view(groups, -1).topk(keep, 1).indices
        mask = torch.zeros_like(score.view(groups, -1)).scatter_(1, index, 1.0).view(-1, *[1] * (grad.dim() - 2))
    output = torch.convolution(*given, *args)
    return torch.autograd.grad(output, given, grad * mask, create_graph=True)


@pytest.mark.parametrize("way", ["operator", "transform"])
@pytest.mark.parametrize("form", ["1d", "2d", "2d strided dilated", "3d", "grouped", "depthwise", "transposed 2d"])
def test_double_backward_equals_the_masked_dense_one(form, way):
    given, args = tensors(form, dtype=torch.float64)
    if way == "operator":
        output = ops.conv(*given, *args, *settings())
    else:
        output = transformed_call(form, given)
    torch.manual_seed(1)
    grad = torch.randn_like(output).requires_grad_()
    keep = channels(form) // 2
    first = torch.autograd.grad(output, given, grad, create_graph=True)
    expected = masked_dense(given, args, grad, keep)
    directions = [torch.randn_like(g) for g in first]
    second = torch.autograd.grad(first, (*given[:2], grad), directions)
    reference = torch.autograd.grad(expected, (*given[:2], grad), directions)
    for a, b in zip((*first, *second), (*expected, *reference), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10 * b.abs().max().item())
    assert second[2].ne(0).any()


def transformed_call(form, given):
    name, ins, outs, groups, _, options = FORMS[form]
    options = dict(options)
    module = CONVOLUTIONS[name].module(ins, outs, options.pop("kernel", 3), groups=groups, **options).double()
    policy = ssprop_fx.Policy(drop_rate=0.5, round_to=1, schedule={"kind": "constant"})
    model = ssprop_fx.transform(torch.nn.Sequential(module), policy)
    return torch.func.functional_call(model, {"0.weight": given[1], "0.bias": given[2]}, given[0])


@pytest.mark.parametrize("form", ["2d", "grouped", "depthwise", "transposed 2d"])
def test_gradients_of_gradients_pass_gradgradcheck_where_the_selection_is_constant(form):
    given, args = tensors(form, dtype=torch.float64)
    output = torch.convolution(*given, *args)
    scale = torch.arange(1, output.shape[1] + 1, dtype=torch.float64).view(-1, *[1] * (output.dim() - 2))
    grad = (torch.rand_like(output) + 1.0) * scale  # no step of the check changes the order of the channels

    def function(*given):
        return ops.conv(*given, *args, *settings())

    assert torch.autograd.gradgradcheck(function, given, grad_outputs=grad.requires_grad_(), fast_mode=True)


def model_and_policy(rate=0.5, criterion="l1"):
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(8, 6, 3), torch.nn.Flatten()
    ).double()
    policy = ssprop_fx.Policy(drop_rate=rate, criterion=criterion, round_to=1, schedule={"kind": "constant"})
    return ssprop_fx.transform(model, policy)


@pytest.mark.parametrize("criterion", CRITERIA[:3])
def test_func_grad_equals_backward(criterion):
    model, x = model_and_policy(criterion=criterion), torch.randn(4, 3, 6, 6, dtype=torch.float64)
    parameters = dict(model.named_parameters())
    got = torch.func.grad(lambda p: torch.func.functional_call(model, p, x).square().sum())(parameters)
    model(x).square().sum().backward()
    for name, parameter in parameters.items():
        torch.testing.assert_close(got[name], parameter.grad, rtol=1e-12, atol=1e-12)
    assert (got["2.bias"] == 0).sum() == 3


def test_vmap_selects_for_each_sample_by_itself():
    model, x = model_and_policy(), torch.randn(4, 1, 3, 6, 6, dtype=torch.float64)
    parameters = {k: v.detach() for k, v in model.named_parameters()}

    def loss(p, sample):
        return torch.func.functional_call(model, p, sample).square().sum()

    got = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    for i, sample in enumerate(x):
        model.zero_grad()
        model(sample).square().sum().backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(got[name][i], parameter.grad, rtol=1e-10, atol=1e-10)


def test_jacrev_runs_through_a_transformed_model():
    model, x = model_and_policy(), torch.randn(1, 3, 4, 4, dtype=torch.float64)
    jacobian = torch.func.jacrev(lambda x: model(x).sum(1))(x)
    model.zero_grad()
    x.requires_grad_()
    model(x).sum().backward()
    torch.testing.assert_close(jacobian[0], x.grad, rtol=1e-10, atol=1e-10)


def test_convargs_are_in_the_order_of_aten_convolution():
    schema = [a.name for a in torch.ops.aten.convolution.default._schema.arguments]
    assert schema[3:] == list(ConvArgs._fields)
    for operator, at in ((ops.conv, ops.SETTINGS_AT), (ops.conv_backward, ops.BACKWARD_SETTINGS_AT)):
        assert [a.name for a in operator._schema.arguments][at] == "layer"
