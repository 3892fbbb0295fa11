"""The report: rows, totals that equal PyTorch's own count, other steps, and the graphs."""

import copy
import enum
import gc
import json
import re
import sys
import warnings
import weakref

import networkx
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import ssprop_fx
from ssprop_fx import Policy, SSPropError
from ssprop_fx.convolutions import conv_backward_flops
from ssprop_fx.dataflow import operations
from ssprop_fx.steps import tensors_of

BACKWARD = torch.ops.aten.convolution_backward


def turns(rate=0.8, **contents):
    """Dense at even steps, sparse at odd ones, stepped by hand."""
    return Policy(drop_rate=rate, schedule={"kind": "bar", "period": 2}, **contents)


def grouped_flops(grad, x, w, _b, _s, _p, _d, transposed, _o, groups, mask, out_shape=None, **_):
    """PyTorch's own formula counts the weight gradient of a grouped convolution as if it were not grouped."""
    return conv_backward_flops(x if transposed else grad, w, sum(mask[:2]))


def backward_flops(model, *inputs, formula=None):
    """FLOPs of a step's convolution backward passes as ``FlopCounterMode`` counts them."""
    with FlopCounterMode(display=False, custom_mapping={BACKWARD: formula} if formula else {}) as counter:
        outputs = model(*inputs)
        sum(o.square().mean() for o in (outputs if isinstance(outputs, tuple) else (outputs,))).backward()
    model.zero_grad()
    return counter.get_flop_counts()["Global"][BACKWARD]


@pytest.fixture(scope="module")
def resnet():
    torch.manual_seed(0)
    policy, x = turns(), torch.randn(2, 3, 64, 64)
    model = ssprop_fx.transform(torchvision.models.resnet18(weights=None, num_classes=10), policy)
    return model, policy, x, ssprop_fx.inspect(model, x)


