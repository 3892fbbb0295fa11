"""The passes that keep a backward graph in channels-last memory: the same values, where the data lies."""

import copy

import pytest
import torch
import torch._inductor.lowering  # some decompositions ask it, and do not import it
import torch.nn.functional as F
from ssprop_fx.passes import BatchNormSums, ChannelsLastScatter, ChannelsLastSums
from torch.fx.experimental.proxy_tensor import make_fx

import ssprop_fx
from ssprop_fx import centered, native
from ssprop_fx._compat import inductor_decompositions, memory_order_operator

aten = torch.ops.aten


def channels_last(*shape, dtype=torch.float32):
    torch.manual_seed(len(shape))
    return torch.randn(shape[0], *shape[2:], shape[1], dtype=dtype).movedim(-1, 1)


def traced(function, *inputs):
    return make_fx(function, dict(inductor_decompositions()), tracing_mode="fake")(*inputs)


def calls(graph_module, target):
    return graph_module.graph.find_nodes(op="call_function", target=target)


def pool_gradient(kernel, stride, padding, then=torch.relu):
    """A function of (input, gradient) whose graph ends in what Inductor makes of a max-pool's backward."""

    def gradient(x, grad):
        _, indices = aten.max_pool2d_with_indices(x, kernel, stride, padding)
        return then(aten.max_pool2d_with_indices_backward(grad, x, kernel, stride, padding, [1, 1], False, indices) * x)

    return gradient


