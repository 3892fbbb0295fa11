"""Taking channels and putting them back: layouts, the operators that stand for it in graphs, autograd."""

import itertools

import pytest
import torch
from torch import nn

import ssprop_fx
from ssprop_fx import operators
from ssprop_fx.backward import dense_backward, sparse_backward
from ssprop_fx.convolutions import ConvArgs, run, spec_of_module
from ssprop_fx.gather import after, between_zeros, channels_last, spread, take

INDEX = torch.tensor([1, 4, 6])
LAYOUTS = {
    "contiguous": lambda t: t,
    "channels last": lambda t: t.movedim(1, -1).contiguous().movedim(-1, 1),
    "sliced": lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]],
}


@pytest.fixture(params=[(8, 8), (8, 8, 5), (8, 8, 5, 4), (8, 8, 2, 3, 4)], ids=str)
def tensor(request):
    torch.manual_seed(0)
    return torch.randn(request.param)


@pytest.mark.parametrize("compiling", [False, True])
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_take_is_index_select_and_keeps_channels_last(tensor, layout, dim, compiling):
    tensor = LAYOUTS[layout](tensor)
    got = take(tensor, dim, INDEX, compiling)
    assert torch.equal(got, tensor.index_select(dim, INDEX))
    if tensor.dim() > 2:
        assert channels_last(got) == channels_last(tensor)


@pytest.mark.parametrize("compiling", [False, True])
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("layout", list(LAYOUTS)[:2])
def test_spread_undoes_take(tensor, layout, dim, compiling):
    tensor = LAYOUTS[layout](tensor)
    got = spread(take(tensor, dim, INDEX), dim, INDEX, tensor, compiling)
    expected = torch.zeros_like(tensor).index_copy(dim, INDEX, tensor.index_select(dim, INDEX))
    assert torch.equal(got, expected)
    assert got.stride() == tensor.stride()


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_operators_pass_opcheck(tensor, layout, dim):
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_static", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.ssprop.take, (LAYOUTS[layout](tensor), dim, INDEX), test_utils=tests)
    torch.library.opcheck(torch.ops.ssprop.places, (INDEX, 8), test_utils=tests)
    order = sorted(range(tensor.dim()), key=lambda d: -LAYOUTS[layout](tensor).stride(d))
    torch.library.opcheck(torch.ops.ssprop.put, (LAYOUTS[layout](tensor)[: len(INDEX)], INDEX, 8, order), test_utils=tests)


def test_places_tells_where_each_channel_stands():
    assert torch.ops.ssprop.places(INDEX, 8).tolist() == [-1, 0, -1, -1, 1, -1, 2, -1]


@pytest.mark.parametrize("compiling", [False, True])
@pytest.mark.parametrize(
    ("sizes", "stride"), [((5,), (2,)), ((8, 6), (2, 1)), ((7, 9), (3, 2)), ((4, 3, 5), (2, 2, 2))], ids=str
)
def test_between_zeros_undoes_strided_slices(sizes, stride, compiling):
    whole = torch.randn(2, *sizes, 3)
    places = (slice(None), *(slice(None, None, s) for s in stride))
    expected = torch.zeros_like(whole)
    expected[places] = whole[places]
    got = between_zeros(whole[places], stride, sizes, compiling)
    assert torch.equal(got, expected)
    assert got.is_contiguous()
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_static", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.ssprop.between_zeros, (whole[places], list(stride), list(sizes)), test_utils=tests)


def test_what_is_read_afterwards_is_the_same():
    values = torch.tensor([1.5, -0.0, float("inf"), float("nan"), 1e-45], dtype=torch.float32)
    assert torch.equal(after(values)[[0, 1, 2, 4]], values[[0, 1, 2, 4]])
    assert after(values)[3].isnan()
    torch.library.opcheck(torch.ops.ssprop.one_after, (values,), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (1, 2), (3, 1), (3, 2)])
