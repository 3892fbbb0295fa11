"""The factor over steps, written out by hand, and the clock that counts the steps."""

import gc
import logging
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode

import ssprop_fx
from ssprop_fx.demo import ResNet
from ssprop_fx.errors import PolicyError
from ssprop_fx.policy import Policy
from ssprop_fx.schedule import Schedule, _automatic
from ssprop_fx.tuning import tune

# Each row: the keys that differ from the defaults, and the factors of the first steps.
FACTORS = [
    # bar: the first period // 2 steps have `start`
    ({}, [0, 1, 0, 1, 0, 1]),
    ({"period": 1}, [1, 1, 1]),
    ({"period": 3}, [0, 1, 1, 0, 1, 1]),
    ({"period": 4}, [0, 0, 1, 1, 0, 0, 1, 1]),
    ({"period": 5}, [0, 0, 1, 1, 1, 0, 0, 1]),
    ({"start": 0.5}, [0.5, 1, 0.5, 1]),
    ({"start": 1, "end": 0}, [1, 0, 1, 0]),
    ({"start": 0.25, "end": 0.75, "period": 4}, [0.25, 0.25, 0.75, 0.75, 0.25]),
    ({"repeat": False}, [0, 1, 0, 1, 0, 1]),
    # constant: `end`
    ({"kind": "constant"}, [1, 1, 1, 1]),
    ({"kind": "constant", "start": 0.3, "end": 0.6}, [0.6, 0.6, 0.6]),
    ({"kind": "constant", "end": 0}, [0, 0, 0]),
    # linear
    ({"kind": "linear", "period": 5}, [0, 0.25, 0.5, 0.75, 1, 0, 0.25]),
    ({"kind": "linear", "period": 3}, [0, 0.5, 1, 0, 0.5, 1]),
    ({"kind": "linear", "period": 2}, [0, 1, 0, 1]),
    ({"kind": "linear", "period": 1}, [1, 1, 1]),
    ({"kind": "linear", "period": 3, "start": 1, "end": 0}, [1, 0.5, 0, 1, 0.5, 0]),
    ({"kind": "linear", "period": 5, "start": 0.2, "end": 0.6}, [0.2, 0.3, 0.4, 0.5, 0.6, 0.2]),
    ({"kind": "linear", "period": 3, "start": 0.4, "end": 0.4}, [0.4, 0.4, 0.4, 0.4]),
    ({"kind": "linear", "period": 3, "repeat": False}, [0, 0.5, 1, 1, 1, 1]),
    ({"kind": "linear", "period": 3, "repeat": False, "start": 1, "end": 0.5}, [1, 0.75, 0.5, 0.5, 0.5]),
    # cosine
    ({"kind": "cosine", "period": 5}, [0, 0.14644660940672624, 0.5, 0.8535533905932737, 1, 0]),
    ({"kind": "cosine", "period": 4}, [0, 0.25, 0.75, 1, 0, 0.25]),
    ({"kind": "cosine", "period": 1}, [1, 1]),
    ({"kind": "cosine", "period": 3, "start": 0.2, "end": 1}, [0.2, 0.6, 1, 0.2]),
    ({"kind": "cosine", "period": 4, "start": 1, "end": 0}, [1, 0.75, 0.25, 0, 1]),
    ({"kind": "cosine", "period": 3, "repeat": False}, [0, 0.5, 1, 1, 1]),
    # warm-up: dense first, and the periods begin after it
    ({"warmup": 1}, [0, 0, 1, 0, 1]),
    ({"warmup": 3}, [0, 0, 0, 0, 1, 0, 1]),
    ({"warmup": 2, "start": 0.5}, [0, 0, 0.5, 1, 0.5]),
    ({"warmup": 2, "kind": "constant"}, [0, 0, 1, 1, 1]),
    ({"warmup": 2, "kind": "linear", "period": 3}, [0, 0, 0, 0.5, 1, 0]),
    ({"warmup": 1, "kind": "linear", "period": 3, "repeat": False}, [0, 0, 0.5, 1, 1, 1]),
    # cool-down: dense last, and for good; `total` alone ends nothing
    ({"kind": "constant", "cooldown": 2, "total": 5}, [1, 1, 1, 0, 0, 0, 0]),
    ({"kind": "constant", "cooldown": 5, "total": 5}, [0, 0, 0, 0, 0, 0]),
    ({"kind": "constant", "total": 3}, [1, 1, 1, 1, 1]),
    ({"kind": "constant", "warmup": 1, "cooldown": 1, "total": 4}, [0, 1, 1, 0, 0]),
    ({"kind": "constant", "warmup": 2, "cooldown": 2, "total": 4}, [0, 0, 0, 0, 0]),
    ({"kind": "linear", "period": 3, "cooldown": 1, "total": 5}, [0, 0.5, 1, 0, 0, 0, 0]),
    ({"cooldown": 1, "total": 4, "start": 0.5}, [0.5, 1, 0.5, 0, 0]),
    # interleave: dense on the first step after the warm-up and on every other from there
    ({"interleave": True}, [0, 1, 0, 1]),
    ({"interleave": True, "period": 4}, [0, 0, 0, 1, 0, 0, 0, 1]),
    ({"interleave": True, "kind": "constant"}, [0, 1, 0, 1, 0]),
    ({"interleave": True, "kind": "constant", "warmup": 1}, [0, 0, 1, 0, 1]),
    ({"interleave": True, "kind": "linear", "period": 5}, [0, 0.25, 0, 0.75, 0, 0, 0, 0.5]),
    ({"interleave": True, "kind": "cosine", "period": 4, "start": 0.5}, [0, 0.625, 0, 1, 0, 0.625]),
    ({"interleave": True, "kind": "linear", "period": 3, "repeat": False}, [0, 0.5, 0, 1, 0, 1]),
    ({"interleave": True, "kind": "constant", "cooldown": 2, "total": 6}, [0, 1, 0, 1, 0, 0, 0]),
    # precedence: warm-up and cool-down, then interleave, then kind
    (
        {"interleave": True, "kind": "linear", "period": 3, "warmup": 1, "cooldown": 2, "total": 8},
        [0, 0, 0.5, 0, 0, 0, 0, 0],
    ),
    ({"interleave": True, "start": 1, "end": 0.5, "warmup": 1}, [0, 0, 0.5, 0, 0.5]),
]