def test_rows_are_the_convolutions_in_order(resnet):
    model, _, _, report = resnet
    assert [row.layer for row in report.rows] == [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    row = report["layer1.0.conv2"]
    assert (row.kind, row.rung, row.rule, row.drop_rate) == ("conv2d", "graph", "default", 0.8)
    assert (row.input_shape, row.weight_shape, row.output_shape) == ((2, 64, 16, 16), (64, 64, 3, 3), (2, 64, 16, 16))
    with pytest.raises(KeyError, match=r"nearest: layer1\.0\.conv2"):
        report["layer1.0.convv2"]


def test_totals_equal_the_flop_counter_dense_and_sparse(resnet):
    model, policy, x, report = resnet
    model = copy.deepcopy(model)
    start = policy.state_dict()
    for step in range(2):
        counted = backward_flops(model, x)
        assert report.at(step).flops_now == pytest.approx(counted, rel=1e-3)
        assert ssprop_fx.inspect(model).flops_now == pytest.approx(counted, rel=1e-3)
        policy.step()
    policy.load_state_dict(start)
    assert report.flops_dense == report.at(0).flops_now == report.measurement.conv_flops
    assert report.at(1).flops_now < 0.25 * report.flops_dense


def test_totals_of_grouped_convolutions_equal_the_flop_counter():
    torch.manual_seed(0)
    policy, x = turns(), torch.randn(2, 3, 64, 64)
    model = ssprop_fx.transform(torchvision.models.resnext50_32x4d(weights=None, num_classes=10), policy)
    report = ssprop_fx.inspect(model, x)
    assert report.flops_now == pytest.approx(backward_flops(model, x, formula=grouped_flops), rel=1e-3)
    policy.step()
    assert report.at(1).flops_now == pytest.approx(backward_flops(model, x, formula=grouped_flops), rel=1e-3)


def test_whole_step_equals_the_flop_counter(resnet):
    model, _, x, report = resnet
    with FlopCounterMode(display=False) as counter:
        copy.deepcopy(model)(x).square().mean().backward()
    assert report.step_flops["dense"] == pytest.approx(counter.get_total_flops(), rel=1e-3)
    assert report.step_flops["dense"] - report.step_flops["mean"] == pytest.approx(report.flops_dense - report.flops_mean)


class Mixed(nn.Module):
    """A module called twice at two sizes, one under a checkpoint, a functional call, and a frozen layer."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.shared = nn.Conv2d(16, 16, 3, padding=1)
        self.again = nn.Conv2d(16, 32, 1)
        self.up = nn.ConvTranspose2d(32, 16, 2, 2)
        self.frozen = nn.Conv2d(3, 16, 3, padding=1).requires_grad_(False)
        self.weight = nn.Parameter(torch.randn(32, 16, 3, 3) / 12)

    def forward(self, x):
        y = self.shared(self.stem(x)) + self.frozen(x)
        y = self.shared(F.avg_pool2d(y, 2))
        y = self.up(checkpoint(self.again, y, use_reentrant=False))
        return F.conv2d(y, self.weight)


def test_every_call_counts_for_what_it_is():
    torch.manual_seed(0)
    policy, x = turns(0.5, round_to=1), torch.randn(2, 3, 16, 16)
    model = ssprop_fx.transform(Mixed(), policy)
    report = ssprop_fx.inspect(model, x)
    assert report.flops_dense == report.measurement.conv_flops == backward_flops(model, x)
    assert report["shared"].calls == 2
    assert [c.input[2] for c in report.calls["shared"]] == [16, 8]
    assert report["#conv2d.0"].rung == "call"
    assert report["frozen"].reason == "no gradient is computed"
    assert report.coverage == 1.0
    policy.step()
    assert report.at(1).flops_now == pytest.approx(backward_flops(model, x), rel=1e-3)


class Repeated(nn.Module):
    """One layer at every time step; ``reentrant`` says how it is checkpointed, or None."""

    def __init__(self, reentrant):
        super().__init__()
        self.conv, self.reentrant = nn.Conv2d(8, 8, 3, padding=1), reentrant

    def over_time(self, x):
        for _ in range(4):
            x = self.conv(x)
        return x

    def forward(self, x):
        if self.reentrant is None:
            return self.over_time(x)
        return checkpoint(self.over_time, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("end", [0.0, 1.0])
@pytest.mark.parametrize("reentrant", [None, False, True])
def test_a_first_step_tells_all_of_its_calls(reentrant, end):
    policy = Policy(drop_rate=0.5, schedule={"kind": "constant", "end": end, "clock": "manual"})
    model = ssprop_fx.transform(Repeated(reentrant), policy)
    x = torch.randn(2, 8, 6, 6, requires_grad=bool(reentrant))
    with torch.no_grad():
        model(x)
    assert ssprop_fx.inspect(model)["conv"].calls == 1
    for _ in range(3):  # the clock stands: gradients are accumulated
        model(x).square().mean().backward()
        told, measured = ssprop_fx.inspect(model), ssprop_fx.inspect(model, x)
        assert told["conv"].calls == measured["conv"].calls == 4
        assert (told.flops_dense, told.flops_now) == (measured.flops_dense, measured.flops_now)
    site = model.__dict__["_ssprop"].sites["conv"]
    assert site.known  # later calls are not looked at


def test_calls_without_any_backward_pass_are_not_collected_forever():
    model = ssprop_fx.transform(nn.Conv2d(3, 8, 1), turns(0.5, round_to=1))
    x = torch.randn(1, 3, 1, 1)
    for _ in range(1100):
        model(x)
    site = model.__dict__["_ssprop"].sites[""]
    assert (len(site.first_step), site.known) == (1000, True)


def test_at_another_step_gives_what_training_keeps(resnet):
    model, policy, x, report = resnet
    model = copy.deepcopy(model)
    assert (report.step, report.factor) == (0, 0.0)
    sparse = report.at(1)
    assert (sparse.step, sparse.factor) == (1, 1.0)
    start = policy.state_dict()
    policy.step()
    model(x).square().mean().backward()
    kept = {n: int((p.grad.flatten(1).abs().sum(1) > 0).sum()) for n, p in model.named_parameters() if p.dim() == 4}
    policy.load_state_dict(start)
    assert {f"{row.layer}.weight": row.kept for row in sparse.rows} == kept
    assert all(row.kept == row.total for row in report.rows)
    with pytest.raises(ValueError, match="count from 0"):
        report.at(-1)


@pytest.mark.parametrize(
    ("schedule", "cycle", "share"),
    [
        ({"kind": "bar", "period": 2}, range(2), 0.5),
        ({"kind": "bar", "period": 4, "warmup": 3}, range(3, 7), 0.5),
        ({"kind": "constant"}, range(1), 1.0),
        ({"kind": "constant", "interleave": True}, range(2), 0.5),
        ({"kind": "bar", "period": 2, "warmup": 4, "cooldown": 2, "total": 10}, range(10), 0.2),
    ],
)
def test_mean_is_over_the_schedule(schedule, cycle, share):
    model = ssprop_fx.transform(nn.Conv2d(4, 8, 3), Policy(drop_rate=0.5, round_to=1, schedule=schedule))
    report = ssprop_fx.inspect(model, torch.randn(1, 4, 8, 8))
    assert report.cycle == cycle
    assert report.flops_mean == pytest.approx(report.flops_dense * (1 - 0.5 * share))


def test_weight_only_gradients_cost_half_of_the_savings():
    policy = Policy(drop_rate=0.5, round_to=1, gradients="weight", schedule={"kind": "constant"})
    model = ssprop_fx.transform(nn.Conv2d(4, 8, 3), policy)
    x = torch.randn(1, 4, 8, 8, requires_grad=True)
    report = ssprop_fx.inspect(model, x)
    assert report.flops_now == 0.75 * report.flops_dense == backward_flops(model, x)


# --- forms


def test_json_round_trip(resnet):
    report = resnet[3]
    assert json.loads(report.to_json()) == report.to_dict()
    assert report.to_dict()["rows"][0]["input_shape"] == [2, 3, 64, 64]
    assert Policy.from_dict(report.to_dict()["policy"]).digest == report.policy.digest


def test_any_layer_name_is_one_cell_of_a_table():
    class Named(nn.ModuleDict):
        def forward(self, x):
            return sum(layer(x) for layer in self.values())

    names = ["a|b", "two\nlines", "<b>c</b>", "back`tick", "plain_name"]
    report = ssprop_fx.inspect(ssprop_fx.transform(Named({name: nn.Conv2d(3, 4, 1) for name in names}), Policy(drop_rate=0.5)))
    lines = [line for line in report.to_markdown().splitlines() if line.startswith("|")]
    assert len(lines) == 2 + len(names)
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1
    assert "<b>" not in report.to_markdown()
    assert "| plain_name |" in report.to_markdown()
    assert len(str(report).splitlines()) == len(report.summary().splitlines()) + 3 + len(names)


@pytest.mark.parametrize(
    ("schedule", "share"),
    [
        ({"kind": "linear", "period": 2_000_000, "repeat": False}, 0.5),
        ({"kind": "bar", "period": 10**9}, 0.5),
        ({"kind": "bar", "period": 10**9 + 7, "warmup": 5}, 0.5),
    ],
)
def test_the_mean_over_a_very_long_period_is_over_all_of_it(schedule, share):
    model = ssprop_fx.transform(nn.Conv2d(3, 8, 3), Policy(drop_rate=0.5, schedule=schedule))
    flops = ssprop_fx.inspect(model, torch.randn(2, 3, 8, 8)).conv_flops
    assert 1 - flops["mean"] / flops["dense"] == pytest.approx(0.5 * share, rel=0.01)


def test_markdown_is_a_table_with_a_line_for_each_row(resnet):
    report = resnet[3]
    lines = [line for line in report.to_markdown().splitlines() if line.startswith("|")]
    assert len(lines) == 2 + len(report.rows)
    assert len({line.count("|") for line in lines}) == 1
    assert "| layer1.0.conv2 | conv2d | graph | 0.8 | 64/64 |" in report.to_markdown()


def test_text_says_what_is_saved(resnet):
    text = str(resnet[3].at(1))
    assert "20 of 20 convolutions rewritten; step 1, factor 1" in text
    assert "saved at this step" in text
    assert "over the schedule" in text


def test_pandas(resnet, monkeypatch):
    report = resnet[3]
    pandas = pytest.importorskip("pandas")
    frame = report.to_pandas()
    assert isinstance(frame, pandas.DataFrame)
    assert frame.loc["conv1", "flops_dense"] == report["conv1"].flops_dense
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(SSPropError, match="pip install pandas"):
        report.to_pandas()


# --- graphs


def test_diff_shows_the_rewrite(resnet):
    report = resnet[3]
    diff = report.diff("model/traced", "model/rewritten")
    assert "-    conv1 = self.conv1(x);  x = None" in diff
    assert "'layer4.1.conv2', 0.8, 'l1'" in diff
    assert report.diff("model/traced", "model/traced") == ""
    with pytest.raises(SSPropError, match="it has 'model/traced', 'model/rewritten'"):
        report.diff("model/traced", "nothing")


def test_print_readable_prints_the_code(resnet, capsys):
    resnet[3].print_readable("model/traced")
    assert "layer1_0_conv1 = " in capsys.readouterr().out


def test_networkx_finds_the_residual_blocks(resnet):
    report = resnet[3].at(1)
    graph = report.to_networkx()
    assert networkx.is_directed_acyclic_graph(graph)
    (source,) = [n for n in graph if graph.in_degree(n) == 0]
    before = networkx.immediate_dominators(graph, source)
    blocks = {}
    for node in graph:
        if graph.in_degree(node) == 2:  # a sum; its block begins at the operation that every path to it passes
            paths = networkx.all_simple_paths(graph, before[node], node)
            blocks[graph.nodes[node]["module"]] = sorted(
                {graph.nodes[n]["layer"] for path in paths for n in path if graph.nodes[n].get("layer")}
            )
    assert len(blocks) == 8
    assert blocks["layer1.0"] == ["layer1.0.conv1", "layer1.0.conv2"]
    assert blocks["layer2.0"] == ["layer2.0.conv1", "layer2.0.conv2", "layer2.0.downsample.0"]
    convolution = graph.nodes["layer2_0_conv1"]
    assert (convolution["kind"], convolution["kept"], convolution["rung"]) == (
        "conv2d",
        report["layer2.0.conv1"].kept,
        "graph",
    )
    assert convolution["shape"] == (2, 128, 8, 8)
    assert sum(d.get("flops_now", 0) for _, d in graph.nodes(data=True)) == report.flops_now
    with pytest.raises(SSPropError, match="it has 'model'"):
        report.to_networkx("graph 7")


class Untraceable(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)

    def forward(self, x):
        if x.mean() > 1e9:
            return x
        return self.second(self.first(x))


def test_untraceable_model_has_rows_and_nodes_without_edges():
    report = ssprop_fx.inspect(ssprop_fx.transform(Untraceable(), turns()), torch.randn(1, 3, 8, 8))
    assert report.graphs == {}
    assert [row.rung for row in report.rows] == ["module", "module"]
    graph = report.to_networkx()
    assert list(graph) == ["first", "second"]
    assert graph.number_of_edges() == 0


# --- compiled


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.body = nn.Sequential(nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU())
        self.point = nn.Conv2d(64, 64, 1)

    def forward(self, x):
        x = self.body(self.stem(x))
        return x + self.point(x)


@pytest.fixture(scope="module")
def compiled():
    torch._dynamo.reset()
    torch.manual_seed(0)
    policy, x = turns(rules=[{"layers": "stem", "drop_rate": 0}]), torch.randn(2, 3, 16, 16)
    model = torch.compile(Small(), backend="ssprop", options={"policy": policy, "inner": "aot_eager"})
    for _ in range(2):
        model(x).square().mean().backward()
        policy.step()
    with torch.no_grad():
        model.eval()(x)
    return ssprop_fx.inspect(model.train())


def flops_of_graph(graph):
    """What the graph computes, counted while it runs; a mode around the compiled model would keep it from being compiled."""
    values = [node.meta["val"] for node in graph.graph.find_nodes(op="placeholder")]
    with FlopCounterMode(display=False) as counter:
        graph(*(torch.zeros(tuple(v.shape), dtype=v.dtype) for v in values))
    return counter.get_total_flops()


def test_compiled_totals_equal_the_flop_counter(compiled):
    report = compiled
    dense, sparse = (flops_of_graph(report.graph(f"graph 0/backward, factor {f}")) for f in (0, 1))
    assert report.flops_dense == backward_flops(Small(), torch.randn(2, 3, 16, 16))
    assert report.at(0).flops_now == report.flops_dense
    assert report.flops_dense == dense
    assert report.at(0).flops_now - report.at(1).flops_now == pytest.approx(dense - sparse, rel=1e-3)


def test_compiled_graphs_of_evaluation_count_for_nothing(compiled):
    report = compiled
    assert [row.calls for row in report.rows] == [1, 1, 1]
    assert [c.current for c in report.captures] == [True, False]
    assert report["stem"].reason == "drop rate 0"
    assert report["stem"].kept == 32


def test_compiled_stages_hold_the_lowered_backward_of_each_phase(compiled):
    report = compiled
    stages = [name.removeprefix("graph 0/") for name in report.graphs if name.startswith("graph 0/")]
    assert stages == ["captured", "rewritten", "forward", "backward", "backward, factor 0", "backward, factor 1"]
    found = {o.layer: o for o in operations(report.captures[0]) if o.layer}
    assert found["body.0"].module == "body.0"
    assert "ssprop.conv.default" in found["body.0"].rewritten
    assert "kept_channels" in found["body.0"].lowered["backward, factor 1"]
    assert "kept_channels" not in found["body.0"].lowered["backward, factor 0"]
    assert found["stem"].rewritten is None


def test_compiled_dataflow_has_no_parameters(compiled):
    graph = compiled.to_networkx("graph 0")
    assert [n for n in graph if graph.in_degree(n) == 0] == ["l_x_"]
    assert sum(graph.in_degree(n) == 2 for n in graph) == 1
    assert compiled.to_networkx("graph 0", parameters=True).number_of_nodes() > graph.number_of_nodes()


def test_transformed_and_compiled_reports_its_graphs():
    policy, x = turns(), torch.randn(2, 3, 16, 16)
    model = torch.compile(ssprop_fx.transform(Small(), policy), backend="ssprop", options={"inner": "aot_eager"})
    model(x).square().mean().backward()
    report = ssprop_fx.inspect(model)
    assert "graph 0/backward" in report.graphs
    assert report.flops_dense == backward_flops(Small(), x)
    assert report.at(1)["body.0"].kept < 64


def test_a_model_that_was_not_rewritten_is_refused():
    with pytest.raises(SSPropError, match="has not been rewritten"):
        ssprop_fx.inspect(nn.Conv2d(3, 4, 3))


# --- a snapshot, its phases and memory


def test_a_report_is_a_snapshot():
    torch._dynamo.reset()
    policy, x = turns(), torch.randn(2, 3, 16, 16)
    model = torch.compile(Small(), backend="ssprop", options={"policy": policy, "inner": "aot_eager"})
    model(x).square().mean().backward()
    report = ssprop_fx.inspect(model)
    before = report.to_json(), str(report), list(report.graphs), report.at(1).to_json()
    policy.step()
    model(x).square().mean().backward()
    assert (report.to_json(), str(report), list(report.graphs), report.at(1).to_json()) == before
    assert (report.step, report.factor) == (0, 0)
    assert "graph 0/backward, factor 1" in ssprop_fx.inspect(model).graphs


def test_phases_of_equal_counts_keep_their_names():
    torch._dynamo.reset()
    policy = Policy(drop_rate=0.5, round_to=4, schedule={"kind": "linear", "period": 3, "levels": 3})
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 8, 1))
    model = torch.compile(net, backend="ssprop", options={"policy": policy, "inner": "aot_eager"})
    for _ in range(3):
        model(torch.randn(1, 3, 4, 4)).sum().backward()
        policy.step()
    report = ssprop_fx.inspect(model)
    factors = [name.removeprefix("graph 0/backward, factor ") for name in report.graphs if ", factor" in name]
    assert factors == ["0", "0.5", "1"]
    shared = report.graph("graph 0/backward, factor 0.5") is report.graph("graph 0/backward, factor 0")
    assert shared == (report.at(1)["2"].kept == 8)
    assert {phase.factor for phase in report.phases} == {0, 0.5, 1}


def test_phases_and_memory(resnet):
    report = resnet[3]
    dense, sparse = report.phases
    assert (dense.factor, dense.share, sparse.factor, sparse.share) == (0, 0.5, 1, 0.5)
    assert (dense.flops, sparse.flops) == (report.flops_dense, report.at(1).flops_now)
    outputs = sum(torch.Size(row.output_shape).numel() for row in report.rows)
    assert report.grad_bytes["dense"] == dense.grad_bytes == 4 * outputs
    row = report.at(1)["layer1.0.conv1"]
    assert row.grad_bytes_now == row.grad_bytes_dense * row.kept // row.total
    assert report.at(1).grad_bytes["now"] == sparse.grad_bytes < 0.3 * dense.grad_bytes
    assert [p["factor"] for p in report.to_dict()["phases"]] == [0, 1]


def test_long_schedules_have_few_phases():
    policy = Policy(drop_rate=0.5, round_to=1, schedule={"kind": "linear", "period": 10_000})
    report = ssprop_fx.inspect(ssprop_fx.transform(nn.Conv2d(4, 64, 3), policy), torch.randn(1, 4, 8, 8))
    assert len(report.phases) <= 129
    assert sum(phase.share for phase in report.phases) == pytest.approx(1)
    assert report.flops_mean == pytest.approx(0.75 * report.flops_dense, rel=0.02)


def test_backward_flops_equal_the_flop_counter(resnet):
    model, policy, x, report = resnet
    model = copy.deepcopy(model)
    with FlopCounterMode(display=False) as counter:
        loss = model(x).square().mean()
        forward = counter.get_total_flops()
        loss.backward()
    assert report.backward_flops["dense"] == pytest.approx(counter.get_total_flops() - forward, rel=1e-3)
    assert report.backward_flops["now"] > report.conv_flops["now"]


def test_rows_say_why_they_are_dense():
    policy = turns(0.02, round_to=1, rules=[{"layers": "stem", "drop_rate": 0}])
    report = ssprop_fx.inspect(ssprop_fx.transform(Small(), policy), torch.randn(2, 3, 16, 16))
    assert [row.reason for row in report.rows] == ["drop rate 0"] + ["factor 0 at this step"] * 2
    assert [row.reason for row in report.at(1).rows] == ["drop rate 0", "", ""]
    rounded = turns(0.02, round_to=8)
    report = ssprop_fx.inspect(ssprop_fx.transform(Small(), rounded), torch.randn(2, 3, 16, 16)).at(1)
    assert {row.reason for row in report.rows} == {"rounded up to all channels"}


# --- before either front end


def test_before_transform_the_policy_tells_the_same(resnet):
    _, policy, x, report = resnet
    net = torchvision.models.resnet18(weights=None, num_classes=10)
    foreseen = policy.explain(net).report(x)
    assert foreseen.front_end == "policy"
    assert foreseen.policy is policy
    assert foreseen.rows == report.rows
    assert (foreseen.conv_flops, foreseen.step_flops) == (report.conv_flops, report.step_flops)
    assert "ResNet under the policy: 20 of 20 convolutions would be rewritten;" in str(foreseen)
    assert not hasattr(net, "_ssprop")
    assert "FLOPs: not known until the layers have run in a training step" in policy.explain(net).report().summary()


@pytest.mark.parametrize("front_end", ["transform", "backend"])
def test_example_inputs_give_shapes_to_a_model_that_never_ran(front_end):
    torch._dynamo.reset()
    net, policy = Small(), turns()
    if front_end == "transform":
        model = ssprop_fx.transform(net, policy)
    else:
        model = torch.compile(net, backend="ssprop", options={"policy": policy, "inner": "aot_eager"})
    report = ssprop_fx.inspect(model, torch.randn(2, 3, 16, 16))
    assert [row.output_shape for row in report.rows] == [(2, 32, 16, 16), (2, 64, 16, 16), (2, 64, 16, 16)]
    assert report.coverage == 1
    assert report.conv_flops["dense"] == report.measurement.conv_flops


def test_what_no_row_stands_for_counts_as_dense():
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.seen, self.unseen = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)

        def forward(self, x):
            return self.hidden(self.seen(x))

        @torch.compiler.disable
        def hidden(self, x):
            return self.unseen(x)

    torch._dynamo.reset()
    policy = turns(0.5, round_to=1)
    model = torch.compile(Broken(), backend="ssprop", options={"policy": policy, "inner": "aot_eager"})
    report = ssprop_fx.inspect(model, torch.randn(1, 3, 8, 8)).at(1)
    assert report["unseen"].rung == "-"
    assert report.coverage == 0.5
    assert report.conv_flops["dense"] == report.measurement.conv_flops
    assert report.conv_flops["now"] == report.conv_flops["dense"] - report["seen"].flops_dense / 2


class Wrapped(nn.Module):
    """The root does not trace; what it calls does, and by keyword."""

    def __init__(self):
        super().__init__()
        self.inner = Small()

    def forward(self, x):
        return self.inner(x=x if x.mean() < 1e9 else -x)


def test_nodes_of_a_submodules_graph_have_shapes():
    model = ssprop_fx.transform(Wrapped(), turns())
    before = [b.clone() for b in model.buffers()]
    graph = ssprop_fx.inspect(model, torch.randn(2, 3, 16, 16)).to_networkx("inner")
    assert {data["shape"] for _, data in graph.nodes(data=True) if data["op"] != "output"} >= {(2, 64, 16, 16)}
    assert None not in [data["shape"] for _, data in graph.nodes(data=True) if data["op"] != "output"]
    assert all(torch.equal(a, b) for a, b in zip(before, model.buffers(), strict=True))


def test_module_names_are_those_of_the_live_model():
    torch._dynamo.reset()
    model = torch.compile(Wrapped().inner, backend="ssprop", options={"policy": turns(), "inner": "aot_eager"})
    model(torch.randn(2, 3, 16, 16)).sum().backward()
    report = ssprop_fx.inspect(model)
    del model
    assert {o.module for o in operations(report.captures[0]) if o.layer} == {"stem", "body.0", "point"}


# --- models that change while they run, and what a report does not reach


class Generated(nn.Module):
    """A layer whose weight the forward makes."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 10, 3)
        del self.conv.weight
        self.generator, self.code = nn.Linear(5, 270), nn.Parameter(torch.randn(5))

    def forward(self, x):
        self.conv.weight = self.generator(self.code).view(10, 3, 3, 3)
        return self.conv(x)


def test_a_layer_whose_weight_the_forward_generates_has_a_row():
    model = ssprop_fx.transform(Generated(), turns())
    x = torch.randn(2, 3, 8, 8)
    assert [row.layer for row in ssprop_fx.inspect(model).rows] == ["conv"]
    report = ssprop_fx.inspect(model, x)
    assert (report.coverage, report["conv"].total, report["conv"].rung) == (1.0, 10, "module")


class Memory:
    def __init__(self):
        self.seen = torch.zeros(3)


class Changing(nn.Module):
    """Sets itself up at its first forward, remembers, and trains itself."""

    def __init__(self):
        super().__init__()
        self.conv, self.scale, self.memory = nn.Conv2d(3, 8, 3), nn.Parameter(torch.ones(8, 1, 1)), Memory()
        self.register_buffer("ready", torch.tensor(False))
        self.optimizer = torch.optim.SGD([self.conv.weight], lr=0.1)

    def forward(self, x):
        y = self.conv(x)
        if not self.ready:
            self.scale.data.copy_(1 / y.detach().std((0, 2, 3)).view(-1, 1, 1))
            self.ready.fill_(True)
        self.memory.seen += x.detach().mean((0, 2, 3))
        self.conv.weight.grad = torch.ones_like(self.conv.weight)
        self.optimizer.step()
        return self.conv(x) * self.scale


def test_inspection_leaves_the_model_the_clock_and_hooks_as_they_were():
    model, x, heard = Changing(), torch.randn(2, 3, 8, 8), []
    model.conv.weight.register_hook(heard.append)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    policy = Policy(drop_rate=0.5)
    policy.explain(model).report(x)
    transformed = ssprop_fx.transform(model, policy)
    ssprop_fx.inspect(transformed, x)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert not model.memory.seen.any()
    assert (policy.steps, heard, model.conv.weight.grad) == (0, [], None)


def sparse_csr():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's, that they are in beta
        return torch.eye(8).to_sparse_csr()


class Odd(nn.Module):
    """Keeps, and changes, a tensor that PyTorch cannot compare with another."""

    def __init__(self, kept):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.register_buffer("kept", kept)

    def forward(self, x):
        self.kept.mul_(2)
        if self.kept.layout == torch.sparse_coo:
            self.kept.add_(torch.ones(8, 8).to_sparse())
        return self.conv(x)


ODD = {
    "coordinates": lambda: torch.eye(8).to_sparse(),
    "rows": sparse_csr,
    "oneDNN": lambda: torch.eye(8).to_mkldnn(),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("kind", ODD)
def test_inspection_puts_back_tensors_that_cannot_be_compared(kind):
    original = Odd(ODD[kind]())
    model, x = ssprop_fx.transform(original, turns()), torch.randn(2, 3, 8, 8)
    model(x).sum().backward()
    original.kept, model.kept = (ODD[kind](),) * 2
    before, grad = model.kept, model.conv.weight.grad
    assert ssprop_fx.inspect(model, x).coverage == 1
    assert model.conv.weight.grad is grad
    assert model.kept is before
    for value, expected in zip(parts(before), parts(ODD[kind]()), strict=True):
        assert torch.equal(value, expected)


def parts(tensor):
    return list(tensor.unbind()) if tensor.is_nested else [tensor.to_dense()]


class Mode(enum.Enum):
    TRAIN = 1


class Part:
    def __init__(self, whole, tensor):
        self.whole, self.tensor = whole, tensor


class Whole:
    def __init__(self, tensor):
        self.parts = {"first": Part(self, tensor), "second": [Part(self, tensor * 2)]}
        self.model = nn.Linear(2, 2)


class Linked:
    def __init__(self, tensor):
        self.tensor, self.next = tensor, Part(None, tensor * 2)
        self.next.whole = self.next


class Wrapping(nn.Module):
    def __init__(self, wrap):
        super().__init__()
        self.conv, self.wrap = nn.Conv2d(3, 8, 3), wrap

    def forward(self, x):
        return self.wrap(self.conv(x))


@pytest.mark.parametrize(
    ("wrap", "tensors"), [(lambda y: {"logits": y, "mode": Mode.TRAIN, "of": Mode}, 1), (Whole, 2), (Linked, 2)]
)
def test_outputs_may_refer_to_each_other(wrap, tensors):
    model, x = ssprop_fx.transform(Wrapping(wrap), turns()), torch.randn(2, 3, 8, 8)
    assert len(tensors_of(model(x))) == tensors
    assert ssprop_fx.inspect(model, x).coverage == 1


def test_a_model_without_data_is_inspected():
    with torch.device("meta"):
        original, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3)), torch.empty(2, 3, 8, 8)
    report = ssprop_fx.inspect(ssprop_fx.transform(original, turns()), x)
    assert report.coverage == 1
    assert [row.output_shape for row in report.rows] == [(2, 8, 6, 6), (2, 8, 4, 4)]