@pytest.mark.parametrize("groups", [1, 4, 16])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_an_input_gradient_lies_in_memory_as_the_dense_one(dims, groups, kernel, stride, transposed, dtype):
    """What comes after may depend on it: PyTorch's instance_norm has a wrong backward for some layouts."""
    args = ConvArgs((stride,) * dims, (0,) * dims, (1,) * dims, transposed, (0,) * dims, groups)
    for batch, *last in itertools.product((1, 3), (False, True), (False, dims > 1), (False, True)):
        sizes = (batch, 16, *[6] * dims), (16, 16 // groups, *[kernel] * dims)
        x, w = (channels_last_if(*size, last=is_last, dtype=dtype) for size, is_last in zip(sizes, last, strict=False))
        y = torch.convolution(x, w, None, *args)
        grad = channels_last_if(*y.shape, last=last[2], dtype=dtype)
        dense = dense_backward(grad, x, w, args, (True, False, False))[0]
        sparse = sparse_backward(grad, x, w, None, args, (True, True, False), 2, "l1")[0]
        assert dense.stride() == sparse.stride() or (dense.is_contiguous() and sparse.is_contiguous())


def channels_last_if(*sizes, last, dtype):
    tensor = torch.randn(sizes, dtype=dtype)
    return tensor.movedim(1, -1).contiguous().movedim(-1, 1) if last else tensor


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("front_end", ["transform", "backend", "both"])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_a_pointwise_convolution_after_an_instance_norm(front_end, batch, dims):
    torch.manual_seed(0)
    convolution, norm = getattr(nn, f"Conv{dims}d"), getattr(nn, f"InstanceNorm{dims}d")
    model = nn.Sequential(convolution(4, 12, 1), norm(12), convolution(12, 8, 1)).double()
    policy = ssprop_fx.Policy(drop_rate=0.5, round_to=1, schedule={"kind": "constant"})
    ours = model if front_end == "backend" else ssprop_fx.transform(model, policy)
    if front_end != "transform":
        torch._dynamo.reset()
        options = {"inner": "aot_eager"} | ({"policy": policy} if front_end == "backend" else {})
        ours = torch.compile(ours, backend="ssprop", options=options)
    x = torch.randn(batch, 4, *[7] * dims, dtype=torch.float64)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    ours(a).sin().sum().backward()
    kept = [layer.weight.grad.flatten(1).abs().sum(1) > 0 for layer in (model[0], model[2])]
    got = [a.grad, *(p.grad for p in model.parameters())]
    model.zero_grad()
    for layer, channels in zip((model[0], model[2]), kept, strict=True):
        mask = channels.view(1, -1, *[1] * dims)
        layer.register_forward_hook(lambda m, i, o, mask=mask: o.register_hook(lambda g: g * mask) and None)
    model(b).sin().sum().backward()
    for mine, wanted in zip(got, [b.grad, *(p.grad for p in model.parameters())], strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-9, atol=1e-12)


CASES = {
    "3x3": (nn.Conv2d(8, 40, 3, padding=1), (3, 8, 9, 10)),
    "1x1": (nn.Conv2d(8, 40, 1), (3, 8, 9, 10)),
    "1x1, strided": (nn.Conv2d(20, 40, 1, 2), (3, 20, 9, 10)),
    "grouped": (nn.Conv2d(8, 40, 3, groups=4), (3, 8, 9, 10)),
    "depthwise": (nn.Conv2d(8, 8, 3, 2, groups=8), (3, 8, 9, 10)),
    "transposed": (nn.ConvTranspose2d(8, 40, 3, 2), (3, 8, 9, 10)),
    "3-d": (nn.Conv3d(8, 40, 3), (2, 8, 5, 6, 7)),
}


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_what_accelerators_compile_equals_eager_mode(name, last, monkeypatch):
    """No operator of ours, as on an accelerator: everything is there for a compiler to see."""
    module, shape = CASES[name]
    torch.manual_seed(0)
    spec = spec_of_module(module)
    args = ConvArgs(module.stride, module.padding, module.dilation, spec.transposed, module.output_padding, module.groups)
    x, weight = torch.randn(shape, dtype=torch.float64), module.weight.detach().double()
    grad = torch.randn_like(run(x, weight, None, args))
    if last:
        x, grad = (t.movedim(1, -1).contiguous().movedim(-1, 1) for t in (x, grad))
    keep = 3
    eager = sparse_backward(grad, x, weight, None, args, (True, True, True), keep, "l1")
    monkeypatch.setattr(operators, "wanted", lambda tensor, compiling: False)
    compiled = sparse_backward(grad, x, weight, None, args, (True, True, True), keep, "l1", compiling=True)
    for mine, expected in zip(compiled, eager, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-12, atol=1e-12)