# The same with the factors that compiled code uses.
QUANTIZED = [
    ({"kind": "linear", "period": 5}, [0, 1 / 3, 2 / 3, 2 / 3, 1]),
    ({"kind": "linear", "period": 5, "levels": 5}, [0, 0.25, 0.5, 0.75, 1]),
    ({"kind": "linear", "period": 5, "levels": 3}, [0, 0.5, 0.5, 1, 1]),
    ({"kind": "linear", "period": 5, "levels": 2}, [0, 0, 1, 1, 1]),
    ({"kind": "linear", "period": 5, "levels": 1}, [1, 1, 1, 1, 1]),
    ({"kind": "linear", "period": 3, "levels": 1, "end": 0.5}, [0.5, 0.5, 0.5]),
    ({"kind": "linear", "period": 5, "levels": 2, "start": 0.2, "end": 0.6}, [0.2, 0.2, 0.6, 0.6, 0.6]),
    ({"kind": "linear", "period": 3, "levels": 2, "start": 1, "end": 0.5}, [1, 1, 0.5]),
    ({"kind": "linear", "period": 3, "start": 0.4, "end": 0.4}, [0.4, 0.4, 0.4]),
    ({"kind": "cosine", "period": 4, "levels": 2}, [0, 0, 1, 1]),
    ({"kind": "cosine", "period": 4, "levels": 5}, [0, 0.25, 0.75, 1]),
    # exact where no rounding is needed
    ({"kind": "constant", "end": 0.7, "levels": 1}, [0.7, 0.7]),
    ({"start": 0.3, "end": 0.7, "levels": 1}, [0.3, 0.7]),
    # the dense steps stay dense, whatever the levels
    ({"kind": "linear", "period": 2, "levels": 1, "warmup": 2}, [0, 0, 1, 1]),
    ({"kind": "linear", "period": 3, "levels": 2, "start": 0.5, "warmup": 1}, [0, 0.5, 1, 1]),
    ({"kind": "linear", "period": 3, "levels": 1, "cooldown": 1, "total": 3}, [1, 1, 0, 0]),
    ({"kind": "linear", "period": 3, "start": 0.5, "interleave": True, "levels": 2}, [0, 1, 0, 0.5]),
]