@pytest.mark.parametrize(
    ("kernel", "stride", "padding"), [([3, 3], [2, 2], [1, 1]), ([2, 2], [2, 2], [0, 0]), ([3, 2], [1, 2], [1, 0])]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_max_pool_scatters_where_the_data_lies(kernel, stride, padding, dtype):
    x = channels_last(2, 6, 9, 10, dtype=dtype)
    grad = channels_last(*F.max_pool2d(x, kernel, stride, padding).shape, dtype=dtype)
    graph = traced(pool_gradient(kernel, stride, padding), x, grad)
    expected = graph(x, grad)
    if calls(graph, aten.max_pool2d_with_indices_backward.default):
        pytest.skip("this release of Inductor keeps a max-pool's backward whole")
    (before,) = calls(graph, aten.scatter_add.default)
    assert before.meta["val"].shape == (12, 90)  # planes
    before.meta["stack_trace"] = "the user's line"
    assert ChannelsLastScatter()(graph).modified
    (after,) = calls(graph, aten.scatter_add.default)
    assert after.meta["val"].shape == (2, 90, 6)
    got = graph(x, grad)
    assert torch.equal(got, expected)
    assert got.stride() == expected.stride()
    assert after.meta["stack_trace"] == "the user's line"
    assert not ChannelsLastScatter()(graph).modified


def test_planes_that_are_read_as_planes_stay():
    x, grad = channels_last(2, 6, 8, 8), channels_last(2, 6, 4, 4)
    contiguous = traced(pool_gradient([2, 2], [2, 2], [0, 0]), x.contiguous(), grad.contiguous())
    viewed = traced(pool_gradient([2, 2], [2, 2], [0, 0], lambda g: g.contiguous().view(2, -1)), x, grad)

    def scatter(places, values):
        return torch.zeros(12, 64).scatter_add(1, places, values)

    other = traced(scatter, torch.zeros(12, 16, dtype=torch.int64), torch.ones(12, 16))
    for graph, inputs in (
        (contiguous, (x.contiguous(), grad.contiguous())),
        (other, (torch.zeros(12, 16).long(), torch.ones(12, 16))),
    ):
        code, expected = graph.code, graph(*inputs)
        assert not ChannelsLastScatter()(graph).modified
        assert graph.code == code
        assert torch.equal(graph(*inputs), expected)
    expected = viewed(x, grad)
    ChannelsLastScatter()(viewed)
    assert torch.equal(viewed(x, grad), expected)


COLUMNS = {
    "channels last": (lambda: channels_last(4, 24, 32, 32), [0, 2, 3]),
    "negative dimensions": (lambda: channels_last(4, 24, 32, 32), [-1, 0, -2]),
    "3d": (lambda: channels_last(2, 16, 8, 16, 16), [0, 2, 3, 4]),
    "1d": (lambda: channels_last(2, 16, 4096), [0, 2]),
    "rows of a linear layer": (lambda: torch.randn(4, 1024, 32), [0, 1]),
    "a matrix": (lambda: torch.randn(4096, 32), [0]),
    "odd positions": (lambda: channels_last(8, 64, 13, 13), [0, 2, 3]),
}


@pytest.mark.parametrize("keepdim", [False, True])
@pytest.mark.parametrize("dtype", [None, torch.float64])
@pytest.mark.parametrize("name", COLUMNS)
def test_sums_of_columns_go_in_two_stages(name, dtype, keepdim):
    make, dims = COLUMNS[name]
    x = make()
    graph = traced(lambda x: aten.sum.dim_IntList(x, dims, keepdim, dtype=dtype), x)
    expected = graph(x)
    assert ChannelsLastSums()(graph).modified
    first, second = calls(graph, aten.sum.dim_IntList)
    rows = first.args[0].meta["val"].shape[1]
    assert rows in (8, 16, 32, 64)
    assert second.args[0] is first
    got = graph(x)
    assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
    exact = x.double().sum(dims, keepdim).to(got.dtype)
    torch.testing.assert_close(got, exact, rtol=1e-4, atol=1e-3 if dtype is None else 1e-9)
    assert not ChannelsLastSums()(graph).modified


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_in_half_precision_are_rounded_once(dtype):
    # 16 of these sum to 16 and a little, which half precision would round away every time
    little = 7 * 2.0**-7 if dtype == torch.bfloat16 else 7 * 2.0**-10
    x = torch.ones(8, 16, 30, 32, dtype=dtype).to(memory_format=torch.channels_last)
    x[..., ::16] += little
    graph = traced(lambda x: x.sum([0, 2, 3]), x)
    assert ChannelsLastSums()(graph).modified
    got = graph(x)
    assert torch.equal(got, x.double().sum([0, 2, 3]).to(dtype))
    assert not torch.equal(got, torch.full_like(got, 8 * 30 * 32))


@pytest.mark.parametrize(
    ("x", "dims"),
    [
        (lambda: torch.randn(4, 24, 32, 32), [0, 2, 3]),  # contiguous: channels are not innermost
        (lambda: channels_last(4, 24, 32, 32), [2, 3]),  # per image
        (lambda: channels_last(4, 24, 32, 32), [1]),
        (lambda: channels_last(4, 24, 32, 32), [0, 1, 2, 3]),
        (lambda: channels_last(2, 8, 8, 8), [0, 2, 3]),  # small
        (lambda: channels_last(1, 512, 37, 37), [0, 2, 3]),  # 37 · 37 rows cannot be divided
        (lambda: channels_last(4, 24, 64, 32)[:, :, ::2], [0, 2, 3]),  # with gaps
        (lambda: torch.randn(2**18), [0]),
    ],
)
def test_other_sums_stay(x, dims):
    x = x()
    graph = traced(lambda x: x.sum(dims), x)
    code = graph.code
    assert not ChannelsLastSums()(graph).modified
    assert graph.code == code


built = pytest.mark.skipif(native.library is None, reason="the loops in C have not been built")


def norm_gradients(grad, *norms, output_mask=(True, True, True), training=True):
    """What Inductor makes of the backward passes of batch norms, given (input, weight, mean, 1 / deviation) of each."""
    results = []
    for x, weight, mean, inverse in norms:
        statistics = mean + 1, inverse + 1  # of an evaluation: not those of the batch
        results += aten.native_batch_norm_backward(
            grad, x, weight, *statistics, mean, inverse, training, 1e-5, list(output_mask)
        )
    return tuple(result for result in results if result is not None)


def norm(x):
    return x, torch.rand(x.shape[1]) + 0.5, x.mean([d for d in range(x.dim()) if d != 1]), torch.rand(x.shape[1]) + 0.5


def spread_over(norms):
    return [tensor for one in norms for tensor in one]


@built
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("shape", [(4, 24, 32, 32), (2, 16, 8, 16, 16), (8, 64, 512), (4096, 32), (3, 65, 33, 31)])
def test_sums_of_a_batch_norm_are_one_operator(shape, number, training):
    grad, *inputs = (channels_last(*shape) if len(shape) > 2 else torch.randn(shape) for _ in range(1 + number))
    norms = [norm(2 * x + 1) for x in inputs]

    def gradients(grad, *rest):
        norms = [rest[i : i + 4] for i in range(0, len(rest), 4)]
        return norm_gradients(grad.relu(), *norms, training=training)

    graph = traced(gradients, grad, *spread_over(norms))
    before = graph(grad, *spread_over(norms))
    exact = graph(grad.double(), *(t.double() for t in spread_over(norms)))
    for node in calls(graph, aten.sum.dim_IntList):
        node.meta["stack_trace"] = "the user's line"
    assert BatchNormSums()(graph).modified
    made = calls(graph, centered.operator)
    # the second norm's statistics of an evaluation are computed after the first one's sums
    assert [len(node.args[1]) for node in made] == ([number] if training else [1] * number)
    assert all(node.meta["stack_trace"] == "the user's line" for node in made)
    assert not calls(graph, aten.sum.dim_IntList)
    # Inductor must not lay out a gradient that it computes in another way
    assert all(node.args[0].target is memory_order_operator() for node in made)
    after = graph(grad, *spread_over(norms))
    for got, old, double in zip(after, before, exact, strict=True):
        assert (got.shape, got.dtype, got.stride()) == (old.shape, old.dtype, old.stride())
        torch.testing.assert_close(got.double(), double, rtol=2e-5, atol=2e-5 * double.abs().max().item())
    assert not BatchNormSums()(graph).modified


@built
@pytest.mark.parametrize("mask", [(True, True, False), (True, False, False), (False, True, True)])
def test_a_batch_norm_without_some_of_its_gradients(mask):
    grad, one = channels_last(4, 24, 32, 32), norm(channels_last(4, 24, 32, 32))
    graph = traced(lambda grad, *one: norm_gradients(grad, one, output_mask=mask), grad, *one)
    graph.graph.eliminate_dead_code()
    expected = graph(grad, *one)
    BatchNormSums()(graph)
    assert len(calls(graph, centered.operator)) == 1
    for got, old in zip(graph(grad, *one), expected, strict=True):
        torch.testing.assert_close(got, old, rtol=1e-5, atol=1e-5 * old.abs().max().item())


@built
@pytest.mark.parametrize(
    "case",
    [
        "channels first",
        "half precision",
        "double precision",
        "small",
        "computed input",
        "not centered",
        "gradient of the input",
    ],
)
def test_other_norms_stay(case):
    shape = (4, 24, 32, 32) if case != "small" else (2, 8, 8, 8)
    dtype = {"half precision": torch.bfloat16, "double precision": torch.float64}.get(case, torch.float32)
    grad, x = channels_last(*shape, dtype=dtype), channels_last(*shape, dtype=dtype)
    if case == "channels first":
        grad, x = grad.contiguous(), x.contiguous()
    mean = x.mean((0, 2, 3))

    def sums(grad, x, mean):
        x = x.sigmoid() if case == "computed input" else x
        grad = grad * (2 * x + 1 > 0) if case == "gradient of the input" else grad
        plain = grad.sum((0, 2, 3))
        shift = mean.view(1, -1, 1, 1) if case != "not centered" else grad.mean((2, 3), keepdim=True)
        return plain, (grad * (x - shift)).sum((0, 2, 3))

    graph = traced(sums, grad, x, mean)
    code = graph.code
    assert not BatchNormSums()(graph).modified
    assert graph.code == code


@built
def test_compiled_training_sums_a_batch_norm_s_gradients_once(monkeypatch):
    torch.manual_seed(0)
    layers: list = [torch.nn.Conv2d(3, 16, 3, padding=1, bias=False), torch.nn.BatchNorm2d(16), torch.nn.ReLU()]
    layers += [torch.nn.Conv2d(16, 32, 1, bias=False), torch.nn.BatchNorm2d(32), torch.nn.ReLU()]
    layers += [torch.nn.Conv2d(32, 32, 3, padding=1, groups=32, bias=False), torch.nn.BatchNorm2d(32), torch.nn.ReLU()]
    model = torch.nn.Sequential(*layers, torch.nn.Conv2d(32, 8, 1)).to(memory_format=torch.channels_last)
    x = torch.randn(4, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    policy = ssprop_fx.Policy(drop_rate=0.5, schedule={"kind": "constant"})
    eager = ssprop_fx.transform(copy.deepcopy(model), policy)
    compiled = torch.compile(model, backend="ssprop", options={"policy": policy})
    loop, served = native.centered_sums, []

    def watched(grad, inputs, means):
        result = loop(grad, inputs, means)
        served.append(result is not None)
        return result

    monkeypatch.setattr(native, "centered_sums", watched)
    signs = torch.randn(4, 8, 32, 32)
    for one in (eager, compiled):
        (one(x) * signs).sum().backward()
    backward = ssprop_fx.inspect(compiled).graph("graph 0/backward, factor 1")
    assert len(calls(backward, centered.operator)) == 3
    assert served == [True] * 3  # the loop, not PyTorch's operations
    most = max(parameter.grad.abs().max().item() for parameter in eager.parameters())
    for mine, theirs in zip(model.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-5 * most)


@pytest.mark.parametrize("arrange", [torch.Tensor.contiguous, lambda x: x.contiguous(memory_format=torch.channels_last)])
@pytest.mark.parametrize("number", [0, 2])
def test_centered_sums_as_an_operator(arrange, number):
    grad, *inputs = (arrange(torch.randn(3, 5, 4, 6)) for _ in range(1 + number))
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.ssprop.centered_sums, (grad, inputs, [torch.randn(5) for _ in inputs]), test_utils=tests)
