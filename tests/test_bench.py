"""The harness: what it compares, on a model small enough for exact expectations. No time is asserted."""

import json
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ssprop_fx import Policy, SSPropError, arms, bench, timing, transform
from ssprop_fx.bench_run import Run
from ssprop_fx.steps import scalar_loss
from ssprop_fx.timing import Spread, ratio, take_turns


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1),
    )  # fmt: skip


X = torch.randn(2, 3, 8, 8)


def test_take_turns_times_every_call_once_a_round_after_the_warm_up():
    ran = []
    calls = {name: lambda name=name: ran.append(name) for name in "abc"}
    times = take_turns(calls, rounds=4, warmup=2)
    assert {name: len(t) for name, t in times.items()} == {"a": 4, "b": 4, "c": 4}
    rounds = [ran[i : i + 3] for i in range(0, len(ran), 3)]
    assert len(rounds) == 6
    assert all(sorted(r) == ["a", "b", "c"] for r in rounds)
    assert len({tuple(r) for r in rounds}) > 1


def test_take_turns_stops_when_its_time_is_up_but_not_before_one_round():
    assert len(take_turns({"a": lambda: time.sleep(0.01)}, rounds=1000, seconds=0.0)["a"]) == 1


def test_ratio_is_the_median_of_the_rounds():
    assert ratio([1.0, 4.0, 3.0], [2.0, 2.0, 2.0]) == Spread(1.5, 1.0, 1.75)
    assert ratio([1.0], [2.0]) == Spread(0.5, 0.5, 0.5)


def test_take_turns_measures_what_it_is_told_to():
    seconds = take_turns({"a": lambda: 1.0, "b": lambda: 2.0}, rounds=2, figure=lambda call: call())
    assert seconds == {"a": [1.0, 1.0], "b": [2.0, 2.0]}


def test_queued_calls_are_waited_for_once(monkeypatch):
    done = []
    monkeypatch.setattr(timing, "synchronize", lambda: done.append("wait"))
    assert timing.timed(lambda: done.append("call"), repeats=3) > 0
    assert done == ["wait", "call", "call", "call", "wait"]


class Queue:
    """A stand-in for CUDA: what is launched takes its seconds later, and an event has the time of all that was launched before."""

    def __init__(self):
        self.seconds, self.log = 0.0, []

    def launch(self, seconds):
        self.seconds += seconds

    def event(self, enable_timing):
        made = SimpleNamespace(synchronize=lambda: self.log.append("wait"))
        made.record = lambda stream: (setattr(made, "at", self.seconds), self.log.append("mark"))
        made.elapsed_time = lambda end: 1e3 * (end.at - made.at)
        return made


@pytest.fixture
def queue(monkeypatch):
    made = Queue()
    monkeypatch.setattr(torch.cuda, "Event", made.event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "stream")
    return made


def test_on_cuda_events_time_a_step_and_the_host_waits_at_its_end_alone(queue, monkeypatch):
    run = Run("eager", net(), X, Policy(), scalar_loss, None)
    monkeypatch.setattr("ssprop_fx.bench_run.synchronize", lambda: queue.log.append("wait"))
    run.device = torch.device("cuda", 0)
    run.model.register_forward_hook(lambda *_: queue.launch(0.2))
    run.model[0].weight.register_hook(lambda grad: queue.launch(0.5))
    assert run.seconds() == pytest.approx(0.7)
    assert run.splits[-1] == (pytest.approx(0.2), pytest.approx(0.5))
    assert queue.log == ["wait", "mark", "mark", "mark", "wait"]
    assert all(parameter.grad is None for parameter in run.model.parameters())
    queue.log.clear()
    assert run.advance() == 1
    assert queue.log == []