@pytest.mark.parametrize(("keys", "factors"), FACTORS)
def test_factor_is_as_written_out(keys, factors):
    schedule = Schedule(**keys)
    assert [schedule.factor(t) for t in range(len(factors))] == pytest.approx(factors, abs=1e-12)


def test_the_pictures_of_the_reference_are_right():
    text = (Path(__file__).parent.parent / "docs" / "policy.md").read_text(encoding="utf-8")
    pictures = re.findall(r"^(\{[^}]*\}) +([\d. ]+)$", text, re.MULTILINE)
    assert len(pictures) == 10
    for keys, factors in pictures:
        schedule = Schedule(**yaml.safe_load(keys))
        drawn = [float(factor) for factor in factors.split()]
        assert drawn == pytest.approx([schedule.factor(t) for t in range(12)], abs=0.005), keys


@pytest.mark.parametrize(("keys", "factors"), QUANTIZED)
def test_quantized_factor_is_as_written_out(keys, factors):
    schedule = Schedule(**keys)
    assert [schedule.quantized_factor(t) for t in range(len(factors))] == pytest.approx(factors, abs=1e-12)


@pytest.mark.parametrize("kind", ["linear", "cosine"])
@pytest.mark.parametrize("levels", [1, 2, 3, 4, 7, 16])
@pytest.mark.parametrize(("start", "end"), [(0.0, 1.0), (0.1, 0.9), (1.0, 0.3)])
def test_a_continuous_schedule_has_no_more_factors_than_levels(kind, levels, start, end):
    schedule = Schedule(kind=kind, start=start, end=end, period=101, levels=levels, warmup=3, interleave=True)
    factors = {schedule.quantized_factor(t) for t in range(500)} - {0.0}
    assert len(factors) <= levels
    assert end in factors


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine", "bar"])
@pytest.mark.parametrize(("start", "end"), [(0.0, 1.0), (0.1, 0.7), (0.9, 0.3), (1.0, 0.0)])
def test_factors_stay_between_start_and_end(kind, start, end):
    schedule = Schedule(kind=kind, start=start, end=end, period=997)
    factors = [f(t) for t in range(2000) for f in (schedule.factor, schedule.quantized_factor)]
    assert min(start, end) <= min(factors)
    assert max(factors) <= max(start, end)


def test_schedules_are_frozen_and_hashable():
    schedule = Schedule(period=4)
    with pytest.raises(AttributeError, match="does not change"):
        schedule.period = 5
    assert len({schedule, Schedule(period=4), Schedule(period=5)}) == 2


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"cooldown": 2}, ["cooldown of 2 without total", "add `total`"]),
        ({"warmup": 6, "cooldown": 5, "total": 10}, ["Schedule(...): total", "Nearest: 11"]),
        ({"warmup": 6, "total": 5}, ["Schedule(...): total", "Nearest: 6"]),
        ({"kind": "cosin", "perod": 3}, ["Nearest: cosine", "Nearest: period", "2 problems"]),
        ({"kind": "cosin", "cooldown": 3}, ["Nearest: cosine", "without total", "2 problems"]),
    ],
)
def test_a_wrong_schedule_names_every_problem(keys, words):
    with pytest.raises(PolicyError) as error:
        Schedule(**keys)
    assert all(word in str(error.value) for word in words)


