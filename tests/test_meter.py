"""The meter: wall time, backward FLOPs equal to PyTorch's count, joules from the machine's counters or a plain reason."""

import json
import sys
import time
import types

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import ssprop_fx
from ssprop_fx import Meter, Policy, SSPropError, energy
from ssprop_fx.meter import tensorboard


class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.Flatten(), nn.Linear(32 * 16, 5))


@pytest.fixture(autouse=True)
def no_zones(tmp_path, monkeypatch):
    """Whatever this machine has, there are no zones but those that a test makes."""
    monkeypatch.setattr(energy, "POWERCAP", tmp_path)
    return tmp_path


def zone(root, name, joules, span=1000):
    (root / name).mkdir(exist_ok=True)
    (root / name / "energy_uj").write_text(f"{int(joules * 1e6)}\n")
    (root / name / "max_energy_range_uj").write_text(f"{int(span * 1e6)}\n")


def counted_backward_flops(model, x):
    with FlopCounterMode(display=False) as counter:
        loss = model(x).square().mean()
        forward = counter.get_total_flops()
        loss.backward()
    return counter.get_total_flops() - forward


@pytest.mark.parametrize("front_end", ["transform", "backend"])
def test_backward_flops_follow_the_schedule(front_end):
    torch._dynamo.reset()
    policy, x, net = Policy(drop_rate=0.5, schedule={"kind": "bar", "period": 2}), torch.randn(2, 3, 8, 8), Net()
    eager = ssprop_fx.transform(net, policy)
    model = eager
    if front_end == "backend":
        model = torch.compile(net, backend="ssprop", options={"policy": policy, "inner": "aot_eager"})
    with Meter(model, x) as meter:
        pass
    meter.readings.clear()
    expected = []
    for _ in range(4):
        expected.append(counted_backward_flops(eager, x))
        with meter:
            model(x).square().mean().backward()
        policy.step()
    assert [r.factor for r in meter.readings] == [0, 1, 0, 1]
    assert [r.backward_flops for r in meter.readings] == pytest.approx(expected, rel=1e-3)
    assert meter.backward_flops == pytest.approx(sum(expected), rel=1e-3)
    assert expected[1] < 0.6 * expected[0]


def test_an_ordinary_model_is_dense():
    net, x = Net(), torch.randn(2, 3, 8, 8)
    meter = Meter(net, x)
    with meter:
        net(x).sum().backward()
    assert meter.readings[0].backward_flops == counted_backward_flops(net, x)
    assert meter.readings[0].factor == 0


@pytest.mark.parametrize("way", ["torch.compile", "module.compile"])
def test_a_model_that_another_backend_compiles_is_dense(way):
    torch._dynamo.reset()
    net, x = Net(), torch.randn(2, 3, 8, 8)
    expected = counted_backward_flops(net, x)
    model = net
    if way == "torch.compile":
        model = torch.compile(net, backend="aot_eager")
    else:
        net.compile(backend="aot_eager")
    meter = Meter(model, x)
    with meter:
        model(x).square().mean().backward()
    assert [(r.factor, r.backward_flops) for r in meter.readings] == [(0, expected)]
    assert not [reason for reason in meter.unknown if not reason.startswith("joules")]


def test_what_a_compiled_model_without_inputs_follows_is_said_to_be_unknown():
    torch._dynamo.reset()
    net, x = Net(), torch.randn(2, 3, 8, 8)
    model = torch.compile(net, backend="aot_eager")
    model(x).sum().backward()
    (reason,) = (reason for reason in Meter(model).unknown if "factor" in reason)
    assert 'no graph of the compiled model has come to the backend "ssprop"' in reason
    assert "has not run" not in reason


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_model_in_a_compiled_function_has_a_factor_and_unknown_flops(when):
    torch._dynamo.reset()
    net, x = Net(), torch.randn(2, 3, 8, 8)
    policy = Policy(drop_rate=0.5, schedule={"kind": "constant"})
    loss = torch.compile(lambda x: net(x).square().mean(), backend="ssprop", options={"policy": policy, "inner": "aot_eager"})
    if when == "after":
        loss(x).backward()
    meter = Meter(net, x)
    for _ in range(2):
        with meter:
            loss(x).backward()
    assert [r.backward_flops for r in meter.readings] == [None, None]
    assert meter.readings[1].factor == 1
    assert any("runs in a compiled function" in reason for reason in meter.unknown)
    with pytest.raises(SSPropError, match="inspect it without example inputs"):
        ssprop_fx.inspect(net, x)


def test_a_model_that_was_compiled_later_tells_what_to_give():
    torch._dynamo.reset()
    net, x = Net(), torch.randn(2, 3, 8, 8)
    meter = Meter(net, x)
    policy = Policy(drop_rate=0.5, schedule={"kind": "constant"})
    run = torch.compile(net, backend="ssprop", options={"policy": policy, "inner": "aot_eager"})
    with meter:
        run(x).sum().backward()
    assert meter.readings[0].backward_flops is None
    assert any("give a meter what torch.compile returned" in reason for reason in meter.unknown)
    assert ssprop_fx.inspect(net, x).coverage == ssprop_fx.inspect(run, x).coverage == 1
    assert Meter(net, x).unknown == Meter(run, x).unknown


