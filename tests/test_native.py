"""The loops in C against PyTorch's operations, over layouts and geometries; and what must not reach them."""

import itertools
import math
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import ssprop_fx
from ssprop_fx import native
from ssprop_fx.backward import sparse_backward
from ssprop_fx.centered import centered_sums
from ssprop_fx.convolutions import ConvArgs, run
from ssprop_fx.dense import dense_backward
from ssprop_fx.gather import take
from ssprop_fx.selection import importance

pytestmark = pytest.mark.skipif(native.library is None, reason="the loops in C have not been built")

ALL = (True, True, True)


def last(tensor):
    return tensor.movedim(1, -1).contiguous().movedim(-1, 1)


def oracle(grad, x, weight, index, args):
    """The dense backward pass in double precision of the gradient whose other channels are zero."""
    mask = torch.zeros(grad.shape[1], dtype=torch.float64).index_fill(0, index, 1.0)
    masked = grad.double() * mask.view(-1, *[1] * (grad.dim() - 2))
    return dense_backward(masked, x.double(), weight.double(), args, ALL)


def check(loop, grad, x, weight, index, args, masks=(ALL,)):
    """A loop against the oracle: errors of single precision, relative to the sum of the absolute values of what is summed."""
    exact = oracle(grad, x, weight, index, args)
    size = oracle(grad.abs(), x.abs(), weight.abs(), index, args)
    first = loop(grad, x, weight, index, args, masks[0])
    for mask in masks:
        got = loop(grad, x, weight, index, args, mask)
        assert [g is not None for g in got] == list(mask)
        assert all(a is None or b is None or torch.equal(a, b) for a, b in zip(got, first, strict=True))
        for mine, double, most, like in zip(got, exact, size, (x, weight, torch.empty(grad.shape[1])), strict=True):
            if mine is not None:
                assert mine.stride() == like.stride()
                assert ((mine.double() - double).abs() <= 2e-6 * most).all()


def tensors(arrangement, samples, inputs, outputs, kernel, sizes, args):
    """Gradient, input and weight, in one of the layouts."""
    x = torch.randn(samples, inputs, *sizes)
    weight = torch.randn(outputs, inputs // args.groups, *kernel)
    grad = torch.randn_like(run(x, weight, None, args))
    if arrangement in ("last", "last, weight first"):
        return last(grad), last(x), last(weight) if arrangement == "last" else weight
    return grad.contiguous(), x if arrangement == "first" else last(x), weight


def some(outputs, groups, keep):
    """``keep`` channels of every group, ascending."""
    size = outputs // groups
    return torch.cat([torch.randperm(size)[:keep].sort().values + group * size for group in range(groups)])


@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (3, 5, 7), (2, 8), (4, 16, 33, 31), (2, 150, 3, 5, 4), (1, 3, 300, 300), (5, 2048, 2, 2)]
)
@pytest.mark.parametrize("arrange", [torch.Tensor.contiguous, last])
def test_importance_is_the_sum_of_absolute_values(shape, arrange, monkeypatch):
    torch.manual_seed(0)
    grad = arrange(torch.randn(shape))
    exact = grad.double().abs().sum([d for d in range(grad.dim()) if d != 1])
    torch.testing.assert_close(native.abs_sum(grad).double(), exact, rtol=1e-6, atol=0)
    called = []
    monkeypatch.setattr(native, "abs_sum", lambda grad: called.append(1))
    importance(grad, None, "l1")
    assert called


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("arrange", [torch.Tensor.contiguous, last])
def test_what_is_not_finite_reaches_the_importance(value, arrange):
    grad = arrange(torch.ones(2, 20, 9, 9))
    grad[1, 13, 4, 5] = value
    assert (~native.abs_sum(grad).isfinite()).nonzero().flatten().tolist() == [13]


