"""The compiled front end: one forward, one backward per phase, names as users know them, caches that never serve stale code."""

import copy
import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.utils import counters

import ssprop_fx
from ssprop_fx import Policy, PolicyError, SSPropError, TransformError
from ssprop_fx.records import records_of, state_of


class Block(nn.Module):
    def __init__(self, channels=16):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.bn = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, groups=2)

    def forward(self, x):
        return x + self.conv2(torch.relu(self.bn(self.conv1(x))))


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 16, 3), Block(), nn.ModuleList([Block()])[0], nn.Conv2d(16, 8, 1))


def bar(**changes):
    return Policy(**({"drop_rate": 0.75, "round_to": 1, "schedule": {"kind": "bar", "period": 2}} | changes))


def compiled(model, policy=None, backend="ssprop", **options):
    torch._dynamo.reset()
    given = {"inner": "aot_eager", **options} | ({"policy": policy} if policy is not None else {})
    return torch.compile(model, backend=backend, options=given if backend == "ssprop" else None)


def gradients(model, x):
    model.zero_grad()
    model(x).square().mean().backward()
    return [p.grad.clone() for p in model.parameters()]


IMAGES = torch.randn(2, 3, 10, 10, generator=torch.Generator().manual_seed(1))


def test_returning_to_a_phase_compiles_nothing():
    model, policy = net(), bar()
    run = compiled(model, policy)
    counters.clear()
    for expected in (1, 2, 2, 2, 2):  # dense, sparse, dense, sparse, dense
        gradients(run, IMAGES)
        ((_, record),) = records_of(model)
        assert record.forward_compiles == 1
        assert record.backward_compiles == expected
        policy.step()
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["recompile_limit"]


def test_continuous_schedules_compile_a_stated_number_of_backwards():
    model = net()
    policy = bar(schedule={"kind": "cosine", "period": 40, "levels": 3})
    run = compiled(model, policy)
    for _ in range(40):
        gradients(run, IMAGES)
        policy.step()
    ((_, record),) = records_of(model)
    assert record.backward_compiles == 3


