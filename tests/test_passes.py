"""Each pass can be called alone on a graph of a few nodes, does its one thing, and says so when it cannot."""

import operator
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from ssprop_fx.passes import (
    Decision,
    LowerBackward,
    Sparsify,
    assign_policy,
    find_convolutions,
    lower_backward,
    lowering_demands,
    verify,
)
from ssprop_fx.passes.find_convolutions import example_value
from ssprop_fx.passes.lower_backward import backward_nodes
from torch import nn
from torch._dynamo.testing import EagerAndRecordGraphs
from torch.fx import symbolic_trace
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.passes.shape_prop import ShapeProp

from ssprop_fx import ops
from ssprop_fx.backward import sparse_backward
from ssprop_fx.convolutions import CONVOLUTIONS
from ssprop_fx.errors import PolicyError, TransformError
from ssprop_fx.policy import Policy, Settings

SPARSE = Settings(drop_rate=0.5, criterion="l1", round_to=1, gradients="all", rule="default")
DENSE = Settings(drop_rate=0.0, criterion="l1", round_to=1, gradients="all", rule="rules[0]")


def dynamo(function, *inputs):
    """The graph as Dynamo hands it to a backend."""
    recorder = EagerAndRecordGraphs()
    torch._dynamo.reset()
    torch.compile(function, backend=recorder, fullgraph=True)(*inputs)
    (graph,) = recorder.graphs
    return graph


def arguments(name, batched=True, groups=1, kernel=3, dtype=torch.float64):
    """(input, weight, bias) of one convolution function."""
    spec = CONVOLUTIONS[name]
    torch.manual_seed(0)
    module = spec.module(4, 8, kernel, groups=groups).to(dtype)
    shape = (4, *[6] * spec.dim)
    input = torch.randn((2, *shape) if batched else shape, dtype=dtype)
    return input, module.weight.detach(), module.bias.detach()


def targets(graph_module):
    return [n.target for n in graph_module.graph.nodes if n.op == "call_function"]


def sparsified(graph_module, settings=SPARSE):
    decisions = [Decision(c, settings) for c in find_convolutions(graph_module)]
    Sparsify(decisions)(graph_module)
    verify(graph_module, decisions)
    return graph_module


def gradients(function, tensors, seed=1):
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    output = function(*leaves)
    torch.manual_seed(seed)
    return output, torch.autograd.grad(output, leaves, torch.randn_like(output))