def test_inspection_between_forward_and_backward_spoils_no_graph():
    model, x = ssprop_fx.transform(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), turns()), torch.randn(2, 3, 8, 8)
    loss = model(x).square().sum()
    ssprop_fx.inspect(model, x)
    loss.backward()
    assert model[0].weight.grad is not None


def test_layers_that_a_graph_holds_without_gradients_only_save_nothing():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)

        @torch._dynamo.disable
        def eager(self, x):
            return self.conv(x)

        def forward(self, x):
            with torch.no_grad():
                target = self.conv(x)
            return self.eager(x) - target

    torch._dynamo.reset()
    x = torch.randn(2, 3, 8, 8)
    options = {"policy": Policy(drop_rate=0.8, schedule={"kind": "constant"}), "inner": "aot_eager"}
    compiled = torch.compile(Net(), backend="ssprop", options=options)
    compiled(x).square().sum().backward()
    report = ssprop_fx.inspect(compiled, x)
    assert (report.coverage, report["conv"].rewritten) == (0.0, False)
    assert "transform first" in report["conv"].reason
    assert report.conv_flops["now"] == report.conv_flops["dense"] == report.measurement.conv_flops
    assert 0 < report.backward_flops["now"] == report.backward_flops["dense"]


def test_a_compiled_model_that_dynamo_gave_up_is_told_what_to_do():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
    model[0].register_full_backward_hook(lambda module, grad_in, grad_out: None)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="ssprop", options={"inner": "aot_eager"})
    compiled(torch.randn(2, 3, 8, 8)).sum().backward()
    with pytest.raises(SSPropError, match=r"trains dense \(TORCH_LOGS=graph_breaks.*transform\(model, policy\) first"):
        ssprop_fx.inspect(compiled)