# --- the clock


def sgd():
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.grad = torch.ones(2)
    return torch.optim.SGD([parameter], lr=0.1)


def test_a_manual_clock_moves_with_policy_step_alone():
    policy, optimizer = Policy(schedule={"period": 4}), sgd()
    seen = []
    for _ in range(6):
        seen.append((policy.steps, policy.factor, policy.quantized_factor))
        optimizer.step()
        policy.step()
    assert seen == [(0, 0, 0), (1, 0, 0), (2, 1, 1), (3, 1, 1), (4, 0, 0), (5, 0, 0)]


def test_the_default_policy_moves_with_the_optimizer():
    policy, optimizer = Policy(), sgd()
    seen = []
    for _ in range(4):
        seen.append((policy.steps, policy.factor))
        optimizer.step()
    assert seen == [(0, 0), (1, 1), (2, 0), (3, 1)]


def test_every_optimizer_advances_every_optimizer_clock():
    first, second = Policy(), Policy(drop_rate=0.5, schedule=Schedule(clock="optimizer", warmup=1))
    sgd().step()
    sgd().step()
    assert (first.steps, second.steps) == (2, 2)


def test_taking_over_does_not_count_a_step_twice(caplog):
    policy, optimizer = Policy(), sgd()
    with caplog.at_level(logging.INFO, "ssprop_fx.schedule"):
        for step in range(1, 6):
            optimizer.step()
            policy.step()
            assert policy.steps == step
    assert [record.name for record in caplog.records] == ["ssprop_fx.schedule"]
    assert "manual" in caplog.text


def test_taking_over_before_the_first_optimizer_step_counts():
    policy, optimizer = Policy(), sgd()
    for step in range(1, 6):
        policy.step()
        optimizer.step()
        assert policy.steps == step


def test_taking_over_after_many_optimizer_steps_goes_on_from_there():
    policy, optimizer = Policy(), sgd()
    for _ in range(5):
        optimizer.step()
    policy.step()
    assert policy.steps == 5
    policy.step()
    optimizer.step()
    assert policy.steps == 6


def test_taking_over_after_loading_a_state_does_not_count_a_step_twice():
    saved, policy, optimizer = Policy(), Policy(), sgd()
    optimizer.step()
    policy.load_state_dict(saved.state_dict())
    policy.step()  # no optimizer step since the state: this is an advance of its own
    assert policy.steps == saved.steps + 1


class Calling(torch.optim.SGD):
    """Its class and its base class both call PyTorch's hooks, once an instance of each was made."""

    def step(self, closure=None):
        return super().step(closure)


class Around(torch.optim.Optimizer):
    """As Lookahead does, and SAM."""

    def __init__(self, inner, times=1):
        super().__init__(inner.param_groups, {})
        self.inner, self.times = inner, times

    def step(self, closure=None):
        for _ in range(self.times):
            self.inner.step(closure)


NESTED = {
    "subclass": lambda: Calling(sgd().param_groups, lr=0.1),
    "wrapper": lambda: Around(sgd()),
    "several steps inside": lambda: Around(sgd(), times=3),
    "wrapper of a subclass": lambda: Around(Around(Calling(sgd().param_groups, lr=0.1))),
}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("make", NESTED.values(), ids=NESTED)
def test_a_step_inside_of_a_step_counts_once(make, compiled):
    policy, optimizer = Policy(), make()
    sgd().step()  # from the first instance of a class on, PyTorch's hooks hear of its steps
    step = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
    for made in range(1, 5):
        assert policy.steps == made
        step()
    torch._dynamo.reset()


