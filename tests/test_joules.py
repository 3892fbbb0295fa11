"""Joules a step, by counters that tick as NVML's do, on a device and a clock that are stand-ins."""

import json
import sys
import time
import types

import pytest
import torch
from torch import nn

from ssprop_fx import Policy, SSPropError, bench, energy, joules
from ssprop_fx.timing import Spread

X = torch.randn(2, 3, 8, 8)


def net():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3))


class Device:
    """A device that draws 50 W, and 500 W while it works; its counter ticks ten times a second. The host is faster than it."""

    STEP = 0.13  # seconds of work
    HOST = 0.02

    def __init__(self):
        self.now, self.free, self.work = 0.037, 0.0, []

    def perf_counter(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds

    def synchronize(self):
        self.now = max(self.now, self.free)

    def advance(self):
        start = max(self.now, self.free)
        self.free = start + self.STEP
        self.work.append((start, self.free))
        self.now += self.HOST
        self.now = max(self.now, self.free - 3 * self.STEP)  # the queue is full
        return 1

    def joules(self):
        ticked = int(self.now * 10) / 10
        return 50 * ticked + 450 * sum(max(0.0, min(end, ticked) - start) for start, end in self.work)


@pytest.fixture
def device(monkeypatch):
    found = Device()
    monkeypatch.setattr(joules, "time", found)
    monkeypatch.setattr(joules, "synchronize", found.synchronize)
    return found


@pytest.mark.parametrize("seconds", [3.0, 3.04, 3.08])
def test_a_block_is_charged_what_its_steps_use_and_not_what_is_left_to_the_next_tick(device, seconds):
    device.now += seconds  # wherever in a tick the block begins
    found = joules.per_step(device.advance, device, seconds)
    assert device.work[-1][1] - device.work[0][0] >= seconds
    assert found == pytest.approx(500 * Device.STEP, rel=2e-3)


def test_nobody_waits_within_a_block(device, monkeypatch):
    waits = []
    monkeypatch.setattr(joules, "synchronize", lambda: (waits.append(len(device.work)), device.synchronize()))
    joules.per_step(device.advance, device, 3.0)
    assert waits == [len(device.work)]


def test_a_counter_that_stands_still_is_an_error(device):
    with pytest.raises(SSPropError, match="stands still at 7 J for 5 s"):
        joules.tick(types.SimpleNamespace(joules=lambda: 7.0))


@pytest.fixture
def watts(monkeypatch):
    """A CPU that draws 100 W, whatever it does."""
    counter = types.SimpleNamespace(joules=lambda: int(time.perf_counter() * 1000) / 10)
    monkeypatch.setattr(bench, "counter_of", lambda device: counter)
    monkeypatch.setattr(bench, "SECONDS", {"cpu": 0.02})
    return counter


def test_every_arm_gets_joules_and_a_ratio(watts):
    result = bench.bench(net(), X, Policy(round_to=1), ["transform"], rounds=2, energy=True)
    assert {name: len(each) for name, each in result.joules.items()} == {"eager": joules.BLOCKS, "transform": joules.BLOCKS}
    eager, ours = result.arms["eager"], result.arms["transform"]
    assert ours.joules == Spread.of(result.joules["transform"])
    assert 0 < ours.joules.low <= ours.joules.median <= ours.joules.high
    assert eager.joules_ratio == Spread(1.0, 1.0, 1.0)
    pairs = zip(result.joules["transform"], result.joules["eager"], strict=True)
    assert ours.joules_ratio == Spread.of([a / b for a, b in pairs])
    assert json.loads(json.dumps(result.to_dict()))["arms"]["transform"]["joules"]["median"] == ours.joules.median
    assert "energy ratio" in str(result)
    assert result.unknown == []


def test_without_energy_nothing_is_said_of_it():
    result = bench.bench(net(), X, arms=["eager"], rounds=1)
    assert (result.joules, result.arms["eager"].joules) == ({}, None)
    assert "energy" not in str(result)


def test_a_counter_that_fails_later_costs_the_joules_alone(watts):
    reads = iter(range(20))

    def failing(now=watts.joules):
        if next(reads, None) is None:
            raise OSError("GPU is lost")
        return now()

    watts.joules = failing
    result = bench.bench(net(), X, arms=["eager"], rounds=2, energy=True)
    assert result.arms["eager"].step > 0
    assert result.arms["eager"].joules is None
    assert result.unknown == ["joules: GPU is lost"]
    assert "unknown: joules: GPU is lost" in str(result)


class Untouched(nn.Conv2d):
    def forward(self, x):
        raise AssertionError("the model has run")


def test_where_nothing_counts_energy_nothing_is_timed(tmp_path, monkeypatch):
    monkeypatch.setattr(energy, "POWERCAP", tmp_path)
    with pytest.raises(SSPropError, match="energy cannot be measured here: cpu: no intel-rapl zone"):
        bench.bench(Untouched(3, 8, 3), X, arms=["eager"], energy=True)
    (tmp_path / "intel-rapl:0").mkdir()
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("1000\n")
    (tmp_path / "intel-rapl:0" / "max_energy_range_uj").write_text("9999999\n")
    monkeypatch.setattr(joules, "_PATIENCE", 0.01)
    with pytest.raises(SSPropError, match="stands still"):
        bench.bench(Untouched(3, 8, 3), X, arms=["eager"], energy=True)


def test_a_gpu_without_nvml_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(SSPropError, match=r"pip install nvidia-ml-py"):
        energy.counter_of(torch.device("cuda", 0))
    with pytest.raises(SSPropError, match="meta: nothing counts it"):
        energy.counter_of(torch.device("meta"))