def test_a_method_in_a_checkpoint_of_compiled_code_is_reported_as_dense():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.weight = nn.Conv2d(3, 8, 3), nn.Parameter(torch.randn(10, 8, 3, 3))

        def inner(self, x):
            return F.conv2d(x.relu(), self.weight)

        def forward(self, x):
            return checkpoint(self.inner, self.conv(x), use_reentrant=False)

    torch._dynamo.reset()
    x = torch.randn(2, 3, 8, 8)
    model = ssprop_fx.transform(Net(), Policy(drop_rate=0.8, schedule={"kind": "constant"}))
    compiled = torch.compile(model, backend="aot_eager")
    compiled(x).square().sum().backward()
    report = ssprop_fx.inspect(compiled, x)
    dense = not (model.weight.grad.flatten(1).abs().sum(1) == 0).any()
    assert dense != report["#conv2d.0"].rewritten
    assert len(report.rows) == 2
    if dense:
        assert "checkpoint" in report["#conv2d.0"].reason


def test_a_complex_convolution_has_one_row():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.wave = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1, dtype=torch.cfloat)

        def forward(self, x):
            return self.wave(self.conv(x).to(torch.cfloat)).abs()

    rows = ssprop_fx.inspect(ssprop_fx.transform(Net(), turns()), torch.randn(2, 3, 8, 8)).rows
    assert {row.layer: "complex" in row.reason for row in rows} == {"conv": False, "wave": True}


