"""Compiled code that runs for several modules: by the rule of each, or refused; never by another module's rule."""

import copy
import dataclasses
import functools
import gc
import json
import weakref
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from ssprop_fx.passes._graphs import graphs_within
from ssprop_fx.passes.lower_backward import backward_nodes
from torch import nn

import ssprop_fx
from ssprop_fx import Policy, SSPropError, ops
from ssprop_fx.records import records_of, state_of
from ssprop_fx.shared_code import Anchor

OPTIONS = {"inner": "aot_eager"}
X = torch.randn(2, 8, 6, 6, generator=torch.Generator().manual_seed(0))
OTHER_RULE = [{"layers": "blocks.1*", "drop_rate": 0.75}]
REMEDY = r"blocks\.0.conv.*blocks\.1.conv.*0.5 by default, 0.75 by.*ssprop_fx.transform"


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        return self.conv(x).relu()


class Standardized(Block):
    def forward(self, x):
        return F.conv2d(x, self.conv.weight - self.conv.weight.mean(), padding=1).relu()


class Net(nn.Module):
    def __init__(self, block=Block):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.blocks = nn.Conv2d(8, 8, 1), nn.ModuleList(block() for _ in range(3))

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = self.run(block, x)
        return x

    def run(self, block, x):
        return block(x)


@torch.compiler.nested_compile_region
def region(block, x):
    return block(x)


class Regions(Net):
    def run(self, block, x):
        return region(block, x)


def policy(**changes):
    return Policy(**({"drop_rate": 0.5, "round_to": 1, "schedule": {"kind": "constant"}} | changes))


def zero_rows(model):
    """Output channels of the blocks' convolutions without a gradient, after a step."""
    model.zero_grad()
    model(X).square().sum().backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.dim() == 4}
    return [int((grad.flatten(1).abs().sum(1) == 0).sum()) for n, grad in grads.items() if "blocks" in n]


def compile_blocks(model, **options):
    for block in model.blocks:
        block.compile(backend="ssprop", options=OPTIONS | options)
    return model


@pytest.mark.parametrize(("block", "call"), [(Block, ".conv"), (Standardized, "#conv2d.0")], ids=["module", "functional"])
def test_blocks_compiled_one_by_one_have_their_own_names_in_the_report(block, call):
    model = compile_blocks(Net(block), policy=policy())
    model(X).sum().backward()
    assert sum(len(record.decisions) for _, record in records_of(model)) == 1, "the blocks were to share code"
    report = ssprop_fx.inspect(model, X)
    blocks = [f"blocks.{i}{call}" for i in range(3)]
    assert [row.layer for row in report.rows if row.rewritten] == blocks
    assert report.measurement.calls == dict.fromkeys(blocks, 1)
    assert report.measurement.missed.keys() == {"stem"}
    left = {row.layer: row.reason for row in report.rows if not row.rewritten}
    assert "no captured graph" in left.pop("stem")
    assert set(left.values()) <= {"no backward pass in the measured step"}


def test_blocks_compiled_one_by_one_are_all_sparse():
    assert zero_rows(compile_blocks(Net(), policy=policy())) == [4, 4, 4]


@pytest.mark.parametrize("block", [Block, Standardized])
def test_blocks_under_different_rules_are_refused_with_the_remedy(block):
    model = compile_blocks(Net(block), policy=policy(rules=OTHER_RULE))
    for _ in range(2):  # not only at first
        with pytest.raises(SSPropError, match=REMEDY):
            model(X)


def test_a_block_that_a_rule_keeps_dense_is_refused_too():
    model = compile_blocks(Net(), policy=policy(rules=[{"layers": "blocks.0.*", "drop_rate": 0}]))
    with pytest.raises(SSPropError, match=r"blocks\.0\.conv.*blocks\.1\.conv"):
        model(X)


def test_the_remedy_works():
    assert zero_rows(compile_blocks(ssprop_fx.transform(Net(), policy(rules=OTHER_RULE)))) == [4, 6, 4]


def test_nested_regions_under_one_rule_share_a_graph():
    model = Regions()
    compiled = torch.compile(model, backend="ssprop", options=OPTIONS | {"policy": policy()})
    assert zero_rows(compiled) == [4, 4, 4]
    report = ssprop_fx.inspect(compiled, X)
    assert {row.layer for row in report.rows if row.rewritten} == {"stem", *(f"blocks.{i}.conv" for i in range(3))}
    assert report.coverage == 1.0