@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (3, 5, 7), (300, 8), (4, 16, 33, 31), (2, 150, 3, 5, 4), (1, 3, 300, 300), (5, 2048, 2, 2)]
)
def test_sums_with_centered_inputs(shape, number):
    torch.manual_seed(0)
    grad, *inputs = (last(torch.randn(shape)) for _ in range(1 + number))
    means = [torch.randn(2 * shape[1])[::2] for _ in inputs]
    dims, channels = [d for d in range(len(shape)) if d != 1], [-1, *[1] * (len(shape) - 2)]
    got = native.centered_sums(grad, inputs, means)
    factors = [torch.ones_like(grad), *(x - m.view(channels) for x, m in zip(inputs, means, strict=True))]
    terms = torch.stack([grad.double() * factor.double() for factor in factors])
    exact, size = (t.sum([1 + d for d in dims]) for t in (terms, terms.abs()))
    assert ((got.double() - exact).abs() <= 1e-6 * size).all()
    torch.testing.assert_close(centered_sums(grad, inputs, means), got, rtol=0, atol=0)
    first = grad.contiguous()  # what the loop does not read
    assert native.centered_sums(first, inputs, means) is None or min(shape[1], first[0, 0].numel()) == 1
    assert ((centered_sums(first, inputs, means).double() - exact).abs() <= 1e-5 * size).all()


def test_sums_with_centered_inputs_do_not_lose_what_is_small():
    grad, x = last(torch.full((24, 16, 112, 112), 0.1)), last(torch.full((24, 16, 112, 112), 1.0))
    got = native.centered_sums(grad, [x], [torch.full((16,), 0.5)])
    whole = grad.double()[:, 0].sum()
    torch.testing.assert_close(got.double(), torch.stack([whole, whole / 2]).unsqueeze(1).expand(2, 16), rtol=2e-6, atol=0)


@pytest.mark.parametrize(("channels", "kept"), [(5, 1), (64, 16), (300, 299)])
def test_columns_are_taken(channels, kept):
    rows, index = torch.randn(37, channels), torch.randperm(channels)[:kept]
    assert torch.equal(native.take_last(rows, index), rows[:, index])


GEOMETRIES = list(itertools.product((1, 2, 3), (1, 2, 3), (0, 1, 4), (1, 2), (1, 3, 4)))


def convolutions(inputs, groups):
    """Geometries; in turn of few samples, fewer than threads perhaps, and of more."""
    number = itertools.count(1)
    for dim, stride, padding, dilation, kernel in GEOMETRIES:
        if 7 + 2 * padding >= dilation * (kernel - 1) + 1:
            args = ConvArgs([stride] * dim, [padding] * dim, [dilation] * dim, False, [0] * dim, groups)
            tried = next(number)
            yield args, [kernel] * dim, (7, 9, 11)[:dim], (1, 4, 3)[tried % 3]
    assert tried > 80


WITHOUT_INPUT = [(False, True, True), (False, True, False), (False, False, True)]


@pytest.mark.parametrize(("channels", "kept"), [(37, 21), (37, 5), (64, 32)])
@pytest.mark.parametrize("arrangement", ["first", "last", "mixed"])
def test_depthwise_gradients(channels, kept, arrangement):
    torch.manual_seed(0)
    for args, kernel, sizes, samples in convolutions(channels, channels):
        given = tensors(arrangement, samples, channels, channels, kernel, sizes, args)
        index = torch.randperm(channels)[:kept].sort().values
        check(native.direct, *given, index, args, [ALL, (False, True, False)])


@pytest.mark.parametrize(
    ("inputs", "outputs", "groups", "keep"),
    [(8, 16, 4, 2), (4, 8, 4, 1), (3, 20, 1, 7), (20, 3, 1, 2), (16, 16, 1, 16), (32, 16, 16, 1)],
)
@pytest.mark.parametrize("arrangement", ["first", "last", "mixed"])
def test_gradients_pair_by_pair(inputs, outputs, groups, keep, arrangement):
    torch.manual_seed(0)
    for args, kernel, sizes, samples in convolutions(inputs, groups):
        given = tensors(arrangement, samples, inputs, outputs, kernel, sizes, args)
        check(native.direct, *given, some(outputs, groups, keep), args, [ALL, (False, True, False)])


@pytest.mark.parametrize("arrangement", ["first", "last"])
def test_depthwise_gradients_of_one_plane(arrangement):
    """Which planes of the outputs see, or none does."""
    torch.manual_seed(0)
    for kernel, padding, dilation in [(1, 1, 1), (3, 1, 1), (3, 2, 1), (2, 1, 2), (2, 3, 5)]:
        args = ConvArgs([1] * 3, [padding, 1, 1], [dilation, 1, 1], False, [0] * 3, 24)
        given = tensors(arrangement, 3, 24, 24, (kernel, 3, 3), (1, 6, 5), args)
        check(native.direct, *given, torch.arange(0, 24, 3), args)