def test_a_layer_that_a_forward_builds_follows_the_policy_as_a_functional_call():
    class Late(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.conv = nn.Conv2d(3, 8, 3), None

        def forward(self, x):
            x = self.stem(x)
            if self.conv is None:
                self.conv = nn.Conv2d(8, 8, 3)
            return self.conv(x)

    policy = Policy(drop_rate=0.5, round_to=1, schedule={"kind": "constant"})
    model, x = ssprop_fx.transform(Late(), policy), torch.randn(2, 3, 8, 8)
    model(x).square().mean().backward()
    assert model.conv.weight.grad.flatten(1).abs().sum(1).eq(0).sum() == 4
    for report in (ssprop_fx.inspect(model), ssprop_fx.inspect(model, x)):
        assert {row.layer: row.reason for row in report.rows} == {"stem": "", "#conv2d.0": ""}
        assert report.coverage == 1.0


class MeanTeacher(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.student, self.teacher = (
            nn.Sequential(nn.Conv2d(3, 72, 3), nn.Conv2d(72, channels, 3)) for channels in (104, 1000)
        )

    def teach(self, x):
        with torch.no_grad():
            return self.teacher(x).mean()

    def forward(self, x):
        return self.student(x) - self.teach(x)


@pytest.mark.parametrize("end", [0.0, 1.0])
def test_a_network_that_only_runs_without_gradients_has_no_flops_to_save(end):
    policy = Policy(drop_rate=0.5, round_to="auto", schedule={"kind": "constant", "end": end, "clock": "manual"})
    model, x = ssprop_fx.transform(MeanTeacher(), policy), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        model(x)
    assert all(row.flops_dense for row in ssprop_fx.inspect(model).rows)  # nobody knows what will train
    for _ in range(2):
        model(x).square().mean().backward()
    told, measured = ssprop_fx.inspect(model), ssprop_fx.inspect(model, x)
    assert (told.flops_dense, told.flops_now) == (measured.flops_dense, measured.flops_now)
    for name in ("teacher.0", "teacher.1"):
        assert (told[name].reason, told[name].flops_dense) == ("no gradient is computed", 0)


def test_a_network_that_only_runs_without_gradients_leaves_the_counts_to_the_others():
    def counts(model, validated=False):
        model, x = ssprop_fx.transform(model, Policy(drop_rate=0.6, schedule={"kind": "constant"})), torch.randn(2, 3, 8, 8)
        if validated:
            with torch.no_grad():
                model(x)
        model(x).square().mean().backward()
        model.zero_grad()
        model(x).square().mean().backward()
        return {n: int((p.grad.flatten(1).abs().sum(1) > 0).sum()) for n, p in model.student.named_parameters() if p.dim() > 1}

    class Alone(MeanTeacher):
        def teach(self, x):
            return 0

    class Trained(MeanTeacher):
        def teach(self, x):
            return checkpoint(self.teacher, x.requires_grad_(), use_reentrant=self.reentrant).mean()

    alone = counts(Alone())
    assert counts(MeanTeacher()) == counts(MeanTeacher(), validated=True) == alone
    found = []
    for Trained.reentrant in (False, True):
        found += [counts(Trained()), counts(Trained(), validated=True)]
    assert all(each == found[0] for each in found)
    assert found[0] != alone


def test_a_network_that_begins_to_train_later_is_counted_then():
    model, x = ssprop_fx.transform(MeanTeacher(), Policy(drop_rate=0.6, schedule={"kind": "constant"})), torch.randn(2, 3, 8, 8)
    model(x).square().mean().backward()
    model.teacher(model.student[0].weight[:2, :, :].new_ones(2, 3, 8, 8)).mean().backward()
    assert {row.reason for row in ssprop_fx.inspect(model).rows} == {""}
    allocation = model.__dict__["_ssprop"].allocation
    assert allocation.plan(1.0).kept.keys() == {"student.0", "student.1", "teacher.0", "teacher.1"}


def test_a_model_whose_convolutions_are_all_frozen_has_no_flops_to_save():
    model = nn.Sequential(nn.Conv2d(3, 8, 3).requires_grad_(False), nn.Flatten(), nn.Linear(288, 2))
    report = ssprop_fx.inspect(ssprop_fx.transform(model, turns()), torch.randn(2, 3, 8, 8))
    assert "the measured step has no convolution's backward pass" in str(report)


@pytest.mark.parametrize("first", [True, False])
def test_no_copy_of_a_compiled_model_outlives_its_inspection(first):
    """A forward may keep models weakly, and its compiled code be guarded by them, as spikingjelly's is."""
    seen = weakref.WeakSet()

    @torch._dynamo.disable
    def note(module):
        seen.add(module)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)

        def forward(self, x):
            note(self.conv)
            return self.conv(x)

    torch._dynamo.reset()
    model = ssprop_fx.transform(Net(), turns()) if first else Net()
    compiled = torch.compile(model, backend="ssprop", options={"inner": "aot_eager"} | ({} if first else {"policy": turns()}))
    x = torch.randn(2, 3, 8, 8)
    compiled(x).sum().backward()
    gc.disable()
    try:
        assert ssprop_fx.inspect(compiled, x).coverage == 1
    finally:
        gc.enable()
    assert list(seen) == [model.conv]


def test_a_report_of_compiled_code_is_of_the_graph_and_the_sizes_of_the_step_that_ran_last():
    torch._dynamo.reset()
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3))
    policy = Policy(drop_rate=0.5, round_to=1, schedule={"kind": "constant"})
    compiled = torch.compile(model, backend="ssprop", options={"policy": policy, "inner": "aot_eager"})
    x = torch.randn(4, 3, 8, 8)

    def check(inputs, count=None):
        report = ssprop_fx.inspect(compiled, inputs)
        assert report.conv_flops["dense"] == report.measurement.conv_flops == 2 * report.conv_flops["now"]
        assert {row.output_shape[0] for row in report.rows} == {len(inputs)}
        return report.step_flops["now"] / len(inputs)

    compiled(x).sum().backward()
    alone = check(x)
    compiled(x[:2]).sum().backward()  # from here on, sizes may be symbols
    assert check(x[:3]) == check(x) == check(x[:2]) == alone
    compiled(x.clone().requires_grad_()).sum().backward()  # a graph with one gradient more
    assert ssprop_fx.inspect(compiled).rows[0].flops_dense == 2 * ssprop_fx.inspect(compiled, x).rows[0].flops_dense


