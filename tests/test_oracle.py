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
    return case.spec.prepare(
        input, module.weight, case.stride, case.padding, case.dilation, case.groups, **options
    )


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
        got = sparse_backward(
            grad, input, module.weight, y, call.args, mask, keep, case.criterion, case.gradients, compiling
        )
    check_gradients(case, forward, tensors, output, grad, got, keep)


@generated(200)
@given(cases())
def test_sparse_backward_equals_the_masked_dense_backward(case):
    check_backward(case, compiling=False)


@generated(150)
@given(cases())
def test_sparse_backward_as_the_compiler_traces_it_equals_the_masked_dense_backward(case):
    check_backward(case, compiling=True)


@generated(200)
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
    shape = grad.shape if case.batch is not None else (1, *grad.shape)
    keep = ops.kept_now("layer", settings[1], settings[3], "", shape, module.weight, case.groups)
    check_keep(case, keep)
    check_gradients(case, case.call, tensors, dense, grad, gradients_of(output, tensors, grad), keep)


@generated(250)
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
    (site,) = ssprop_fx.transform.__globals__["transformation_of"](model).sites.values()
    keep = site.allocation.keep("0", case.channels, case.drop_rate, 1.0, site.round_to)
    check_keep(case, keep)
    check_gradients(case, forward, tensors, dense, grad, got, keep)
