"""Backward passes of few channels write nowhere but into their results: glibc's checking allocator looks after each."""

import ctypes
import os
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

import ssprop_fx

CHECKER = "libc_malloc_debug.so.0"
CODE = """
import itertools, torch, ssprop_fx
torch.set_num_threads(1)
for dim, inputs, outputs, stride, last in itertools.product((1, 2), (3, 8, 12), (20, 80), (1, 2), (False, True)):
    layer = (torch.nn.Conv1d, torch.nn.Conv2d)[dim - 1](inputs, outputs, 1, stride)
    size = (2, inputs, 4096) if dim == 1 else (2, inputs, 64, 64)
    x = torch.randn(size)
    if last and dim == 2:
        x, layer = x.to(memory_format=torch.channels_last), layer.to(memory_format=torch.channels_last)
    model = ssprop_fx.transform(layer, {"drop_rate": 0.8, "schedule": {"kind": "constant"}})
    for _ in range(3):
        model(x).square().sum().backward()
for groups, per_group, kernel, transposed in itertools.product((4, 8), (1, 2), ((65, 1), (31, 3)), (False, True)):
    kind = torch.nn.ConvTranspose2d if transposed else torch.nn.Conv2d
    layer = kind(groups * per_group, groups, kernel, padding=(kernel[0] // 2, kernel[1] // 2), groups=groups)
    model = ssprop_fx.transform(layer, {"drop_rate": 0.9, "round_to": 1, "schedule": {"kind": "constant"}})
    for _ in range(3):
        x = torch.randn(2, groups * per_group, 16, 8, requires_grad=True)
        model(x).square().sum().backward()
print("whole")
"""


def loads(library):
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


@pytest.mark.skipif(not loads(CHECKER), reason=f"needs {CHECKER}, which comes with glibc")
def test_nothing_is_written_past_the_end():
    environment = os.environ | {"LD_PRELOAD": CHECKER, "MALLOC_CHECK_": "3"}
    done = subprocess.run([sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout.strip()) == (0, "whole"), done.stderr[-2000:]


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("stride", [2, (1, 2), 3])
def test_gradients_of_a_strided_pointwise_convolution(stride, last):
    torch.manual_seed(0)
    layer, x = torch.nn.Conv2d(3, 40, 1, stride), torch.randn(2, 3, 17, 18)
    if last:
        layer, x = layer.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    model = ssprop_fx.transform(layer, {"drop_rate": 0.8, "round_to": 1, "schedule": {"kind": "constant"}})
    x.requires_grad_()
    output = model(x)
    grad = torch.randn_like(output)
    output.backward(grad)
    kept = grad.abs().sum((0, 2, 3)).topk(8).indices
    masked = torch.zeros_like(grad)
    masked[:, kept] = grad[:, kept]
    # in double precision: the dense backward pass in single precision is the one that writes past its end
    leaves = [t.detach().double().requires_grad_() for t in (x, *layer.parameters())]
    expected = torch.autograd.grad(F.conv2d(*leaves, stride), leaves, masked.double())
    for got, wanted in zip((x.grad, model.weight.grad, model.bias.grad), expected, strict=True):
        torch.testing.assert_close(got, wanted.float(), rtol=1e-4, atol=1e-4)