def test_a_function_is_refused_with_what_to_give():
    net = Net()
    with pytest.raises(SSPropError, match="takes a module, got function; of a compiled function, give it the model"):
        Meter(torch.compile(lambda x: net(x), backend="aot_eager"))


def test_wall_time_is_that_of_the_steps():
    meter = Meter(Net())
    start = time.perf_counter()
    for _ in range(2):
        with meter:
            time.sleep(0.05)
        time.sleep(0.1)
    assert all(r.seconds >= 0.05 for r in meter.readings)
    assert meter.seconds <= time.perf_counter() - start - 0.2
    assert meter.backward_flops is None
    assert "backward FLOPs: no example inputs were given" in meter.unknown


def test_a_step_that_fails_is_no_reading_and_steps_do_not_nest():
    meter = Meter(Net())
    with pytest.raises(ZeroDivisionError), meter:
        raise ZeroDivisionError
    assert meter.readings == []
    with meter, pytest.raises(SSPropError, match="do not nest"):
        meter.__enter__()
    assert len(meter.readings) == 1
    assert str(meter).startswith("1 step in ")


def test_joules_of_the_cpu_come_from_powercap(no_zones):
    zone(no_zones, "intel-rapl:0", 10)
    zone(no_zones, "intel-rapl:1", 990)
    zone(no_zones, "intel-rapl:0:0", 5)  # a part of zone 0
    meter = Meter(Net())
    with meter:
        zone(no_zones, "intel-rapl:0", 13)
        zone(no_zones, "intel-rapl:1", 2)  # the counter began again at its range of 1000 J
        zone(no_zones, "intel-rapl:0:0", 8)
    with meter:
        zone(no_zones, "intel-rapl:0", 14)
    assert [r.joules for r in meter.readings] == [{"cpu": pytest.approx(15)}, {"cpu": pytest.approx(1)}]
    assert meter.joules == {"cpu": pytest.approx(16)}
    assert "cpu: 16 J, 8 J a step" in str(meter)


def test_without_counters_the_meter_says_so(no_zones):
    meter = Meter(Net())
    with meter:
        pass
    assert meter.joules == {}
    assert f"unknown: joules of cpu: no intel-rapl zone in {no_zones}" in str(meter)
    assert "unknown: joules of cuda: not in use" in str(meter)


def test_a_counter_that_only_root_may_read_is_named(no_zones, monkeypatch):
    zone(no_zones, "intel-rapl:0", 10)

    def refused(self):
        raise PermissionError(13, "Permission denied", str(no_zones / "energy_uj"))

    monkeypatch.setattr(energy.Rapl, "_read", refused)
    assert any("may be read by root alone" in reason for reason in Meter(Net()).unknown)


def test_joules_are_those_of_the_seconds(monkeypatch):
    """Work that is still in the queue when a step begins costs this step neither time nor energy."""
    pending, used = [0.0], [0.0]

    def synchronize(device):
        used[0] += pending.pop() if pending else 0.0

    meter = Meter(Net())
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    meter._devices = {torch.device("cuda", 0)}
    meter._counters = {"cuda": types.SimpleNamespace(joules=lambda: used[0])}
    pending[:] = [100.0]
    with meter:
        pending.append(7.0)
    assert meter.readings[0].joules == {"cuda": 7.0}


def test_joules_of_a_gpu_come_from_nvml(monkeypatch):
    millijoules = iter((1000, 1000, 3500))
    nvml = types.SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: {"GPU-abc": next(millijoules)}[handle],
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(uuid="abc"))
    found, reasons = energy.counters([torch.device("cuda", 0)])
    before = found["cuda"].joules()
    assert found["cuda"].joules() - before == 2.5
    assert not any("cuda" in reason for reason in reasons)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert any("pip install nvidia-ml-py" in reason for reason in energy.counters([torch.device("cuda", 0)])[1])


def test_readings_reach_callbacks_and_tensorboard(tmp_path, no_zones):
    board = pytest.importorskip("torch.utils.tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    zone(no_zones, "intel-rapl:0", 10)
    net, x = Net(), torch.randn(2, 3, 8, 8)
    writer = board.SummaryWriter(tmp_path / "runs")
    meter = Meter(net, x, callback=tensorboard(writer))
    for _ in range(2):
        with meter:
            net(x).sum().backward()
    writer.close()
    events = EventAccumulator(str(tmp_path / "runs")).Reload()
    assert set(events.Tags()["scalars"]) == {
        "ssprop/seconds", "ssprop/factor", "ssprop/backward_flops", "ssprop/joules_cpu",
    }  # fmt: skip
    assert [e.value for e in events.Scalars("ssprop/backward_flops")] == [r.backward_flops for r in meter.readings]
    assert json.loads(json.dumps(meter.to_dict()))["steps"] == 2


@pytest.mark.accelerator
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_tells_its_joules():
    pytest.importorskip("pynvml", reason="needs pip install nvidia-ml-py")
    net, x = Net().cuda(), torch.randn(64, 3, 8, 8, device="cuda")
    meter = Meter(net, x)
    with meter:
        for _ in range(300):
            net(x).sum().backward()
    assert meter.joules["cuda"] > 0