def test_a_clock_goes_on_after_steps_that_raised():
    def fail():
        raise ZeroDivisionError

    policy, optimizer, kept = Policy(), Around(Calling(sgd().param_groups, lr=0.1)), []
    sgd()
    for made in range(3):
        for failing in (optimizer, optimizer.inner):
            with pytest.raises(ZeroDivisionError) as problem:
                failing.step(fail)
            kept.append(problem)  # and with it the calls that raised
        assert policy.steps == made
        optimizer.step()

    class Forgiving(Around):
        def step(self, closure=None):
            with pytest.raises(ZeroDivisionError):
                self.inner.step(fail)
            self.inner.step()

    Forgiving(sgd()).step()
    assert policy.steps == 4


def test_threads_step_apart():
    """A step that begins while another thread makes one is no part of that."""
    policy = Policy()
    between = sgd()

    def meanwhile():
        thread = threading.Thread(target=sgd().step)
        thread.start()
        thread.join()
        assert policy.steps == 1
        return torch.zeros(())

    between.step(meanwhile)
    assert policy.steps == 2


def test_a_clock_is_not_kept_alive_by_the_optimizers():
    policy = Policy()
    before = len(_automatic)
    del policy
    gc.collect()
    assert len(_automatic) < before


def train(optimizer, steps):
    for _ in range(steps):
        optimizer.step()


MOVING = [{}, {"kind": "linear"}, {"kind": "constant", "warmup": 2}, {"kind": "constant", "interleave": True}]


@pytest.mark.parametrize("schedule", MOVING, ids=str)
def test_a_schedule_that_nobody_can_step_is_told(schedule):
    """A path or mapping with a manual clock, and no callback of a trainer either: the model would train dense for ever."""
    model = ssprop_fx.transform(torch.nn.Conv2d(3, 4, 3), {"version": 1, "schedule": schedule})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.warns(UserWarning, match=r"10 optimizer steps .* still at step 0.*policy\.step\(\).*clock: optimizer") as told:
        train(optimizer, 30)
    assert len(told) == 1


def idle_schedules(caplog):
    return [record for record in caplog.records if record.name == "ssprop_fx.schedule"]


@pytest.mark.parametrize("front_end", ["transform", "backend"])
def test_a_policy_whose_step_is_forgotten_is_told_once(front_end, caplog):
    """After more steps than an epoch of a small data set has, in the log: it may be meant to be stepped once an epoch."""
    torch._dynamo.reset()
    net, policy = torch.nn.Conv2d(3, 4, 3), Policy(schedule={})
    if front_end == "transform":
        for _ in range(2):
            ssprop_fx.transform(net, policy)
    else:
        model = torch.compile(net, backend="ssprop", options={"policy": policy, "inner": "eager"})
        model(torch.randn(2, 3, 6, 6)).sum().backward()
    optimizer = sgd()
    train(optimizer, 499)
    assert not idle_schedules(caplog)
    train(optimizer, 1)
    if front_end == "backend":
        model(torch.randn(2, 3, 9, 9)).sum().backward()  # another graph
    train(optimizer, 600)
    (record,) = idle_schedules(caplog)
    assert record.levelname == "WARNING"
    said = r"500 optimizer steps .* still at step 0, factor 0.* policy\.step\(\) after optimizer\.step\(\).*`clock: optimizer`.*epoch"
    assert re.search(said, record.getMessage())


@pytest.mark.parametrize("by", ["steps by epoch", "a constant schedule", "the optimizer's clock", "a trial", "a state"])
def test_a_policy_that_is_in_order_is_not_told(by, caplog):
    schedule = {"a constant schedule": {"kind": "constant"}, "the optimizer's clock": {"clock": "optimizer"}}.get(by, {})
    net, policy, optimizer = torch.nn.Conv2d(3, 4, 3), Policy(schedule=schedule), sgd()
    if by == "a trial":
        kept = policy.explain(net).report(torch.randn(2, 3, 6, 6)), tune(net, torch.randn(2, 3, 6, 6), policy)  # noqa: F841
    else:
        model = ssprop_fx.transform(net, policy)  # noqa: F841
    if by == "a state":
        policy.load_state_dict(policy.state_dict() | {"steps": 4})
    for _ in range(3):
        train(optimizer, 400)
        if by == "steps by epoch":
            policy.step()
    assert not idle_schedules(caplog)