@pytest.mark.parametrize(("inputs", "outputs", "groups", "keep"), [(24, 24, 24, 8), (200, 200, 200, 111), (8, 256, 4, 40)])
@pytest.mark.parametrize("arrangement", ["first", "last"])
def test_gradients_of_much_data_go_in_strips(inputs, outputs, groups, keep, arrangement):
    """One row of outputs does not fit into the cache, nor do all rows or channels of the others, of unequal sides and steps.

    Rows of the input are seen by two strips, or by none.
    """
    torch.manual_seed(0)
    for size, kernel, stride, padding in [
        ((3, 5000), (3, 3), (1, 1), (1, 1)),
        ((90, 40), (5, 3), (2, 1), (1, 2)),
        ((60, 70), (1, 1), (3, 2), (0, 0)),
    ]:
        args = ConvArgs(stride, padding, (1, 1), False, (0, 0), groups)
        given = tensors(arrangement, 3, inputs, outputs, kernel, size, args)
        index = torch.randperm(outputs)[:keep].sort().values if groups == outputs else some(outputs, groups, keep)
        check(native.direct, *given, index, args)


@pytest.mark.parametrize(("inputs", "outputs", "kept"), [(3, 20, 17), (1, 40, 16), (4, 5, 2)])
@pytest.mark.parametrize("arrangement", ["first", "last", "mixed"])
def test_gradients_of_a_first_layer(inputs, outputs, kept, arrangement):
    torch.manual_seed(0)
    for args, kernel, sizes, samples in convolutions(inputs, 1):
        given = tensors(arrangement, samples, inputs, outputs, kernel, sizes, args)
        check(native.stem, *given, some(outputs, 1, kept), args, WITHOUT_INPUT)


SOME = [ALL, (True, False, False), (False, True, False)]


@pytest.mark.parametrize(
    ("inputs", "outputs", "groups", "keep"),
    [
        (1, 4, 1, 1),
        (3, 8, 1, 3),
        (16, 40, 1, 16),
        (37, 40, 1, 5),
        (64, 30, 1, 29),
        (1100, 20, 1, 8),
        (36, 10, 2, 3),
        (64, 70, 1, 64),
    ],
)
@pytest.mark.parametrize("sizes", [(1,), (5,), (9, 7), (31, 33), (2, 3, 4)])
@pytest.mark.parametrize("arrangement", ["first", "last"])
def test_pointwise_gradients(inputs, outputs, groups, keep, sizes, arrangement):
    torch.manual_seed(0)
    dim = len(sizes)
    for stride, samples in itertools.product(
        {(1,) * dim, (2,) * dim, (1, 2, 3)[:dim], (3, 1, 2)[:dim]}, (1, 3, 40 if dim < 2 else 5)
    ):
        args = ConvArgs(stride, [0] * dim, [1] * dim, False, [0] * dim, groups)
        given = tensors(arrangement, samples, inputs, outputs, [1] * dim, sizes, args)
        check(native.products, *given, some(outputs, groups, keep), args, SOME)


@pytest.mark.parametrize(("inputs", "outputs", "groups", "keep"), [(20, 3, 1, 1), (33, 7, 1, 3), (3, 5, 1, 2), (36, 6, 2, 1)])
@pytest.mark.parametrize("arrangement", ["first", "last", "last, weight first"])
def test_gradients_of_few_kept_channels(inputs, outputs, groups, keep, arrangement):
    torch.manual_seed(0)
    for args, kernel, sizes, samples in convolutions(inputs, groups):
        if kernel[0] > 1:
            given = tensors(arrangement, samples, inputs, outputs, kernel, sizes, args)
            check(native.products, *given, some(outputs, groups, keep), args, SOME)