def test_a_layer_that_no_gradient_reaches_counts_for_nothing():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.left, self.never = (nn.Conv2d(3, 4, 3) for _ in range(3))

        def forward(self, x):
            self.left(x)
            return self.used(x)

    policy = Policy(drop_rate=0.5, round_to=1, schedule={"kind": "constant"})
    report = ssprop_fx.inspect(ssprop_fx.transform(Net(), policy), torch.randn(2, 3, 8, 8))
    assert report.conv_flops["dense"] == report.measurement.conv_flops == 15552
    assert report.backward_flops == {"dense": 15552, "now": 7776, "mean": 7776.0}
    assert [row.reason for row in report.rows] == ["", "no backward pass in the measured step", "no call in the measured step"]


def test_a_part_of_a_transformed_model_is_named_as_such():
    model = ssprop_fx.transform(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), turns())
    for part in (model[0], nn.Sequential(*model.children()), torch.fx.symbolic_trace(model)):
        with pytest.raises(SSPropError, match="parts of a transformed model"):
            ssprop_fx.inspect(part)


def test_a_rule_for_a_call_that_no_forward_makes_is_named_once_a_step_has_run():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = (nn.Parameter(torch.randn(8, n, 3, 3)) for n in (3, 8))
            self.linear = nn.Linear(8, 8)

        def forward(self, x):
            return self.linear(F.conv2d(F.conv2d(x, self.first), self.second).mean((2, 3)))

    rules = [
        {"layers": "#conv2d.0", "drop_rate": 0.5},
        {"layers": "#conv2d.7", "drop_rate": 0},
        {"kind": "linear", "drop_rate": 0},
        {"layers": "#conv1d.*", "drop_rate": 0, "optional": True},
    ]
    model, x = ssprop_fx.transform(Functional(), Policy(rules=rules)), torch.randn(2, 3, 8, 8)
    before, after = ssprop_fx.inspect(model), ssprop_fx.inspect(model, x)
    assert before.unmatched == ()
    (text,) = after.unmatched
    assert text == "Policy(...): rules[1].layers: no layer of 3 is named '#conv2d.7'; nearest: #conv2d.1"
    assert f"without effect so far: {text}" in str(after)
    assert after.to_dict()["unmatched"] == [text]
    compiled = torch.compile(Functional(), backend="ssprop", options={"policy": Policy(rules=rules), "inner": "aot_eager"})
    compiled(x).sum().backward()
    assert ssprop_fx.inspect(compiled).unmatched == (text,)