@pytest.fixture
def tf32():
    """Matrix products in TF32, set in the new way: `allow_tf32` cannot be read from here on."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    yield
    torch.backends.cuda.matmul.fp32_precision = before


def test_the_setting_on_cuda(monkeypatch, tf32):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    found = timing.accelerator(torch.device("cuda"))
    assert (found["gpu"], found["cudnn_benchmark"], found["tf32"]["matmul"]) == ("NVIDIA H100", True, True)
    assert isinstance(found["tf32"]["cudnn"], bool)
    assert found["cudnn"] == torch.backends.cudnn.version()
    assert timing.accelerator(torch.device("cpu")) == {}
    assert bench.WARMUP["cuda"] >= 10


def test_the_table_tells_energy_and_every_option(monkeypatch, capsys, tmp_path):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    import table

    result = bench.bench(net(), X, Policy(round_to=1), ["transform"], rounds=2)
    options = {"model": "net", "arms": "transform", "contiguous": False, "memory": False, "profitable": "always"}
    result.setting |= options
    (tmp_path / "cpu.json").write_text(json.dumps(result.to_dict()))
    table.main([str(tmp_path / "cpu.json")])
    assert "joules" not in capsys.readouterr().out
    for arm, joules in (("eager", 4.0), ("transform", 3.0)):
        spread = Spread(joules, joules, joules)
        result.arms[arm] = replace(result.arms[arm], joules=spread, joules_ratio=Spread.of([joules / 4]))
    result.setting |= {"device": "cuda", "batch": 256, "amp": "bfloat16", "energy": True}
    (tmp_path / "cuda.json").write_text(json.dumps(result.to_dict()))
    table.main([str(tmp_path / "cuda.json")])
    out = capsys.readouterr().out
    assert "| joules a step | energy ratio (quartiles) |" in out
    assert "| 3 / 4 | 0.750 (0.750–0.750) |" in out
    assert "--batch 256 --amp bfloat16 --device cuda --energy`" in out


def test_eager_arms():
    said = []
    result = bench.bench(net(), X, Policy(round_to=1), ["transform"], rounds=3, memory=True, progress=said.append)
    assert list(result.arms) == ["eager", "transform"]
    eager, ours = result.arms["eager"], result.arms["transform"]
    assert eager.ratio == Spread(1.0, 1.0, 1.0)
    assert eager.ceiling is None
    assert ours.base == "eager"
    assert 0 < ours.ceiling < 1
    assert ours.captured == pytest.approx((1 - ours.ratio.median) / (1 - ours.ceiling))
    assert 0 < ours.peak_bytes <= 2 * eager.peak_bytes
    assert said[0] == "first step of eager"
    assert json.loads(json.dumps(result.to_dict()))["arms"]["transform"]["ratio"]["median"] == ours.ratio.median
    assert "transform" in str(result)


@pytest.mark.parametrize("inputs", [X, (X,), {"input": X}])
def test_inputs_of_every_form(inputs):
    assert bench.bench(net(), inputs, arms=["eager"], rounds=1).arms["eager"].step > 0


def test_freezing_leaves_at_most_the_policys_share():
    model = net()
    share = arms.freeze(model, lambda: model(X).square().mean(), Policy(drop_rate=0.4))
    assert 0 < share <= 0.6
    frozen = [not p.requires_grad for p in model.parameters()]
    assert frozen == sorted(frozen, reverse=True)
    assert any(frozen)


def test_the_masked_arm_computes_what_a_sparse_backward_does():
    policy = Policy(drop_rate=0.75, round_to=1, schedule={"kind": "constant", "end": 1.0})
    masked, sparse = arms.masked(net().double(), policy), transform(net().double(), policy)
    for model in (masked, sparse):
        model(X.double()).square().mean().backward()
    for a, b in zip(masked.parameters(), sparse.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-12)


def test_the_masked_arm_is_compiled_anew_where_the_dense_one_was_before():
    x = torch.randn(2, 3, 8, 8)
    torch._dynamo.reset()
    torch.compile(net(), backend="aot_eager")(x).square().mean().backward()
    masked = arms.masked(net(), Policy(drop_rate=0.75))
    torch.compile(masked, backend="aot_eager")(x).square().mean().backward()
    kept = [(p.grad.flatten(1) != 0).any(1).sum().item() for p in masked.parameters() if p.dim() > 1]
    assert kept == [max(len(p) // 4, 1) for p in masked.parameters() if p.dim() > 1]


def test_where_nothing_is_to_be_gained_nothing_is_captured():
    model, x = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3)), torch.randn(2, 3, 8, 8)
    result = bench.bench(model, x, Policy(drop_rate=0.0), ["eager", "transform"], rounds=1)
    assert (result.arms["transform"].ceiling, result.arms["transform"].captured) == (1, None)


def test_an_unknown_arm_is_named():
    with pytest.raises(SSPropError, match=r"'transfrom' is no arm.*nearest: transform"):
        bench.bench(net(), X, arms=["transfrom"])


def test_the_schedule_does_not_matter():
    policy = Policy(drop_rate=0.5, schedule={"kind": "bar", "period": 10, "warmup": 100, "clock": "manual"})
    assert bench.at_factor(policy, 1.0).factor == 1.0
    assert bench.at_factor(policy, 0.0).factor == 0.0
    assert bench.at_factor(policy, 1.0).drop_rate == 0.5


def test_the_arm_of_the_schedule_takes_dense_and_sparse_steps_by_turns():
    policy, seen = arms.Turns(net(), Policy(drop_rate=0.5)).policy, []
    turns = SimpleNamespace(policy=policy, model=lambda x: seen.append((x, policy.factor)))
    for step in range(4):
        arms.Turns.forward(turns, step)
    assert seen == [(0, 1), (1, 0), (2, 1), (3, 0)]
    assert arms.ARMS["schedule"].steps == 2


@pytest.mark.slow
def test_compiled_arms(tmp_path):
    torch._dynamo.reset()
    names = ["dense", "ssprop", "dense-phase", "schedule", "both", "masked", "frozen"]
    result = bench.bench(net(), X, Policy(round_to=1), names, rounds=2, memory=True)
    assert list(result.arms) == names
    assert [name for name, arm in result.arms.items() if arm.captured is not None] == ["ssprop", "both"]
    result.plot(tmp_path / "times.png")
    assert (tmp_path / "times.png").stat().st_size > 5000
