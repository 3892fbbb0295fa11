"""What is settled for one factor of a schedule is kept while the factor comes again, and does not pile up where none does."""

import json

import pytest
import torch
from torch import nn

import ssprop_fx
from ssprop_fx import Policy, allocation, profit
from ssprop_fx.profit import Timing
from ssprop_fx.recent import MOST, Recent
from ssprop_fx.transform import transformation_of


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 40, 3), nn.Conv2d(40, 72, 1), nn.Conv2d(72, 24, 3))


def step(model, policy, size=8):
    model.zero_grad()
    model(torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))).square().sum().backward()
    policy.step()
    return [int((layer.weight.grad.flatten(1) != 0).any(1).sum()) for layer in model]


@pytest.fixture
def settling(monkeypatch):
    """What is settled, with whether layers are timed."""
    made, settle = [], allocation.settle
    monkeypatch.setattr(allocation, "settle", lambda demands, measured: made.append(measured) or settle(demands, measured))
    return made


def test_the_keys_used_last_are_kept_in_that_order():
    recent, made = Recent(3), []
    for key in "abcadb":
        assert recent.use(key, lambda key: made.append(key) or key.upper()) == key.upper()
    assert made == ["a", "b", "c", "d", "b"]
    assert recent == {"a": "A", "d": "D", "b": "B"}
    assert list(recent) == ["a", "d", "b"]


@pytest.mark.parametrize(
    ("schedule", "factors"),
    [
        ({"kind": "bar", "period": 2, "start": 0.5}, 2),
        ({"kind": "constant", "interleave": True}, 1),
        ({"kind": "linear", "period": MOST + 1}, MOST),
    ],
    ids=str,
)
def test_a_factor_that_comes_again_is_settled_once(settling, schedule, factors):
    policy = Policy(drop_rate=0.8, schedule=schedule)
    model = ssprop_fx.transform(net(), policy)
    for _ in range(3 * policy.schedule.period):
        step(model, policy)
    assert len(settling) == factors


def test_a_schedule_of_many_factors_settles_each_and_keeps_few():
    policy = Policy(drop_rate=0.8, schedule={"kind": "cosine", "period": 4 * MOST, "repeat": False})
    model = ssprop_fx.transform(net(), policy)
    kept = [step(model, policy) for _ in range(3 * MOST)]
    assert len(transformation_of(model).allocation._plans) == MOST
    state = json.loads(json.dumps(policy.state_dict()))
    last = [policy.schedule.factor(t) for t in range(2 * MOST, 3 * MOST)]
    assert [factor for factor, _ in state["counts"]["kept"]] == last
    for t in (1, 5, 3 * MOST - 1):  # forgotten or not, the counts are the same
        policy.load_state_dict(state | {"steps": t})
        assert step(model, policy) == kept[t]

    resumed = Policy(drop_rate=0.8, schedule={"kind": "cosine", "period": 4 * MOST, "repeat": False})
    again = ssprop_fx.transform(net(), resumed)
    resumed.load_state_dict(state)
    for t in range(3 * MOST, 3 * MOST + 8):  # states do not grow from run to run
        assert resumed.factor == policy.schedule.factor(t)
        step(again, resumed, size=12)
    counts = resumed.state_dict()["counts"]
    assert [factor for factor, _ in counts["kept"]] == [policy.schedule.factor(t) for t in range(2 * MOST + 8, 3 * MOST + 8)]
    assert counts["flops"] == state["counts"]["flops"]
    resumed.load_state_dict(state | {"steps": 5})
    assert step(again, resumed, size=12) == kept[5]


def test_layers_that_do_not_pay_are_the_same_ones_when_settled_again(monkeypatch, tmp_path, settling):
    """And none is timed a second time."""
    monkeypatch.setenv("SSPROP_CACHE", str(tmp_path))
    profit._loaded.cache_clear()
    timed = []

    def once(calls, keeps, criterion, gradients):
        """As slow as the machine happens to be: what decides is the first time, which the file has."""
        store, name = profit._store(), f"{[c.weight for c in calls]} {keeps} {criterion} {gradients}"
        if name not in store:
            timed.append(name)
            store[name] = len(timed) % 2
        return [Timing(keep, 2.0, 1.0 + 2 * store[name]) for keep in keeps]

    monkeypatch.setattr(profit, "measure_together", once)
    policy = Policy(drop_rate=0.6, profitable="auto", schedule={"kind": "linear", "period": 2 * MOST, "repeat": False})
    model = ssprop_fx.transform(net(), policy)
    first = [step(model, policy) for _ in range(2 * MOST)]
    asked = len(timed)
    policy.load_state_dict(policy.state_dict() | {"steps": 0})
    assert [step(model, policy) for _ in range(2 * MOST)] == first
    assert len(timed) == asked > 1
    assert len(settling) > 3 * MOST
    profit._loaded.cache_clear()


def test_a_report_knows_every_factor_of_a_long_schedule():
    policy = Policy(drop_rate=0.6, schedule={"kind": "linear", "period": 3 * MOST})
    model = ssprop_fx.transform(net(), policy)
    report = ssprop_fx.inspect(model, torch.randn(2, 3, 8, 8))
    first = {t: dict(report.kept_at(policy.schedule.factor(t))) for t in range(3 * MOST)}
    assert {t: dict(report.kept_at(policy.schedule.factor(t))) for t in range(3 * MOST)} == first
    assert len(report._plan._known) == MOST