FRONT_ENDS = {
    "transform": lambda model, policy: ssprop_fx.transform(model, policy),
    "backend": lambda model, policy: torch.compile(model, backend="ssprop", options={"policy": policy, "inner": "aot_eager"}),
    "both": lambda model, policy: torch.compile(
        ssprop_fx.transform(model, policy), backend="ssprop", options={"inner": "aot_eager"}
    ),
    "another backend": lambda model, policy: torch.compile(ssprop_fx.transform(model, policy), backend="aot_eager"),
}


@pytest.mark.parametrize("front_end", FRONT_ENDS)
@pytest.mark.parametrize("levels", [1, 2])
def test_calls_under_vmap_count_as_those_of_a_batch(front_end, levels):
    class Each(nn.Module):
        def __init__(self, levels):
            super().__init__()
            self.first, self.second, self.levels = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3), levels

        def forward(self, x):
            forward = lambda sample: self.second(self.first(sample).relu())  # noqa: E731
            for _ in range(self.levels):
                forward = torch.vmap(forward)
            return forward(x)

    def report(levels, x):
        torch._dynamo.reset()
        policy = Policy(drop_rate=0.6, round_to=1, schedule={"kind": "constant"})
        model = FRONT_ENDS[front_end](Each(levels), policy)
        model(x).square().sum().backward()
        return ssprop_fx.inspect(model, x)

    x = torch.randn(2, 2, 3, 10, 10)
    batch, each = report(0, x.flatten(0, 1)), report(levels, x if levels == 2 else x.flatten(0, 1))
    assert (each.measurement.dense, each.measurement.sparse, each.coverage) == (2, 2, 1.0)
    assert each.measurement.conv_flops == batch.measurement.conv_flops
    assert (each.conv_flops, each.grad_bytes) == (batch.conv_flops, batch.grad_bytes)
    assert each.conv_flops["now"] < each.conv_flops["dense"] / 2


@pytest.mark.parametrize("front_end", ["transform", "backend"])
def test_a_report_that_is_asked_for_in_inference_mode_measures_training(front_end):
    policy = Policy(drop_rate=0.5, schedule={"kind": "constant"})
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3))
    if front_end == "transform":
        model = ssprop_fx.transform(model, policy)
    else:
        torch._dynamo.reset()
        model = torch.compile(model, backend="ssprop", options={"policy": policy, "inner": "aot_eager"})
        model(torch.randn(2, 3, 8, 8)).sum().backward()
    before = ssprop_fx.inspect(model, torch.randn(2, 3, 8, 8)).measurement
    with torch.inference_mode():
        within = torch.randn(2, 3, 8, 8)
        assert ssprop_fx.inspect(model, within).measurement == before
    assert ssprop_fx.inspect(model, {"input": within}).measurement == before
    assert before.sparse == 2