@pytest.mark.parametrize(
    ("sizes", "kernel", "stride", "padding", "dilation"),
    [
        ((9,), (2,), (5,), (0,), (1,)),
        ((23,), (5,), (3,), (4,), (2,)),
        ((10, 9), (2, 3), (3, 2), (0, 1), (1, 1)),
        ((7, 8), (1, 3), (2, 1), (0, 1), (1, 2)),
        ((4, 7), (2, 2), (5, 3), (1, 0), (1, 1)),
        ((9, 11), (3, 2), (2, 1), (3, 0), (1, 2)),
        ((6, 5, 9), (1, 3, 2), (3, 2, 1), (0, 2, 1), (1, 1, 2)),
        ((5, 9, 7), (3, 2, 1), (1, 3, 2), (1, 0, 0), (2, 1, 1)),
    ],
)
@pytest.mark.parametrize(("inputs", "groups", "keep"), [(20, 1, 5), (36, 2, 3)])
@pytest.mark.parametrize("arrangement", ["first", "last", "last, weight first"])
def test_gradients_of_strided_layers(sizes, kernel, stride, padding, dilation, inputs, groups, keep, arrangement):
    """No dimension like another; parts that no output reads; what no output reads is not a number."""
    torch.manual_seed(0)
    args = ConvArgs(stride, padding, dilation, False, [0] * len(sizes), groups)
    for samples in (1, 3):
        grad, x, weight = tensors(arrangement, samples, inputs, 12, kernel, sizes, args)
        check(native.products, grad, x, weight, some(12, groups, keep), args, SOME)
        if any(s > 1 and d > 1 for s, d in zip(stride, dilation, strict=True)):
            continue  # which the loop is not asked for: positions within a part may be unread
        read = dense_backward(torch.ones_like(grad), x, torch.ones_like(weight), args, (True, False, False))[0] > 0
        unread, index = x.clone(), some(12, groups, keep)
        unread[~read] = float("nan")
        assert unread.stride() == x.stride()
        got = native.products(grad, unread, weight, index, args, ALL)
        expected = native.products(grad, x, weight, index, args, ALL)
        assert all(map(torch.equal, got, expected))


def cut(tensor):
    """The same numbers as some channels of a tensor with more."""
    around = tensor.new_full((tensor.shape[0], 2, *tensor.shape[2:]), float("nan"))
    whole = torch.cat([around, tensor, around], 1)
    whole = last(whole) if native.channels_innermost(tensor) else whole.contiguous()
    return whole[:, 2:-2]


