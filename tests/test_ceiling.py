"""The ceiling: by kept shares; on CUDA by the device's time in a step that nobody profiles; unknown rather than wrong."""

import contextlib
import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ssprop_fx import Policy, SSPropError, bench, inspect, transform
from ssprop_fx.bench_run import Run
from ssprop_fx.ceiling import Ceiling
from ssprop_fx.steps import scalar_loss

X = torch.randn(2, 3, 8, 8)
SHAPES = [[2, 8, 6, 6], [2, 3, 8, 8], [8, 3, 3, 3]]
KEY = tuple(map(tuple, SHAPES))


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3))


def test_the_ceiling_takes_every_convolution_at_its_kept_share():
    run = Run("eager", net(), X, Policy(), scalar_loss, None)
    ceiling = Ceiling.of(run, rounds=1)
    assert len(ceiling.shares) == 3
    assert 0 < sum(ceiling.shares.values()) < 1
    model = transform(net(), bench.at_factor(Policy(drop_rate=0.75, round_to=1), 1.0))
    model(X)
    assert ceiling.saving(inspect(model)) == pytest.approx(0.75 * sum(ceiling.shares.values()))


def test_on_the_cpu_the_shares_are_those_of_the_profiled_step():
    run = Run("eager", net(), X, Policy(), scalar_loss, None)
    assert 0 < sum(Ceiling.of(run, step=1e-9, rounds=1).shares.values()) < 1


def test_a_convolution_that_the_report_does_not_know_is_an_error():
    run = Run("eager", net(), X, Policy(), scalar_loss, None)
    other = transform(nn.Sequential(nn.Conv2d(3, 5, 1)), Policy())
    other(X)
    with pytest.raises(SSPropError, match="not in the report"):
        Ceiling.of(run, rounds=1).saving(inspect(other))


class OnCuda:
    """A run whose device, profiler and times are stand-ins."""

    device = torch.device("cuda", 0)

    def __call__(self):
        pass


@pytest.fixture
def profiled(monkeypatch):
    """Microseconds on the device of two calls of one convolution; what the profiler was asked for."""
    asked, times = [], [300.0, 100.0]

    @contextlib.contextmanager
    def profile(activities, record_shapes):
        asked.append(activities)
        name = "aten::convolution_backward"
        yield SimpleNamespace(
            events=lambda: [
                SimpleNamespace(name=name, input_shapes=[*SHAPES, []], device_time_total=t, cpu_time_total=9000.0)
                for t in times
            ]
        )

    monkeypatch.setattr(torch.profiler, "profile", profile)
    return asked, times


def test_on_cuda_the_shares_are_the_devices_time_in_an_unprofiled_step(profiled):
    assert Ceiling.of(OnCuda(), step=1e-3, rounds=3).shares == {KEY: pytest.approx(0.4)}
    assert torch.profiler.ProfilerActivity.CUDA in profiled[0][0]


def test_on_cuda_launch_times_are_not_taken_for_the_devices(profiled):
    profiled[1][:] = [0.0, 0.0]
    with pytest.raises(SSPropError, match="no device time of 1 of 1 convolutions"):
        Ceiling.of(OnCuda(), step=1e-3, rounds=3)


@pytest.mark.parametrize(("method", "problem"), [("of", SSPropError), ("of", RuntimeError), ("saving", SSPropError)])
def test_a_ceiling_that_cannot_be_told_costs_nothing_else(monkeypatch, method, problem):
    def fail(*arguments, **options):
        raise problem("3 of them")

    monkeypatch.setattr(Ceiling, method, fail)
    result = bench.bench(net(), X, Policy(round_to=1), ["transform"], rounds=2)
    ours = result.arms["transform"]
    assert ours.step > 0
    assert (ours.ceiling, ours.captured) == (None, None)
    assert result.unknown == ["ceiling of transform: 3 of them"]
    assert "unknown: ceiling of transform: 3 of them" in str(result)
    assert json.loads(json.dumps(result.to_dict()))["unknown"] == result.unknown