@pytest.mark.parametrize("inner", ["aot_eager", "eager"])
def test_gradients_equal_those_of_transform(inner):
    model = net()
    policy, same = bar(), bar()
    run, transformed = compiled(model, policy, inner=inner), ssprop_fx.transform(model, same)
    for _ in range(2):
        for ours, theirs in zip(gradients(run, IMAGES), gradients(transformed, IMAGES), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
        policy.step()
        same.step()


def test_a_transformed_model_compiles_with_any_backend():
    model = net()
    policy = bar(schedule={"kind": "constant"})
    transformed = ssprop_fx.transform(model, policy)
    expected = gradients(transformed, IMAGES)
    assert int((expected[0].flatten(1).abs().sum(1) > 0).sum()) == 4
    for backend in ("ssprop", "aot_eager"):
        for ours, theirs in zip(gradients(compiled(transformed, backend=backend), IMAGES), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_layers_have_the_names_that_users_know():
    model = net()
    gradients(compiled(model, bar()), IMAGES)
    expected = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    assert [row.layer for row in ssprop_fx.inspect(model).rows] == expected


def test_a_module_that_runs_under_several_names_is_one_layer():
    class Part(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, padding=1)
            self.weight = nn.Parameter(torch.randn(4, 4, 1, 1))

        def forward(self, x):
            return self.conv(x) + F.conv2d(F.conv2d(x, self.weight), self.weight)

    class Held(nn.Module):
        def __init__(self, part):
            super().__init__()
            self.again, self.own = part, nn.Conv2d(4, 4, 1)

        def forward(self, x):
            return self.own(self.again(x).tanh())

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.part = Part()
            self.blocks = nn.ModuleList(Held(self.part) for _ in range(2))

        def forward(self, x):
            for block in self.blocks:
                x = block(x)
            return self.part(self.part(x).tanh())

    torch.manual_seed(0)
    model, x = Model(), torch.randn(2, 4, 6, 6)
    rules = [{"layers": "part.conv", "drop_rate": 0.5}, {"layers": "part#conv2d.1", "drop_rate": 0}]
    policies = [bar(schedule={"kind": "constant"}, rules=rules) for _ in range(2)]
    transformed = ssprop_fx.transform(model, policies[0])
    expected, report = gradients(transformed, x), ssprop_fx.inspect(transformed, x)
    assert {row.layer: row.calls for row in report.rows} == {
        "part.conv": 4,
        "part#conv2d.0": 4,
        "part#conv2d.1": 4,
        "blocks.0.own": 1,
        "blocks.1.own": 1,
    }
    run = compiled(model, policies[1])
    ours, found = gradients(run, x), ssprop_fx.inspect(run)
    assert {row.layer: (row.calls, row.kept) for row in found.rows} == {r.layer: (r.calls, r.kept) for r in report.rows}
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_a_graph_that_pytorch_gives_up_is_not_reported_as_rewritten():
    @torch.library.custom_op("ssprop_test::clipped", mutates_args=())
    def clipped(x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    clipped.register_fake(torch.empty_like)
    clipped.register_autograd(lambda ctx, grad: grad / grad.norm().item())  # cannot be traced

    class Clipped(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)

        def forward(self, x):
            return self.second(clipped(self.first(x)))

    model, policy = Clipped(), bar(schedule={"kind": "constant"})
    run = compiled(model, policy)
    with pytest.warns(UserWarning, match=r"first, second did not compile \(DataDependentOutputException"):
        got = gradients(run, IMAGES)
    assert all(torch.equal(a, b) for a, b in zip(got, gradients(model, IMAGES), strict=True))
    for inputs in ([], [IMAGES]):
        with pytest.raises(SSPropError, match="Dynamo gave the model up, and then all of it trains dense"):
            ssprop_fx.inspect(run, *inputs)
    assert not state_of(policy).records


def test_names_and_gradients_survive_a_graph_break():
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Inner()

        def forward(self, x):
            return self.inner(x)

    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3)

        def forward(self, x):
            x = torch.relu(self.first(x))
            torch._dynamo.graph_break()
            return self.second(x)

    torch.manual_seed(0)
    model, policy = Broken(), bar(schedule={"kind": "constant"})
    run = compiled(model, policy)
    ours = gradients(run, IMAGES)
    report = ssprop_fx.inspect(run)
    assert {row.layer for row in report.rows if row.rewritten} == {"inner.first", "inner.second"}
    expected = gradients(ssprop_fx.transform(model, bar(schedule={"kind": "constant"})), IMAGES)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_inference_runs_the_forward_alone():
    model = net().eval()
    run = compiled(model, bar())
    with torch.no_grad():
        assert torch.equal(run(IMAGES), model(IMAGES))


def test_double_backward_is_refused_clearly():
    run = compiled(net(), bar(schedule={"kind": "constant"}))
    x = IMAGES.clone().requires_grad_()
    (grad,) = torch.autograd.grad(run(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        grad.square().sum().backward()


def test_an_unknown_inner_is_refused():
    with pytest.raises(Exception, match=r"inner='inducto' is not known.*inductor") as error:
        gradients(compiled(net(), bar(), inner="inducto"), IMAGES)
    assert isinstance(error.value.__cause__ or error.value.inner_exception, SSPropError)


def test_a_rule_that_matches_nothing_is_refused():
    policy = bar(rules=[{"layers": "conv9", "drop_rate": 0.5}])
    with pytest.raises(Exception, match="conv9") as error:
        gradients(compiled(net(), policy), IMAGES)
    assert isinstance(error.value.inner_exception, PolicyError)


def test_a_model_without_convolutions_is_refused():
    with pytest.raises(Exception, match="no convolution") as error:
        gradients(compiled(nn.Sequential(nn.Linear(10, 10)), bar()), IMAGES)
    assert isinstance(error.value.inner_exception, TransformError)


def test_a_second_policy_for_a_transformed_model_is_refused():
    transformed = ssprop_fx.transform(net(), bar())
    with pytest.raises(Exception, match="transformed under one policy and is compiled with another"):
        gradients(compiled(transformed, bar()), IMAGES)


@pytest.mark.parametrize("schedule", ["{kind: bar}", "{kind: constant, warmup: 100}"])
def test_a_policy_that_nobody_could_step_is_refused(tmp_path, schedule):
    file = tmp_path / "policy.yaml"
    file.write_text(f"drop_rate: 0.5\nschedule: {schedule}\n")
    with pytest.raises(Exception, match=r"policy\.step\(\)"):
        gradients(compiled(net(), str(file)), IMAGES)


def test_the_default_policy_runs_on_the_optimizers_clock():
    model = net()
    run = compiled(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    kept = []
    for _ in range(4):
        weight_gradient = gradients(run, IMAGES)[0]
        kept.append(int((weight_gradient.flatten(1).abs().sum(1) > 0).sum()))
        optimizer.step()
    # the clock is the process's and may stand at either phase, dense or sparse
    assert max(kept) == 16
    assert kept[:2] == kept[2:]
    assert min(kept) < 8


_CACHE_SCRIPT = textwrap.dedent(
    """
    import json, sys, torch, ssprop_fx
    from ssprop_fx import Policy
    from torch._dynamo.utils import counters
    from test_backend import net, IMAGES, gradients

    rate = float(sys.argv[1])
    model = net()
    constant = {"drop_rate": rate, "round_to": 1, "schedule": {"kind": "constant"}}
    if rate < 0:
        expected, run = gradients(model, IMAGES), torch.compile(model)
    else:
        expected = gradients(ssprop_fx.transform(model, Policy(**constant)), IMAGES)
        run = torch.compile(model, backend="ssprop", options={"policy": Policy(**constant)})
    got = gradients(run, IMAGES)
    largest = max(float(b.abs().max()) for b in expected)  # a bias before a batch norm has a gradient of pure rounding
    error = max(float((a - b).abs().max()) for a, b in zip(got, expected)) / largest
    hits = counters["inductor"]["fxgraph_cache_hit"]
    kept = int((got[0].flatten(1).abs().sum(1) > 0).sum())
    whole = counters["aot_autograd"]["autograd_cache_hit"]
    print(json.dumps({"error": error, "kept": kept, "hits": hits, "whole": whole}))
    """
)


@pytest.mark.slow
def test_a_warm_cache_is_never_stale(tmp_path):
    """Plain Inductor, then two policies, then the first again, each in a process of its own, one cache between them."""
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.path.dirname(__file__)}
    results = []
    for rate in ("-1", "0.75", "0.5", "0.75", "-1"):
        run = subprocess.run(
            [sys.executable, "-c", _CACHE_SCRIPT, rate], env=environment, capture_output=True, text=True, check=False
        )
        assert run.returncode == 0, run.stderr[-2000:]
        results.append(json.loads(run.stdout.splitlines()[-1]))
    assert [r["kept"] for r in results] == [16, 4, 8, 4, 16]
    assert all(r["error"] < 1e-4 for r in results), results
    assert results[1]["hits"] == 1  # the forward is plain Inductor's, and the sparse backward is new
    assert results[3]["hits"] == 2  # the same policy again: nothing to compile
    assert [r["whole"] for r in results] == [0, 0, 0, 1, 1]  # nor to trace


@pytest.mark.slow
@pytest.mark.parametrize(("name", "options"), [("resnet18", {}), ("mobilenet_v2", {"dropout": 0.0})])
def test_inductor_compiles_one_forward_and_two_backwards(name, options):
    models = pytest.importorskip("torchvision").models
    torch.manual_seed(0)
    model, policy = models.get_model(name, weights=None, **options), bar(drop_rate=0.8)
    torch._dynamo.reset()
    run = torch.compile(model, backend="ssprop", options={"policy": policy})
    plain = torch.compile(model)
    images = torch.randn(2, 3, 64, 64)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    ours, eager = [], ssprop_fx.transform(model, same := bar(drop_rate=0.8))
    for step in range(4):
        model.load_state_dict(state)
        ours.append(gradients(run, images))
        model.load_state_dict(state)
        expected = gradients(plain if step % 2 == 0 else eager, images)
        for a, b in zip(ours[-1], expected, strict=True):
            if step % 2 == 0:
                assert torch.equal(a, b)  # the dense phase is plain Inductor's backward, bit for bit
            else:
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
        policy.step()
        same.step()
    ((_, record),) = records_of(model)
    assert (record.forward_compiles, record.backward_compiles) == (1, 2)
    report = ssprop_fx.inspect(run)
    assert report.coverage == 1
    assert len(report.rows) == sum(isinstance(m, torch.nn.Conv2d) for m in model.modules())
    with torch.no_grad():
        model.eval()
        assert torch.equal(run(images), plain(images))


def test_equal_layers_are_rounded_alike_in_both_front_ends():
    """Which of them gets more channels is for the order to say, and it is that of the forward in both."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(*(torch.nn.Conv2d(96, 96, 3, padding=1) for _ in range(5)))
    policy = {"drop_rate": 0.8, "schedule": {"kind": "constant"}}
    eager = ssprop_fx.transform(copy.deepcopy(net), policy)
    torch._dynamo.reset()
    run = torch.compile(net, backend="ssprop", options={"policy": policy, "inner": "aot_eager"})
    images = torch.randn(1, 96, 6, 6)
    kept = []
    for model, step in ((eager, eager), (net, run)):
        step(images).square().sum().backward()
        kept.append([int((p.grad.flatten(1) != 0).any(1).sum()) for p in model.parameters() if p.dim() == 4])
    assert kept[0] == kept[1]
    assert len(set(kept[0])) > 1