GRADIENTS = {
    "first": torch.Tensor.contiguous,
    "last": last,
    "first, cut": lambda grad: cut(grad.contiguous()),
    "last, cut": lambda grad: cut(last(grad)),
    # numbers of few bits, whose sums are exact: equal ones round to the same side, see test_long_sums_keep_what_is_small_beside_them
    "of a sum": lambda grad: grad.new_tensor(0.75).expand_as(grad),
    "of a mean": lambda grad: (
        (8 * grad.flatten(2).sum(2)).round().div(8).view(*grad.shape[:2], *[1] * (grad.dim() - 2)).expand_as(grad)
    ),
    "of a transposed one": lambda grad: grad.transpose(0, 1).contiguous().transpose(0, 1),
}


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("arrangement", ["first", "last"])
@pytest.mark.parametrize(
    ("loop", "inputs", "outputs", "groups", "keep", "kernel", "stride", "masks"),
    [
        ("products", 20, 36, 1, 7, 1, 1, SOME),
        ("products", 20, 36, 1, 7, 1, 2, SOME),
        ("products", 36, 40, 2, 3, 1, 1, SOME),
        ("products", 20, 40, 1, 19, 3, 1, SOME),
        ("products", 20, 40, 1, 19, 3, 2, SOME),
        ("products", 20, 12, 2, 2, 3, 2, SOME),
        ("products", 36, 12, 2, 1, 3, 1, SOME),
        ("direct", 24, 24, 24, 1, 3, 1, SOME),
        ("direct", 24, 12, 6, 1, 3, 2, SOME),
        ("stem", 3, 40, 1, 9, 3, 2, [(False, True, True), (False, True, False)]),
    ],
)
def test_a_gradient_may_lie_in_any_way(loop, inputs, outputs, groups, keep, kernel, stride, masks, arrangement, gradient):
    torch.manual_seed(0)
    for sizes, samples in itertools.product([(7,), (9, 12), (33, 31), (3, 4, 5)], (1, 3)):
        dim = len(sizes)
        args = ConvArgs([stride] * dim, [kernel // 2] * dim, [1] * dim, False, [0] * dim, groups)
        grad, x, weight = tensors(arrangement, samples, inputs, outputs, [kernel] * dim, sizes, args)
        grad = GRADIENTS[gradient](grad)
        check(getattr(native, loop), grad, x, weight, some(outputs, groups, keep), args, masks)


@pytest.mark.parametrize("sizes", [(3, 2, 5, 4), (2, 2, 2, 2), (4, 3, 1, 4), (1, 2, 3, 4), (2, 3, 1, 1), (4, 1, 4, 4)])
def test_steps_lead_to_every_element_or_there_are_none(sizes):
    """In every order of dimensions, whole and cut: samples may lie among the positions, too."""
    for order in itertools.permutations(range(4)):
        whole = torch.arange(math.prod(sizes)).view([sizes[d] for d in order]).permute([order.index(d) for d in range(4)])
        for tensor in (whole, whole[:, ::2], whole[..., :-1], whole[..., ::2, :]):
            flat, found = tensor.flatten(2) if tensor.numel() else None, native.steps(tensor.shape, tensor.stride())
            if flat is None:
                continue
            n, k, p = (torch.arange(size) for size in flat.shape)
            if found is None:
                steps = flat.diff(dim=2)
                assert steps.unique().numel() > 1
            else:
                sample, position, channel = found
                assert torch.equal(flat - flat[0, 0, 0], sample * n[:, None, None] + channel * k[:, None] + position * p)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_the_importance_of_a_gradient_that_lies_in_any_way(gradient):
    for shape in [(3, 5, 7), (2, 70, 33, 31), (1, 8, 4, 4), (4, 3, 1, 1), (3, 1, 6, 6)]:
        grad = GRADIENTS[gradient](torch.randn(*shape))
        exact = grad.double().abs().flatten(2).sum((0, 2))
        torch.testing.assert_close(importance(grad, None, "l1").double(), exact, rtol=1e-6, atol=0)
        if "cut" in gradient:  # quickly
            assert native.abs_sum(grad) is not None or shape[0] > shape[1] == 1


MODULES = {
    "depthwise": nn.Conv2d(32, 32, 3, padding=1, groups=32),
    "pointwise": nn.Conv2d(8, 40, 1),
    "pointwise, strided": nn.Conv2d(8, 40, 1, 2),
    "3x3": nn.Conv2d(8, 40, 3),
    "few kept": nn.Conv2d(64, 9, 3, padding=1),
    "few kept, strided": nn.Conv2d(64, 9, 3, 2),
    "grouped": nn.Conv2d(32, 48, 3, padding=1, groups=4),
}


@pytest.mark.parametrize("arrange", [torch.Tensor.contiguous, last])
def test_which_loop_runs(arrange, monkeypatch):
    """By form: depthwise, 1×1, first layers, few kept channels; others are the library's."""
    called = []
    for name in ("direct", "stem", "products"):
        loop = getattr(native, name)
        monkeypatch.setattr(native, name, lambda *given, name=name, loop=loop: (called.append(name), loop(*given))[1])

    def loops(module, *size, keep, first=False):
        called.clear()
        x = arrange(torch.randn(2, module.in_channels, *size))
        args = ConvArgs(module.stride, module.padding, module.dilation, False, (0,) * len(size), module.groups)
        weight = arrange(module.weight.detach())
        grad = arrange(torch.randn_like(run(x, weight, None, args)))
        with torch.no_grad():
            sparse_backward(grad, x, weight, None, args, (not first, True, True), keep, "l1")
        return called

    assert loops(nn.Conv2d(16, 16, 3, groups=16), 9, 9, keep=4) == ["direct"]
    assert loops(nn.Conv2d(16, 32, 3, groups=16), 9, 9, keep=1) == ["direct"]
    assert loops(nn.Conv2d(16, 16, 1), 9, 9, keep=4) == ["products"]
    assert loops(nn.Conv2d(16, 16, 1, stride=2), 9, 9, keep=4) == ["products"]
    assert loops(nn.Conv2d(3, 16, 7, stride=2), 19, 19, keep=8, first=True) == ["stem"]
    assert loops(nn.Conv2d(64, 3, 3), 9, 9, keep=1) == ["products"]
    assert loops(nn.Conv3d(16, 32, 3), 5, 5, 5, keep=8) == ["products"]
    assert loops(nn.Conv2d(64, 3, 3, padding=2), 1, 1, keep=1) == ["products"]
    for module, keep in [(nn.Conv2d(64, 64, 3), 16), (nn.Conv2d(64, 64, 3), 56), (nn.Conv2d(32, 64, 5), 8)]:
        assert loops(module, 9, 9, keep=keep) == ["products"] * (arrange is last)
    for module, keep, sizes in [
        (nn.Conv2d(64, 64, 3, stride=2), 16, (9, 9)),
        (nn.Conv1d(8, 16, 3, stride=32), 4, (99,)),
        (nn.Conv3d(64, 64, 3, stride=2), 16, (5, 5, 5)),
        (nn.Conv2d(40, 64, 3, stride=2, groups=2), 2, (9, 9)),
    ]:
        assert loops(module, *sizes, keep=keep // module.groups) == ["products"]
    assert loops(nn.Conv2d(7, 16, 3, stride=2), 9, 9, keep=8) == ["products"] * (arrange is not last)
    for module, keep in [
        (nn.Conv2d(64, 64, 3, stride=2), 32),
        (nn.Conv2d(64, 64, 4, stride=4), 16),
        (nn.Conv2d(512, 64, 3, stride=2), 48),
    ]:
        assert loops(module, 9, 9, keep=keep) == ["products"] * (arrange is last)
    assert loops(nn.Conv2d(512, 64, 3), 16, 16, keep=48) == ["products"] * (arrange is last)
    for module, keep in [
        (nn.Conv2d(512, 64, 3), 48),  # too few positions
        (nn.Conv2d(24, 64, 3), 16),
        (nn.Conv2d(64, 3, 3, stride=2, dilation=2), 1),
        (nn.Conv2d(512, 512, 3, stride=2), 208),
        (nn.Conv2d(16, 16, 9, stride=9), 4),
        (nn.Conv2d(8, 64, 3, stride=2), 40),
        (nn.Conv2d(16, 16, 1, padding=1), 4),
        (nn.Conv2d(1024, 1024, 1), 200),
    ]:
        assert loops(module, 9, 9, keep=keep) == []


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("name", MODULES)
def test_repeated_passes_agree_to_the_bit(name, threads):
    torch.manual_seed(0)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        module = MODULES[name].to(memory_format=torch.channels_last)
        model = ssprop_fx.transform(module, {"drop_rate": 0.7, "schedule": {"kind": "constant"}})
        x = torch.randn(5, module.in_channels, 40, 41).contiguous(memory_format=torch.channels_last).requires_grad_()
        parts = [x, *model.parameters()]
        first, *others = [torch.autograd.grad(model(x).pow(2).sum(), parts) for _ in range(4)]
    finally:
        torch.set_num_threads(before)
    for other in others:
        assert all(map(torch.equal, first, other))


@pytest.mark.parametrize("name", MODULES)
def test_without_the_loops_the_gradients_are_the_same(name, monkeypatch):
    torch.manual_seed(0)
    module = MODULES[name].to(memory_format=torch.channels_last)
    args = ConvArgs(module.stride, module.padding, module.dilation, False, (0, 0), module.groups)
    x = last(torch.randn(4, module.in_channels, 12, 13))
    weight = module.weight.detach()
    grad = last(torch.randn_like(run(x, weight, None, args)))
    given = grad, x, weight, None, args, ALL, 5, "l1"
    with torch.no_grad():
        got = sparse_backward(*given)
        monkeypatch.setattr(native, "library", None)
        expected = sparse_backward(*given)
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


class Subclass(torch.Tensor):
    pass


def test_only_plain_data_that_nobody_watches_is_served():
    tensor = torch.ones(2, 3, 4, 4)
    assert native.serves(tensor)
    assert native.serves(nn.Parameter(tensor)) is False  # a graph is being recorded
    negated = torch.complex(tensor, tensor).conj().imag
    assert negated.is_neg()
    nowhere = torch._efficientzerotensor(tensor.shape)  # what autograd has of a derivative that is zero
    assert type(nowhere) is torch.Tensor
    for other in (
        nowhere,
        tensor.double(),
        tensor.to("meta"),
        tensor.bfloat16(),
        tensor[:0],
        tensor.as_subclass(Subclass),
        negated,
    ):
        assert not native.serves(tensor, other)
    seen = []
    torch.func.vmap(lambda t: (seen.append(native.serves(t)), t)[1])(tensor)
    with FlopCounterMode(display=False):
        seen.append(native.serves(tensor))
    with torch.autograd.forward_ad.dual_level():
        seen.append(native.serves(torch.autograd.forward_ad.make_dual(tensor, tensor)))
    assert seen == [False] * 3


@pytest.mark.parametrize("module", [nn.Conv2d(8, 40, 1), nn.Conv2d(32, 32, 3, groups=32), nn.Conv2d(64, 3, 3)])
def test_a_gradient_that_is_zero_by_its_kind(module):
    model = ssprop_fx.transform(module, {"drop_rate": 0.5, "schedule": {"kind": "constant"}})
    model(torch.randn(2, module.in_channels, 9, 9)).sgn().sum().backward()
    assert not model.weight.grad.any()


@pytest.mark.parametrize("arrange", [torch.Tensor.contiguous, last])
@pytest.mark.parametrize(
    ("module", "keep", "sizes", "unread"),
    [
        (nn.Conv2d(32, 12, 3, stride=2, groups=2), 3, (8, 8), 7),
        (nn.Conv2d(64, 12, 2, dilation=3), 3, (5, 5), 2),
        (nn.Conv2d(16, 12, 1, stride=2), 3, (8, 8), 7),
        (nn.Conv2d(64, 12, 3, stride=2), 3, (8, 8), 7),
        (nn.Conv2d(16, 12, 2, stride=(3, 2)), 3, (8, 8), 5),
        (nn.Conv2d(16, 12, 2, stride=(4, 1), padding=(1, 0)), 3, (8, 8), 6),
        (nn.Conv2d(3, 12, 3, stride=2), 8, (8, 8), 7),
    ],
)
def test_what_no_output_reads_may_be_anything(module, keep, sizes, unread, arrange):
    x = torch.randn(2, module.in_channels, *sizes)
    x[:, :, unread] = float("nan")
    x, weight = arrange(x), arrange(module.weight.detach())
    args = ConvArgs(module.stride, module.padding, module.dilation, False, (0, 0), module.groups)
    grad = arrange(torch.randn_like(run(x, weight, None, args)))
    with torch.no_grad():
        grads = sparse_backward(grad, x, weight, None, args, (module.in_channels > 3, True, True), keep, "l1")
    assert all(g is None or g.isfinite().all() for g in grads)
    assert grads[0] is None or not grads[0][:, :, unread].any()


@pytest.mark.parametrize("kernel", [(1, 1), (3, 3)])
def test_long_sums_keep_what_is_small_beside_them(kernel):
    """Gradients of a mean are all alike: the worst case of a sum one by one."""
    channels, groups = 16, 1 if kernel == (1, 1) else 16
    x, grad = last(torch.ones(24, channels, 112, 112)), last(torch.full((24, channels, 112, 112), 0.1))
    args = ConvArgs([1, 1], [k // 2 for k in kernel], [1, 1], False, [0, 0], groups)
    index, weight = torch.arange(4), torch.ones(channels, channels // groups, *kernel)
    loop = native.products if groups == 1 else native.direct
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        _, weight_grad, bias_grad = loop(grad, x, weight, index, args, (False, True, True))
    finally:
        torch.set_num_threads(threads)
    whole = grad.double()[:, 0].sum()
    torch.testing.assert_close(bias_grad[:4].double(), whole.expand(4), rtol=3e-5, atol=0)
    middle = weight_grad[:4, :, kernel[0] // 2, kernel[1] // 2].double()
    torch.testing.assert_close(middle, whole.expand_as(middle), rtol=3e-5, atol=0)


def test_data_that_is_not_dense_goes_another_way():
    part = torch.randn(2, 6, 8, 8)[..., 1:5]
    assert native.abs_sum(part) is None
    torch.testing.assert_close(importance(part, None, "l1"), part.abs().sum((0, 2, 3)))
    assert torch.equal(take(part, 1, torch.tensor([2])), part[:, [2]])


def test_a_library_of_another_version_is_left_alone(monkeypatch, caplog):
    monkeypatch.setattr(native, "VERSION", 0)
    assert native._load() is None
    assert "another version" in caplog.text


def test_the_package_works_where_they_have_not_been_built():
    code = """
import importlib.machinery
importlib.machinery.EXTENSION_SUFFIXES[:] = [".none"]
import torch, ssprop_fx
from ssprop_fx import native
assert native.library is None
model = ssprop_fx.transform(torch.nn.Conv2d(3, 8, 3, groups=1), {"drop_rate": 0.5, "schedule": {"kind": "constant"}})
model(torch.randn(2, 3, 8, 8)).square().sum().backward()
print((model.weight.grad.flatten(1).abs().sum(1) > 0).sum().item())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.strip()) == (0, "4"), done.stderr
