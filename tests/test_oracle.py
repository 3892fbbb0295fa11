"""C3: gradients equal the dense backward's with every dropped channel set to zero, computed the slow way; C2: at d = 0, the dense."""

import pytest
import torch
from hypothesis import given
from oracle import CRITERIA, Case, cases, check_gradients, check_keep, generated

import ssprop_fx
from ssprop_fx import ops
from ssprop_fx.backward import sparse_backward
from ssprop_fx.convolutions import CONVOLUTIONS
from ssprop_fx.selection import AUTO
from ssprop_fx.transform import transformation_of


def constant_policy(case: Case, **changes) -> ssprop_fx.Policy:
    contents = {
        "drop_rate": case.drop_rate,
        "criterion": case.criterion,
        "round_to": case.round_to,
        "gradients": case.gradients,
    }
    return ssprop_fx.Policy(**contents | changes, schedule={"kind": "constant"})


def prepared(case: Case, module, input):
    options = {"output_padding": case.output_padding} if case.spec.transposed else {}
    return case.spec.prepare(input, module.weight, case.stride, case.padding, case.dilation, case.groups, **options)


def operator_settings(case: Case) -> tuple:
    round_to = AUTO if case.round_to == "auto" else case.round_to
    return "layer", case.drop_rate, case.criterion, round_to, case.gradients, ""


def gradients_of(output, tensors, grad):
    leaves = [t for t in tensors if t is not None and t.requires_grad]
    found = list(torch.autograd.grad(output, leaves, grad)) if leaves else []
    return [found.pop(0) if t is not None and t.requires_grad else None for t in tensors]


def check_backward(case: Case, compiling: bool) -> None:
    module = case.module()
    call = prepared(case, module, case.input().detach())
    input = call.input.detach().requires_grad_(case.frozen != "input")
    tensors = (input, module.weight, module.bias)

    def forward(input, weight, bias):
        return torch.convolution(input, weight, bias, *call.args)

    output = forward(*tensors).detach()
    grad = case.output_grad(output)
    keep = case.channels if case.drop_rate == 0 else max(1, int(case.wanted))
    mask = [t is not None and t.requires_grad for t in tensors]
    with torch.no_grad():
        y = output if case.criterion == "taylor" else None
        got = sparse_backward(grad, input, module.weight, y, call.args, mask, keep, case.criterion, case.gradients, compiling)
    check_gradients(case, forward, tensors, output, grad, got, keep)


@generated(150)
@given(cases())
def test_sparse_backward_equals_the_masked_dense_backward(case):
    check_backward(case, compiling=False)


@generated(100)
@given(cases())
def test_sparse_backward_as_the_compiler_traces_it_equals_the_masked_dense_backward(case):
    check_backward(case, compiling=True)


@generated(150)
@given(cases())
def test_operator_equals_the_masked_dense_backward(case):
    module, input = case.module(), case.input()
    tensors = (input, module.weight, module.bias)
    call = prepared(case, module, input)
    output = ops.conv(call.input, module.weight, module.bias, *call.args, *operator_settings(case))
    if call.unbatched:
        output = output.squeeze(0)
    dense = case.call(*tensors)
    assert torch.equal(output, dense)
    grad = case.output_grad(output)
    settings = operator_settings(case)
    keep = ops.kept_now("layer", settings[1], settings[3], "", module.weight, call.args)
    check_keep(case, keep)
    check_gradients(case, case.call, tensors, dense, grad, gradients_of(output, tensors, grad), keep)


@generated(150)
@given(cases(modules=True))
def test_transformed_module_equals_the_masked_dense_backward(case):
    original, input = case.module(), case.input()
    model = ssprop_fx.transform(torch.nn.Sequential(original), constant_policy(case))
    tensors = (input, original.weight, original.bias)

    def forward(input, weight, bias):
        parameters = {"weight": weight, "bias": bias} if case.bias else {"weight": weight}
        return torch.func.functional_call(original, parameters, input)

    output, dense = model(input), original(input)
    assert torch.equal(output, dense)
    grad = case.output_grad(output)
    got = gradients_of(output, tensors, grad)
    (site,) = transformation_of(model).sites.values()
    keep = site.allocation.keep("0", case.channels, case.drop_rate, 1.0, site.round_to)
    check_keep(case, keep)
    check_gradients(case, forward, tensors, dense, grad, got, keep)


FORMS = {
    "plain": ("conv2d", 4, 12, 1),
    "grouped": ("conv2d", 4, 12, 2),
    "depthwise": ("conv2d", 12, 12, 12),
    "transposed": ("conv_transpose2d", 4, 12, 1),
    "transposed grouped": ("conv_transpose1d", 4, 12, 2),
    "transposed depthwise": ("conv_transpose2d", 12, 12, 12),
}


def layer(form):
    name, ins, outs, groups = FORMS[form]
    torch.manual_seed(0)
    module = CONVOLUTIONS[name].module(ins, outs, 3, padding=1, groups=groups)
    return module, torch.randn(2, ins, *[5] * CONVOLUTIONS[name].dim, requires_grad=True)


def poisoned(output, value):
    """A gradient in which one element of the channel 5 is not finite and everything there is small otherwise."""
    grad = torch.randn(output.shape)
    grad[:, 5] *= 1e-6
    grad[1, 5, 2] = value
    return grad


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("way", ["eager", "compiling", "operator", "transform"])
def test_non_finite_gradient_reaches_every_gradient(way, form, criterion, value):
    module, input = layer(form)
    tensors = (input, module.weight, module.bias)
    spec = CONVOLUTIONS[FORMS[form][0]]
    call = spec.prepare(input, module.weight, 1, 1, 1, module.groups)
    if way == "transform":
        policy = ssprop_fx.Policy(drop_rate=0.8, criterion=criterion, round_to=1, schedule={"kind": "constant"})
        output = ssprop_fx.transform(module, policy)(input)
        got = torch.autograd.grad(output, tensors, poisoned(output, value))
    elif way == "operator":
        output = ops.conv(input, module.weight, module.bias, *call.args, "l", 0.8, criterion, 1, "all", "")
        got = torch.autograd.grad(output, tensors, poisoned(output, value))
    else:
        with torch.no_grad():
            output = module(input)
            got = sparse_backward(
                poisoned(output, value),
                input,
                module.weight,
                output,
                call.args,
                (True, True, True),
                1,
                criterion,
                compiling=way == "compiling",
            )
    for gradient in got:
        assert not gradient.isfinite().all()
    assert not got[2][5].isfinite()
    assert got[2].ne(0).sum() < len(got[2])  # and it was a sparse backward pass that showed it


@pytest.mark.parametrize("criterion", CRITERIA)
def test_keeping_all_channels_is_the_dense_backward_bit_for_bit(criterion):
    for form in FORMS:
        module, input = layer(form)
        tensors = (input, module.weight, module.bias)
        dense = module(input)
        grad = torch.randn_like(dense)
        expected = torch.autograd.grad(dense, tensors, grad)
        policy = ssprop_fx.Policy(
            drop_rate=0.0, criterion=criterion, rules=[{"layers": "none", "drop_rate": 0.5, "optional": True}]
        )
        off = ssprop_fx.Policy(drop_rate=0.8, criterion=criterion, schedule={"kind": "constant", "end": 0.0})
        for chosen in (policy, off):
            got = torch.autograd.grad(ssprop_fx.transform(module, chosen)(input), tensors, grad)
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