def masked(function, tensors, dim, keep, seed=1):
    """The oracle for one dense selection, along the channel dimension of the output."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    output = function(*leaves)
    torch.manual_seed(seed)
    grad = torch.randn_like(output)
    channel = output.dim() - dim - 1
    score = grad.abs().sum([d for d in range(output.dim()) if d != channel])
    mask = torch.zeros_like(score).index_fill(0, score.topk(keep).indices, 1.0)
    return output, torch.autograd.grad(output, leaves, grad * mask.view(-1, *[1] * dim))


def assert_same(got, expected):
    assert torch.equal(got[0], expected[0])
    for a, b in zip(got[1], expected[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


# --- find ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_find_sees_aten_convolutions_with_their_arguments(name):
    function = CONVOLUTIONS[name].function
    given = arguments(name)
    for pre_dispatch in (False, True):
        graph = make_fx(lambda *a: function(*a, stride=2), pre_dispatch=pre_dispatch)(*given)
        (found,) = find_convolutions(graph)
        assert found.spec is CONVOLUTIONS[name]
        assert list(found.arguments["stride"]) == [2] * found.spec.dim
        assert found.arguments["groups"] == 1
        assert found.kinds == {name, "functional"}
        assert example_value(found.arguments["weight"]).shape == given[1].shape


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_find_sees_functional_calls_however_the_arguments_are_given(name):
    function = CONVOLUTIONS[name].function

    def by_keyword(x, w, b):
        return function(weight=w, input=x, padding=1, bias=b)

    def by_position(x, w, b):
        return function(x, w, b, 1, 1)

    for traced in (
        symbolic_trace(by_keyword),
        symbolic_trace(by_position),
        dynamo(by_keyword, *arguments(name)),
        dynamo(by_position, *arguments(name)),
    ):
        (found,) = find_convolutions(traced)
        assert found.spec is CONVOLUTIONS[name]
        assert found.arguments["padding"] == 1
        assert found.arguments["stride"] == 1
        assert {found.arguments[k].op for k in ("input", "weight", "bias")} == {"placeholder"}


def test_find_sees_convolution_modules_and_their_kinds():
    model = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.ConvTranspose2d(4, 4, 2, groups=2))
    found = find_convolutions(symbolic_trace(model))
    assert [c.layer for c in found] == ["0", "2", "3"]
    assert [c.kinds for c in found] == [
        {"conv2d", "grouped", "depthwise"},
        {"conv2d", "pointwise"},
        {"conv_transpose2d", "grouped"},
    ]


def test_find_leaves_out_what_is_rewritten_and_what_is_no_convolution():
    def function(x, w, b):
        y = ops.conv(x, w, b, [1], [0], [1], False, [0], 1, "l", 0.5, "l1", 1, "all", "")
        return y.relu() + torch.unfold_copy(x, 2, 4, 1).sum()

    graph = make_fx(function)(*arguments("conv1d"))
    assert ops.conv in targets(graph)
    assert find_convolutions(graph) == []


def test_find_asks_for_the_name_with_node_and_row():
    graph = make_fx(lambda x, w, b: F.conv2d(x, w, b))(*arguments("conv2d"))
    (found,) = find_convolutions(graph, lambda node, spec: (f"mine/{spec.name}/{node.op}", False))
    assert found.layer == "mine/conv2d/call_function"
    assert found.kinds == {"conv2d"}


# --- assign -------------------------------------------------------------------------------------------------


def three_layers():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 8, 1))
    return model, symbolic_trace(model)


def test_assign_says_which_rule_decided():
    policy = Policy(
        drop_rate=0.8,
        rules=[{"layers": "0", "drop_rate": 0}, {"kind": "depthwise", "drop_rate": 0.5, "criterion": "l2"}],
    )
    first, second, third = assign_policy(find_convolutions(three_layers()[1]), policy)
    assert (first.sparse, first.settings.rule) == (False, "rules[0]")
    assert (second.settings.drop_rate, second.settings.criterion, second.settings.rule) == (0.5, "l2", "rules[1]")
    assert (third.sparse, third.settings.drop_rate, third.settings.rule) == (True, 0.8, "default")
    assert policy.drop_rates().keys() == {"0", "1", "2"}


def test_assign_refuses_an_unmatched_rule_only_when_asked():
    policy = Policy(rules=[{"layers": "stem", "drop_rate": 0.5}])
    found = find_convolutions(three_layers()[1])
    assert len(assign_policy(found, policy)) == 3
    with pytest.raises(PolicyError, match="stem"):
        assign_policy(found, policy, require_match=True)


# --- sparsify -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("front_end", ["dynamo", "make_fx", "symbolic"])
def test_sparsified_graph_computes_the_same_and_trains_sparse(name, front_end):
    spec = CONVOLUTIONS[name]

    def function(x, w, b):
        return spec.function(x, w, b, padding=1, stride=2).sin()

    given = arguments(name)
    trace = {"dynamo": dynamo, "make_fx": lambda f, *a: make_fx(f)(*a), "symbolic": lambda f, *a: symbolic_trace(f)}
    graph = sparsified(trace[front_end](function, *given))
    assert targets(graph).count(ops.conv) == 1
    assert find_convolutions(graph) == []
    leaves = [t.clone().requires_grad_() for t in given]
    output = graph(*leaves)
    output = output[0] if isinstance(output, tuple) else output
    assert torch.equal(output, function(*given))
    output.sum().backward()
    assert (leaves[2].grad == 0).sum() == 4


@pytest.mark.parametrize("front_end", ["dynamo", "make_fx"])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_unbatched_input_becomes_batched_and_back(name, front_end):
    spec, given = CONVOLUTIONS[name], arguments(name, batched=False)
    if front_end == "dynamo":
        graph = sparsified(dynamo(spec.function, *given))
        call = lambda *a: graph(*a)[0]  # noqa: E731
    else:
        call = sparsified(make_fx(lambda *a: spec.function(*a), pre_dispatch=True)(*given))
    assert_same(gradients(call, given), masked(spec.function, given, spec.dim, 4))


@pytest.mark.parametrize("kernel", [2, 3, 4, (2, 3), (5, 4)])
@pytest.mark.parametrize("dilation", [1, 2, 3])
@pytest.mark.parametrize("batched", [True, False])
def test_same_padding_equals_that_of_pytorch(kernel, dilation, batched):
    given = arguments("conv2d", kernel=kernel, batched=batched)

    def function(x, w, b):
        return F.conv2d(x, w, b, padding="same", dilation=dilation)

    graph = sparsified(dynamo(function, *given))
    assert_same(gradients(lambda *a: graph(*a)[0], given), masked(function, given, 2, 4))


def test_same_padding_without_example_values_is_refused():
    graph = symbolic_trace(lambda x, w, b: F.conv2d(x, w, b, padding="same"))
    with pytest.raises(ValueError, match=r"conv2d.*'same'.*example values"):
        sparsified(graph)


def test_modules_become_operators_on_their_own_parameters():
    model = nn.Sequential(nn.Conv2d(4, 8, 3, bias=False), nn.ReLU(), nn.ConvTranspose2d(8, 6, 3, stride=2)).double()
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    graph = sparsified(symbolic_trace(model))
    assert torch.equal(graph(x), model(x))
    graph(x).sum().backward()
    assert (model[0].weight.grad.flatten(1).abs().sum(1) == 0).sum() == 4
    assert (model[2].bias.grad == 0).sum() == 3


def test_each_rewrite_is_noted_on_its_node_with_the_metadata_of_the_old():
    _, graph = three_layers()
    ShapeProp(graph).propagate(torch.randn(1, 3, 8, 8))
    shapes = [n.meta["tensor_meta"].shape for n in graph.graph.nodes if n.op == "call_module"]
    policy = Policy(drop_rate=0.5, rules=[{"layers": "2", "drop_rate": 0}])
    decisions = assign_policy(find_convolutions(graph), policy)
    Sparsify(decisions)(graph)
    noted = [n for n in graph.graph.nodes if "ssprop" in n.meta]
    assert [n.target for n in noted] == [ops.conv, ops.conv, "2"]
    assert [n.meta["ssprop"] for n in noted] == [
        {"layer": "0", "rule": "default", "drop_rate": 0.5, "kinds": ["conv2d"]},
        {"layer": "1", "rule": "default", "drop_rate": 0.5, "kinds": ["conv2d", "depthwise", "grouped"]},
        {"layer": "2", "rule": "rules[0]", "drop_rate": 0.0, "kinds": ["conv2d", "pointwise"]},
    ]
    assert [n.meta["tensor_meta"].shape for n in noted] == shapes


def test_settings_and_allocation_are_arguments_in_the_graph():
    graph = make_fx(lambda x, w, b: F.conv2d(x, w, b))(*arguments("conv2d"))
    settings = Settings(drop_rate=0.7, criterion="taylor", round_to="auto", gradients="weight", rule="default")
    (found,) = find_convolutions(graph, lambda node, spec: ("stem", False))
    Sparsify([Decision(found, settings)], "handle")(graph)
    (node,) = graph.graph.find_nodes(op="call_function", target=ops.conv)
    assert node.args[ops.SETTINGS_AT :] == ("stem", 0.7, "taylor", 0, "weight", "handle")


def test_a_graph_without_anything_to_do_is_not_modified():
    _, graph = three_layers()
    code = graph.code
    result = Sparsify([Decision(c, DENSE) for c in find_convolutions(graph)])(graph)
    assert not result.modified
    assert graph.code == code


# --- lower --------------------------------------------------------------------------------------------------

FORMS = {
    "1d": ("conv1d", 1),
    "2d": ("conv2d", 1),
    "3d": ("conv3d", 1),
    "grouped": ("conv2d", 2),
    "depthwise": ("conv2d", 4),
    "transposed": ("conv_transpose2d", 1),
    "transposed grouped": ("conv_transpose2d", 2),
}


def backward_graph(form="2d", mask=(True, True, True), keep=None, **changes):
    """A graph of one ``conv_backward``, its inputs, and how many channels it can choose from."""
    name, groups = FORMS[form]
    outs = 4 if form == "depthwise" else 8
    torch.manual_seed(0)
    module = CONVOLUTIONS[name].module(4, outs, 3, padding=1, groups=groups)
    x = torch.randn(2, 4, *[5] * CONVOLUTIONS[name].dim)
    args = CONVOLUTIONS[name].prepare(x, module.weight, padding=1, groups=groups).args
    y = torch.convolution(x, module.weight, module.bias, *args)
    settings = {"rate": 0.5, "criterion": "l1", "round_to": 1, "gradients": "all"} | changes
    given = [torch.randn_like(y), x, module.weight.detach(), y.detach()]

    def function(grad, x, w, y):
        out = y if settings["criterion"] == "taylor" else None
        grads = ops.conv_backward(grad, x, w, out, *args, list(mask), "stem", *settings.values(), "")
        return [g for g, m in zip(grads, mask, strict=True) if m]

    return make_fx(function, tracing_mode="fake")(*given), given, groups if outs == groups else outs // groups


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("changes", [{}, {"criterion": "l2"}, {"criterion": "taylor"}, {"gradients": "weight"}], ids=str)
def test_lowered_graph_computes_what_the_operator_does(form, changes):
    graph, given, channels = backward_graph(form, **changes)
    expected = graph(*given)
    (name,) = lowering_demands(graph)
    LowerBackward({name: channels // 2})(graph)
    assert ops.conv_backward not in targets(graph)
    for a, b in zip(graph(*given), expected, strict=True):
        assert a.stride() == b.stride()
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mask", [(True, True, False), (False, True, True), (True, False, False), (False, False, True)])
def test_lowering_computes_only_what_is_asked_for(mask):
    for gradients in ("all", "weight"):
        graph, given, _ = backward_graph(mask=mask, gradients=gradients)
        expected = graph(*given)
        (name,) = lowering_demands(graph)
        LowerBackward({name: 4})(graph)
        got = graph(*given)
        assert len(got) == sum(mask)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_lowering_to_all_channels_is_the_dense_backward(form):
    graph, given, channels = backward_graph(form)
    (name,) = lowering_demands(graph)
    LowerBackward({name: channels})(graph)
    assert targets(graph).count(torch.ops.aten.convolution_backward.default) == 1
    assert set(targets(graph)) <= {torch.ops.aten.convolution_backward.default, operator.getitem}
    dense, _, _ = backward_graph(form, rate=0.0)
    assert all(torch.equal(a, b) for a, b in zip(graph(*given), dense(*given), strict=True))


def test_layers_that_are_alike_are_lowered_once_and_no_others(monkeypatch):
    """The graph of one may stand for another only if the same arguments are the same tensors."""
    args = CONVOLUTIONS["conv2d"].prepare(torch.ones(4, 4, 3, 3), torch.ones(4, 4, 3, 3), padding=1).args
    calls = [("a", "b", "l1"), ("b", "b", "l1"), ("a", "b", "l1"), ("b", "a", "l1"), ("a", "a", "l1"), ("a", "b", "l2")]
    torch.manual_seed(0)
    given = torch.randn(3, 4, 4, 3, 3).unbind()

    def function(grad, a, b):
        found = []
        for input, weight, criterion in calls:
            settings = 0.5, criterion, 1, "all"
            values = {"a": a, "b": b}
            found += ops.conv_backward(
                grad, values[input], values[weight], None, *args, [True, True, False], "stem", *settings, ""
            )[:2]
        return found

    graph = make_fx(function, tracing_mode="fake")(*given)
    expected = graph(*given)
    traced = []
    monkeypatch.setattr(lower_backward, "sparse_backward", lambda *a, **k: traced.append(a) or sparse_backward(*a, **k))
    LowerBackward(dict.fromkeys(lowering_demands(graph), 2))(graph)
    assert len(traced) == 3  # two tensors, one tensor, another criterion
    for got, want in zip(graph(*given), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_lowered_nodes_keep_metadata_and_layer_name():
    graph, _, _ = backward_graph()
    ((name, (node, _)),) = backward_nodes(graph).items()
    node.meta["fwd_nn_module_stack"] = {"1": ("L['self'].stem", nn.Conv2d)}
    before = set(graph.graph.nodes)
    LowerBackward({name: 2})(graph)
    new = [n for n in graph.graph.nodes if n not in before]
    assert len(new) > 5
    for n in new:
        assert n.meta["ssprop"]["layer"] == "stem"
        assert n.meta["fwd_nn_module_stack"] == {"1": ("L['self'].stem", nn.Conv2d)}


def test_lowering_demands_name_calls_channels_and_cost():
    graph, given, _ = backward_graph("grouped")
    ((name, demand),) = lowering_demands(graph).items()
    (node,) = graph.graph.find_nodes(op="call_function", target=ops.conv_backward)
    assert (demand.layer, demand.channels, demand.drop_rate) == (name, 4, 0.5)
    assert name == node.name
    assert demand.flops == 2 * 2 * given[0].numel() * 2 * 9  # two gradients, multiply and add, C/g = 2, 3×3


# --- verify -------------------------------------------------------------------------------------------------


def rewritten():
    _, graph = three_layers()
    decisions = [Decision(c, SPARSE) for c in find_convolutions(graph)]
    Sparsify(decisions)(graph)
    return graph, decisions


def test_verify_accepts_what_sparsify_made():
    verify(*rewritten())


def test_verify_misses_no_layer_that_is_gone():
    graph, decisions = rewritten()
    node = graph.graph.find_nodes(op="call_function", target=ops.conv)[1]
    node.replace_all_uses_with(node.args[0])
    graph.graph.erase_node(node)
    with pytest.raises(TransformError, match="1 was selected 1 times and rewritten 0 times"):
        verify(graph, decisions)


def test_verify_misses_no_layer_left_dense():
    _, graph = three_layers()
    decisions = [Decision(c, SPARSE) for c in find_convolutions(graph)]
    Sparsify(decisions[:2])(graph)
    with pytest.raises(TransformError, match="2 was selected and is still dense"):
        verify(graph, decisions)


def test_verify_refuses_a_rewrite_that_the_policy_did_not_ask_for():
    graph, decisions = rewritten()
    told = [*decisions[:2], Decision(decisions[2].convolution, DENSE)]
    with pytest.raises(TransformError, match="2 was to stay dense and is gone"):
        verify(graph, told)


def test_verify_refuses_a_layer_rewritten_twice():
    graph, decisions = rewritten()
    node = graph.graph.find_nodes(op="call_function", target=ops.conv)[2]
    with graph.graph.inserting_after(node):
        twice = graph.graph.call_function(ops.conv, (node, *node.args[1:]))
    twice.meta = dict(node.meta)
    node.replace_all_uses_with(twice, delete_user_cb=lambda user: user is not twice)
    with pytest.raises(TransformError, match="2 was rewritten 2 times, but selected 1 times"):
        verify(graph, decisions)


def test_verify_counts_what_was_rewritten_before():
    graph, decisions = rewritten()
    with pytest.raises(TransformError, match="0 was selected 2 times and rewritten 1 times"):
        verify(graph, decisions, Counter({"0": 1}))
    verify(graph, [], Counter({"0": 1, "1": 1, "2": 1}))


def test_verify_refuses_lost_metadata():
    graph, decisions = rewritten()
    del graph.graph.find_nodes(op="call_function", target=ops.conv)[0].meta["ssprop"]
    with pytest.raises(TransformError, match="0 lost its metadata"):
        verify(graph, decisions)


def test_verify_lints_the_graph():
    graph, decisions = rewritten()
    nodes = list(graph.graph.nodes)
    nodes[-1].append(nodes[-2])  # after the output, which uses it
    with pytest.raises(RuntimeError):
        verify(graph, decisions)