def test_nested_regions_under_different_rules_are_refused_and_the_remedy_works():
    compiled = torch.compile(Regions(), backend="ssprop", options=OPTIONS | {"policy": policy(rules=OTHER_RULE)})
    with pytest.raises(Exception, match=REMEDY) as error:
        compiled(X)
    assert isinstance(error.value.inner_exception, SSPropError)
    torch._dynamo.reset()
    transformed = ssprop_fx.transform(Regions(), policy(rules=OTHER_RULE))
    assert zero_rows(torch.compile(transformed, backend="ssprop", options=OPTIONS)) == [4, 6, 4]


@pytest.mark.parametrize("inner", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_nested_regions_are_lowered_planned_and_reported_as_if_they_were_not_nested(inner):
    class Deep(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.out = nn.Conv2d(8, 40, 3, padding=1), nn.GroupNorm(4, 40), nn.Conv2d(40, 8, 1)

        def forward(self, x):
            return self.out(self.norm(self.conv(x)).relu()) + x

    nested, flat = Regions(Deep).double(), Net(Deep).double()
    flat.load_state_dict(nested.state_dict())
    gradients, reports = [], []
    for model in (nested, flat):
        options = {"policy": policy(round_to="auto", drop_rate=0.6), "inner": inner}
        compiled = torch.compile(model, backend="ssprop", options=options)
        compiled(X.double()).square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
        reports.append(ssprop_fx.inspect(compiled, X.double()))
        for _, record in records_of(model):
            assert not [name for graph in record.lowered.values() for name in backward_nodes(graph)]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9)
    assert reports[0].coverage == 1.0
    assert len(reports[0].rows) == 7
    for mine, expected in zip(reports[0].rows, reports[1].rows, strict=True):
        assert dataclasses.replace(mine, rung=expected.rung) == expected


def test_a_region_that_one_module_runs_twice_is_two_calls():
    class Twice(Regions):
        def forward(self, x):
            return self.run(self.blocks[0], self.run(self.blocks[0], self.stem(x)))

    model = Twice()
    compiled = torch.compile(model, backend="ssprop", options=OPTIONS | {"policy": policy()})
    compiled(X).square().sum().backward()
    row = next(row for row in ssprop_fx.inspect(compiled, X).rows if row.layer == "blocks.0.conv")
    assert (row.calls, row.flops_dense) == (2, 2 * 2 * (2 * 2 * 36 * 8 * 8 * 9))
    assert ssprop_fx.inspect(compiled, X).measurement.calls["blocks.0.conv"] == 2


class Branches(Net):
    """``torch.cond`` between one block and another that is run with a factor."""

    def forward(self, x):
        x = self.stem(x)
        return torch.cond(x.sum() > 0, lambda v: self.blocks[0](v), lambda v: 2 * self.blocks[1](v), (x,))


@pytest.mark.parametrize("sign", [1, -1])
def test_the_branches_of_a_condition_follow_the_policy_and_the_report_says_so(sign):
    model = Branches()
    with torch.no_grad():
        model.stem.bias.fill_(10.0 * sign)
    compiled = torch.compile(model, backend="ssprop", options=OPTIONS | {"policy": policy()})
    compiled(X).square().sum().backward()
    taken = 0 if sign > 0 else 1
    rows = [int((b.conv.weight.grad.flatten(1).abs().sum(1) == 0).sum()) for b in model.blocks[:2]]
    assert rows == [4, 8] if taken == 0 else [8, 4]
    for row in ssprop_fx.inspect(compiled).rows:
        if row.layer.startswith(("blocks.0", "blocks.1")):
            assert (row.kept, row.total, row.reason, row.flops_now) == (4, 8, "", row.flops_dense // 2)


def test_a_model_that_is_gone_leaves_no_weights_behind():
    def train(chosen):
        model = Net()
        torch.compile(model, backend="ssprop", options=OPTIONS | {"policy": chosen})(X).sum().backward()
        return weakref.ref(model.stem.weight)

    kept = policy()
    weights = [train(kept), train(policy())]
    torch._dynamo.reset()
    train(kept)
    torch._dynamo.reset()
    gc.collect()
    assert [ref() for ref in weights] == [None, None]
    assert len(state_of(kept).records) == 1


def train(model, options, steps=1):
    """Kept channels of the stem in each step."""
    compiled = torch.compile(model, backend="ssprop", options=OPTIONS | options)
    optimizer, kept = torch.optim.SGD(model.parameters(), lr=1e-3), []
    for _ in range(steps):
        optimizer.zero_grad()
        compiled(X).square().sum().backward()
        kept.append(int((model.stem.weight.grad.flatten(1).abs().sum(1) > 0).sum()))
        optimizer.step()
    return kept


def write(path, rate, **schedule):
    path.write_text(
        json.dumps({"drop_rate": rate, "round_to": 1, "schedule": {"kind": "constant", "clock": "optimizer"} | schedule})
    )


@pytest.mark.parametrize("form", ["path", "mapping"])
def test_each_model_has_a_clock_of_its_own_though_the_code_is_one(form, tmp_path):
    write(tmp_path / "policy.yaml", 0.5, warmup=1, cooldown=2, total=5)
    given = str(tmp_path / "policy.yaml") if form == "path" else json.loads((tmp_path / "policy.yaml").read_text())
    models = [Net() for _ in range(3)]
    assert [train(model, {"policy": given}, 5) for model in models] == [[8, 4, 4, 8, 8]] * 3
    policies = [ssprop_fx.inspect(model).policy for model in models]
    assert len({id(p) for p in policies}) == 3
    assert [p.steps for p in policies] == [15, 10, 5]  # every optimizer's steps count
    assert len({id(record) for model in models for record in records_of(model)}) < len(models)
    assert all(ssprop_fx.inspect(model).at(1)["stem"].kept == 4 for model in models)


def test_models_in_turn_each_follow_their_own_clock():
    given = {"drop_rate": 0.5, "round_to": 1, "schedule": {"kind": "constant", "warmup": 2, "clock": "optimizer"}}
    first, second = Net(), Net()
    assert train(first, {"policy": given}, 2) == [8, 8]
    assert train(second, {"policy": given}) == [8]
    assert train(first, {"policy": given}) == [4]
    assert train(second, {"policy": given}) == [4]  # both optimizers have stepped


def test_a_file_that_changed_is_not_followed_in_silence(tmp_path):
    path = tmp_path / "policy.yaml"
    write(path, 0.5)
    model, given = Net(), {"policy": str(path)}
    assert train(model, given) == [4]
    write(path, 0.75)
    assert train(model, given) == [4]  # as it was read for the model
    with pytest.raises(SSPropError, match=r"policy.yaml' in torch.compile's options says something else.*torch.compiler.reset"):
        train(Net(), given)
    torch.compiler.reset()
    assert train(Net(), given) == [2]
    assert train(model, given) == [2]
    assert ssprop_fx.inspect(model)["stem"].drop_rate == 0.75


def test_a_mapping_that_changed_is_not_followed_in_silence():
    given = {"drop_rate": 0.5, "round_to": 1, "schedule": {"kind": "constant"}}
    assert train(Net(), {"policy": given}) == [4]
    given["drop_rate"] = 0.75
    with pytest.raises(SSPropError, match=r"the mapping in torch.compile's options says something else"):
        train(Net(), {"policy": given})
    torch.compiler.reset()
    assert train(Net(), {"policy": given}) == [2]


def test_a_reset_keeps_the_clock_of_a_model_whose_file_says_the_same(tmp_path):
    path = tmp_path / "policy.yaml"
    write(path, 0.5, warmup=2)
    model, given = Net(), {"policy": path}
    assert train(model, given, 3) == [8, 8, 4]
    torch.compiler.reset()
    assert train(model, given) == [4]


def test_the_last_compile_that_pytorch_makes_of_code_is_told():
    with torch._dynamo.config.patch(recompile_limit=2):
        train(Net(), {"policy": policy()})
        with pytest.warns(UserWarning, match=r"trains dense.*torch.compiler.reset\(\) before each"):
            train(Net(), {"policy": policy()})


def test_a_module_that_was_renamed_or_moved_is_known_by_its_new_name():
    class Renamed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Conv2d(8, 8, 3)

        def forward(self, x):
            return (self.first if hasattr(self, "first") else self.second)(x)

    model = Renamed()
    compile_ = functools.partial(torch.compile, backend="ssprop")
    compile_(model, options=OPTIONS | {"policy": policy()})(X).sum().backward()
    torch._dynamo.reset()
    model.second = model.first
    del model.first
    chosen = policy(rules=[{"layers": "second", "drop_rate": 0.25}])
    compile_(model, options=OPTIONS | {"policy": chosen})(X).sum().backward()
    assert chosen.drop_rates() == {"second": 0.25}
    torch._dynamo.reset()
    chosen = policy(rules=[{"layers": "body.*", "drop_rate": 0.75}])
    outer = nn.Sequential(OrderedDict(body=model, head=nn.Conv2d(8, 8, 1)))
    compile_(outer, options=OPTIONS | {"policy": chosen})(X).sum().backward()
    assert chosen.drop_rates() == {"body.second": 0.75, "head": 0.5}


def test_a_forward_may_call_its_module_what_it_likes():
    class Own(nn.Module):
        def __init__(this):
            super().__init__()
            this.weight = nn.Parameter(torch.randn(8, 8, 3, 3))

        def forward(this, x):
            return F.conv2d(x, this.weight)

    compiled = torch.compile(Own(), backend="ssprop", options=OPTIONS | {"policy": policy()})
    compiled(X).sum().backward()
    assert [row.layer for row in ssprop_fx.inspect(compiled).rows] == ["#conv2d.0"]
    torch._dynamo.reset()
    with pytest.raises(Exception, match="no layer"):
        torch.compile(Own(), backend="ssprop", options=OPTIONS | {"policy": policy(rules=[{"layers": "x.*", "drop_rate": 0}])})(
            X
        )


def test_inspection_of_compiled_code_leaves_its_modules_attributes_alone():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.steps, self.state = nn.Conv2d(8, 8, 1), 0, None

        def forward(self, x):
            self.steps += 1
            self.state = self.conv(x) if self.state is None else self.conv(x) + self.state
            return self.state

    model = Counting()
    compiled = torch.compile(model, backend="ssprop", options=OPTIONS | {"policy": policy()})
    compiled(X).sum().backward()
    model.state, state = None, None
    assert ssprop_fx.inspect(compiled, X).coverage == 1.0
    assert (model.steps, model.state) == (1, state)


def test_a_tensor_that_has_another_ones_identity_is_not_taken_for_it():
    gone, present = torch.ones(1), torch.ones(1)
    anchor = Anchor(0, "", "weight", [], False, {id(present): weakref.ref(gone), id(gone): weakref.ref(gone)})
    assert anchor.serves(gone)
    assert not anchor.serves(present)


def test_what_dynamo_captured_stays_as_it_was_inside_of_regions_too():
    model = Regions()
    torch.compile(model, backend="ssprop", options=OPTIONS | {"policy": policy()})(X).sum().backward()
    ((_, record),) = records_of(model)
    captured, rewritten = (graphs_within(graph).values() for graph in (record.captured, record.rewritten))
    assert [times for _, times in captured] == [times for _, times in rewritten] == [1, 3]
    for (before, _), (after, _) in zip(captured, rewritten, strict=True):
        assert not before.graph.find_nodes(op="call_function", target=ops.conv)
        assert len(after.graph.find_nodes(op="call_function", target=ops.conv)) == 1


def function(**options):
    return torch.compile(lambda model, x: model(x), backend="ssprop", options=OPTIONS | options)


def test_one_compiled_function_serves_instances_and_copies_and_each_is_found():
    run = function(policy=policy(rules=OTHER_RULE))
    first, second = Net(), Net()
    models = [first, second, copy.deepcopy(first)]
    for model in models:
        run(model, X).square().sum().backward()
        counts = [int((b.conv.weight.grad.flatten(1).abs().sum(1) == 0).sum()) for b in model.blocks]
        assert counts == [4, 6, 4]
        assert {row.layer for row in ssprop_fx.inspect(model).rows if row.rewritten} == {"stem"} | {
            f"blocks.{i}.conv" for i in range(3)
        }
    assert len({record.number for model in models for _, record in records_of(model)}) == 1, "they were to share code"


def test_another_models_block_is_known_by_its_name_there():
    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = Block()

    model, other = Net(), Other()
    rules = [{"layers": "body.conv", "drop_rate": 0.25, "optional": True}]
    run = function(policy=policy(rules=rules))
    run(model.blocks[0], X)
    with pytest.raises(SSPropError, match=r"blocks\.0\.conv.*body\.conv.*0\.25 by rules\[0\]"):
        run(other.body, X)


def test_instances_transformed_under_two_policies_keep_to_their_own():
    run = function()
    for rate, rows in ((0.5, 4), (0.75, 6), (0.25, 2)):
        model = ssprop_fx.transform(Net(), policy(drop_rate=rate))
        run(model, X).square().sum().backward()
        assert int((model.stem.weight.grad.flatten(1).abs().sum(1) == 0).sum()) == rows


def test_tensors_in_the_place_of_parameters_are_no_other_module():
    model = Net()
    run = torch.compile(
        lambda tensors, x: torch.func.functional_call(model, tensors, x),
        backend="ssprop",
        options=OPTIONS | {"policy": policy(rules=OTHER_RULE)},
    )
    for scale in (1.0, 2.0):
        tensors = {n: (p.detach() * scale).requires_grad_() for n, p in model.named_parameters()}
        run(tensors, X).square().sum().backward()
        grads = [tensors[f"blocks.{i}.conv.weight"].grad for i in range(3)]
        assert [int((g.flatten(1).abs().sum(1) == 0).sum()) for g in grads] == [4, 6, 4]


def encoder():
    return nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def test_models_of_one_function_need_no_convolution_each():
    body, head = encoder(), nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
    run = torch.compile(lambda x: head(body(x)), backend="ssprop", options=OPTIONS | {"policy": policy()})
    run(X).square().sum().backward()
    assert int((body[0].weight.grad.flatten(1).abs().sum(1) == 0).sum()) == 4
    assert [row.layer for row in ssprop_fx.inspect(body).rows if row.rewritten] == ["0"]


def test_a_graph_of_a_part_without_convolutions_is_left_alone():
    body, head = encoder(), nn.Sequential(nn.Linear(8, 4), nn.ReLU())

    def loss(x):
        x = body(x)
        torch._dynamo.graph_break()
        return head(x)

    torch.compile(loss, backend="ssprop", options=OPTIONS | {"policy": policy()})(X).square().sum().backward()
    assert int((body[0].weight.grad.flatten(1).abs().sum(1) == 0).sum()) == 4


def test_a_rule_is_for_one_of_the_models_of_a_function():
    student, teacher = (nn.Sequential(OrderedDict({name: encoder()})) for name in ("student", "teacher"))

    def run(*names):
        rules = [{"layers": f"{name}.*", "drop_rate": rate} for name, rate in zip(names, (0.75, 0.25), strict=True)]
        options = OPTIONS | {"policy": policy(rules=rules)}
        torch.compile(lambda x: student(x) - teacher(x), backend="ssprop", options=options)(X).square().sum().backward()
        return [int((m[0][0].weight.grad.flatten(1).abs().sum(1) == 0).sum()) for m in (student, teacher)]

    assert run("student", "teacher") == [6, 2]
    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"rules\[0\].*studnt") as error:
        run("studnt", "teacher")
    assert "rules[1]" not in str(error.value)


@pytest.mark.parametrize("order", [slice(None), slice(None, None, -1)], ids=["first", "last"])
def test_a_part_of_two_models_is_named_as_in_the_one_that_runs(order):
    class Around(nn.Module):
        def __init__(self, **parts):
            super().__init__()
            for name, part in parts.items():
                setattr(self, name, part)

        def forward(self, x):
            for part in self.children():
                x = part(x)
            return x

    body = encoder()
    models = [Around(**{first: nn.Conv2d(8, 8, 1), second: body}) for first, second in (("mask", "seg"), ("head", "det"))]
    for model in models[order]:
        first, second = (name for name, _ in model.named_children())
        rules = [{"layers": first, "drop_rate": 0.0}, {"layers": f"{second}.0", "drop_rate": 0.75}]
        torch.compile(model, backend="ssprop", options=OPTIONS | {"policy": policy(rules=rules)})(X).square().sum().backward()
        assert {row.layer: row.drop_rate for row in ssprop_fx.inspect(model).rows} == {first: 0.0, f"{second}.0": 0.75}


def test_a_relative_path_is_that_of_the_first_step(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "policy.yaml").write_text("drop_rate: 0.5\nschedule: {kind: constant}\n")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/policy.yaml").write_text("drop_rate: 0.75\nschedule: {kind: constant}\n")
    model = encoder()
    run = torch.compile(model, backend="ssprop", options=OPTIONS | {"policy": "policy.yaml"}, dynamic=False)
    for batch in (X, X[:1]):
        model.zero_grad()
        run(batch).square().sum().backward()
        assert int((model[0].weight.grad.flatten(1).abs().sum(1) == 0).sum()) == 4
        monkeypatch.chdir(tmp_path / "run")


def test_a_mapping_is_that_of_the_first_step():
    given = {"drop_rate": 0.5, "schedule": {"kind": "constant"}}
    model = encoder()
    run = torch.compile(model, backend="ssprop", options=OPTIONS | {"policy": given}, dynamic=False)
    for batch in (X, X[:1]):
        model.zero_grad()
        run(batch).square().sum().backward()
        assert int((model[0].weight.grad.flatten(1).abs().sum(1) == 0).sum()) == 4
        given["drop_rate"] = 0.75