@pytest.mark.parametrize("schedule", [*MOVING, {"kind": "constant"}, {"start": 1.0}], ids=str)
def test_a_schedule_that_moves_is_one_whose_factor_changes(schedule):
    schedule = Policy(schedule=schedule).schedule
    assert schedule.moves == (len({schedule.factor(step) for step in range(20)}) > 1)


@pytest.mark.parametrize("by", ["a policy", "a constant schedule", "the optimizer's clock", "a callback", "a state"])
def test_nobody_is_told_of_a_schedule_that_is_in_order(by, recwarn):
    given = {
        "a policy": Policy(schedule={}),  # whoever holds it may step it once an epoch
        "a constant schedule": {"version": 1, "schedule": {"kind": "constant"}},
        "the optimizer's clock": {"version": 1},
    }.get(by, {"version": 1, "schedule": {}})
    model = ssprop_fx.transform(torch.nn.Conv2d(3, 4, 3), given)
    policy, optimizer = ssprop_fx.inspect(model).policy, sgd()
    if by == "a callback":
        policy.step()
    if by == "a state":
        policy.load_state_dict(policy.state_dict() | {"steps": 4})
    train(optimizer, 30)
    assert not [w for w in recwarn if "optimizer steps" in str(w.message)]


def test_nothing_listens_to_optimizers_until_a_clock_needs_it():
    code = """
import torch.optim.optimizer as o
from ssprop_fx.policy import Policy
hooks = o._global_optimizer_post_hooks
Policy(schedule={})
assert len(hooks) == 0, "a manual clock registered a hook"
policies = [Policy(), Policy(), Policy(drop_rate=.5)]
assert len(hooks) == 1, hooks
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_compiled_optimizer_advances_the_clock_and_does_not_recompile():
    policy, optimizer = Policy(), sgd()
    compiled = torch.compile(optimizer.step, backend="eager")
    with torch.compiler.set_stance("default"):
        compiled()
    with torch.compiler.set_stance("fail_on_recompile"):
        for _ in range(10):
            compiled()
    assert policy.steps == 11


@pytest.mark.parametrize("per_epoch", [1, 3, 10])
@pytest.mark.parametrize("keys", [keys for keys, _ in FACTORS if "interleave" not in keys], ids=str)
def test_stepping_by_epoch_is_the_same_schedule_in_epochs(keys, per_epoch):
    """A clock that is advanced once an epoch goes through the factors epoch by epoch; so the unit is the caller's."""
    by_epoch = Policy(schedule=keys)
    for epoch in range(8):
        factors = set()
        for _ in range(per_epoch):
            factors.add(by_epoch.factor)
        assert factors == {Schedule(**keys).factor(epoch)}
        by_epoch.step()


@pytest.mark.parametrize("channels_last", [False, True])
def test_the_default_policy_saves_forty_per_cent_over_a_hundred_steps(channels_last):
    """Backward FLOPs of the convolutions, counted on every one of the steps."""
    torch.manual_seed(0)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    model = ResNet().to(memory_format=layout)
    policy = Policy()
    sparse = ssprop_fx.transform(model, policy)
    optimizer = torch.optim.SGD(model.parameters(), lr=0)
    images = torch.randn(2, 1, 8, 8).contiguous(memory_format=layout)

    def counted(network) -> int:
        with FlopCounterMode(display=False) as counter:
            loss = network(images).sum()
            forward = counter.get_total_flops()
            loss.backward()
        return counter.get_total_flops() - forward - linear

    linear = 2 * 2 * 2 * 256 * 10  # the head's backward: two products of a batch of 2, 256 features and 10 classes
    steps = []
    for _ in range(100):
        steps.append(counted(sparse))
        optimizer.step()
    dense = counted(model)
    assert policy.steps == 100
    assert steps[::2] == [dense] * 50
    assert 1 - sum(steps) / (100 * dense) == pytest.approx(0.40, abs=0.005)
