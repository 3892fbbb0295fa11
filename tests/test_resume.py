"""A run that is killed and resumed ends bit-equal to one that never stopped; checkpoints fit plain and rewritten models."""

import json
import multiprocessing
import os
import pickle
import random
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import ssprop_fx
from ssprop_fx import Policy
from ssprop_fx.demo import ResNet

EXAMPLES = Path(__file__).parents[1] / "examples"

# The random criterion and the dropout draw from torch's generator at every step.
POLICY = "criterion: random\nschedule: {kind: linear, period: 5, warmup: 3, cooldown: 4, total: 30}\n"


def train(*arguments: str) -> None:
    """In a process of its own: the classifier example, on few images."""
    sys.path.insert(0, str(EXAMPLES))
    torch.set_num_threads(1)
    import train_classifier

    with open(os.devnull, "w") as nothing:
        sys.stdout = nothing
        train_classifier.main(arguments)


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """A context whose new processes have imported everything already, and the seconds that a run takes."""
    context = multiprocessing.get_context("forkserver")
    sys.path.insert(0, str(EXAMPLES))
    context.set_forkserver_preload(["torch._dynamo", "sklearn.datasets", "ssprop_fx.demo", "rich.progress", "test_resume"])
    for _ in range(2):  # the first process waits for the imports, and no run's time is known before
        start = time.perf_counter()
        run(context, ["--short", "--batch", "16", "--out", str(tmp_path_factory.mktemp("first"))])
    yield context, time.perf_counter() - start
    sys.path.remove(str(EXAMPLES))


def run(context, arguments, kill_when=None) -> bool:
    """Whether the run came to its end."""
    process = context.Process(target=train, args=arguments)
    process.start()
    while kill_when is not None and process.exitcode is None and not kill_when():
        time.sleep(0.001)
    if kill_when is None:
        process.join()
    if process.exitcode is None:
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        return False
    assert process.exitcode == 0
    return True


def after_saves(checkpoint, count, seconds):
    """Whether it is ``seconds`` since a checkpoint has been written ``count`` times from now on: a run's own clock."""

    def written():
        return checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0

    last, left, since = written(), count, time.perf_counter()

    def due():
        nonlocal last, left, since
        if left and (now := written()) != last:
            last, left, since = now, left - 1, time.perf_counter()
        return not left and time.perf_counter() - since >= seconds

    return due


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.mark.parametrize("policy", ["default", "random"])
def test_killed_ten_times_ends_bit_equal(policy, processes, tmp_path):
    if policy == "random":
        policy = str(tmp_path / "policy.yaml")
        Path(policy).write_text(POLICY)
    arguments = ["--policy", policy, "--short", "--dropout", "0.2", "--batch", "16", "--save-every", "3", "--seed", "5"]
    context, seconds = processes
    checkpoint = tmp_path / "killed" / "checkpoint.pt"
    assert run(context, [*arguments, "--out", str(tmp_path / "whole")])
    killed = [*arguments, "--out", str(tmp_path / "killed"), "--resume"]
    lot, kills, moments = random.Random(0), 0, set()
    while kills < 10:
        when = after_saves(checkpoint, lot.choice([0, 1, 2]), lot.uniform(0, 0.1) * seconds)
        if run(context, killed, when):  # what was left of it is too short: begin it again
            for name in ("checkpoint.pt", "log.jsonl"):
                (tmp_path / "killed" / name).unlink()
            continue
        kills += 1
        if checkpoint.exists():
            moments.add(torch.load(checkpoint)["step"])
    assert run(context, killed)
    assert len(moments) > 1  # the kills came at different places of the run
    whole, resumed = (torch.load(tmp_path / name / "checkpoint.pt") for name in ("whole", "killed"))
    assert whole["step"] == 32
    for part in whole:
        assert same(whole[part], resumed[part]), f"{part} is not what it would have been"
    logs = [(tmp_path / name / "log.jsonl").read_text() for name in ("whole", "killed")]
    assert logs[0] == logs[1]
    assert [json.loads(line)["epoch"] for line in logs[0].splitlines()] == [1, 2]


def test_another_seed_is_another_run(processes, tmp_path):
    """What the tests above compare does depend on what happens in a run."""
    states = []
    for seed in ("5", "6"):
        assert run(processes[0], ["--short", "--batch", "16", "--epochs", "1", "--seed", seed, "--out", str(tmp_path / seed)])
        states.append(torch.load(tmp_path / seed / "checkpoint.pt")["model"])
    assert not same(*states)


def steps(model, forward, policy, optimizer, count):
    """Train on batches of unequal size, as the last of an epoch is."""
    for _ in range(count):
        generator = torch.Generator().manual_seed(policy.steps)
        size = 5 if policy.steps % 3 == 2 else 8
        images = torch.randn(size, 1, 8, 8, generator=generator)
        labels = torch.randint(0, 10, (size,), generator=generator)
        nn.functional.cross_entropy(forward(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        policy.step()


def fresh(front_end):
    torch.manual_seed(0)
    model = ResNet((32, 32, 64))
    policy = Policy(drop_rate=0.6, schedule={"kind": "linear", "period": 4})
    if front_end == "transform":
        forward = ssprop_fx.transform(model, policy)
    else:
        options = {"policy": policy, "inner": "aot_eager"}
        forward = torch.compile(model, backend="ssprop", options=options, dynamic=False)
    return model, forward, policy, torch.optim.Adam(model.parameters(), 1e-3)


@pytest.mark.parametrize("front_end", ["transform", "compile"])
def test_resumed_between_any_two_steps_ends_bit_equal(front_end, tmp_path):
    whole = fresh(front_end)
    steps(*whole, 7)
    for stop in range(1, 7, 1 if front_end == "transform" else 3):
        torch._dynamo.reset()
        model, _, policy, optimizer = first = fresh(front_end)
        steps(*first, stop)
        torch.save([model.state_dict(), policy.state_dict(), optimizer.state_dict()], tmp_path / "state")
        torch._dynamo.reset()
        second = fresh(front_end)
        for part, state in zip((second[0], second[2], second[3]), torch.load(tmp_path / "state"), strict=True):
            part.load_state_dict(state)
        steps(*second, 7 - stop)
        assert same(second[0].state_dict(), whole[0].state_dict()), f"stopped after {stop} steps"
    torch._dynamo.reset()


def test_a_report_or_a_meter_has_no_part_in_a_policys_state():
    """Nor a state in a report: it is a snapshot."""

    def net():
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Conv2d(3, 64, 3), torch.nn.Conv2d(64, 96, 3), torch.nn.Conv2d(96, 80, 3))

    chosen = ssprop_fx.Policy(drop_rate=0.7, schedule={"kind": "constant"})
    model = ssprop_fx.transform(net(), chosen)
    report = ssprop_fx.inspect(model, torch.randn(2, 3, 16, 16))
    meter = ssprop_fx.Meter(model, torch.randn(2, 3, 12, 12))
    assert "counts" not in chosen.state_dict()
    half = report.kept_at(0.5)
    model(torch.randn(4, 3, 24, 24)).sum().backward()
    state = chosen.state_dict()
    alone = ssprop_fx.Policy(drop_rate=0.7, schedule={"kind": "constant"})
    trained = ssprop_fx.transform(net(), alone)
    trained(torch.randn(4, 3, 24, 24)).sum().backward()
    assert state["counts"] == alone.state_dict()["counts"]
    chosen.load_state_dict(state)
    assert dict(report.kept_at(0.5)) == dict(half)
    assert trained is not None
    assert meter is not None


def test_counts_of_another_policy_are_left_aside():
    def trained(rate):
        torch.manual_seed(0)
        chosen = ssprop_fx.Policy(drop_rate=rate, schedule={"kind": "constant"})
        model = ssprop_fx.transform(torch.nn.Sequential(torch.nn.Conv2d(3, 64, 3), torch.nn.Conv2d(64, 96, 3)), chosen)
        model(torch.randn(2, 3, 16, 16)).sum().backward()
        return chosen, model

    first, model = trained(0.7)
    second, other = trained(0.4)
    before = second.state_dict()
    second.load_state_dict(first.state_dict())
    assert second.state_dict() == before
    fresh = ssprop_fx.Policy(drop_rate=0.4, schedule={"kind": "constant"})
    fresh.load_state_dict(first.state_dict())
    assert "counts" not in fresh.state_dict()
    assert model is not other


def test_counts_that_the_first_sizes_settled_are_resumed():
    """``round_to: auto`` balances the layers' costs, which depend on the size of the first images."""

    def train(model, forward, policy, optimizer, count):
        for _ in range(count):
            generator, size = torch.Generator().manual_seed(policy.steps), (7, 9, 5, 12, 6)[policy.steps % 5]
            forward(torch.randn(4, 1, size, size, generator=generator)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            policy.step()

    def made():
        torch.manual_seed(0)
        model, policy = ResNet((64, 128, 128)), Policy(drop_rate=0.7, schedule={"kind": "linear", "period": 4})
        return model, ssprop_fx.transform(model, policy), policy, torch.optim.SGD(model.parameters(), 1e-4)

    whole = made()
    train(*whole, 7)
    for stop in range(1, 7):
        first, second = made(), made()
        train(*first, stop)
        second[0].load_state_dict(first[0].state_dict())
        second[2].load_state_dict(json.loads(json.dumps(first[2].state_dict())))  # as a trainer that writes JSON does
        copied = pickle.loads(pickle.dumps(first[2]))
        assert copied.state_dict() == first[2].state_dict()
        train(*second, 7 - stop)
        assert same(second[0].state_dict(), whole[0].state_dict()), f"stopped after {stop} steps"
    right = second[2].state_dict()
    for counts in ([1], {**right["counts"], "kept": 4}, {**right["counts"], "kept": [["a"]]}):
        with pytest.raises(ssprop_fx.PolicyError, match="counts"):
            second[2].load_state_dict(right | {"counts": counts, "steps": 1})
        assert second[2].state_dict() == right


def test_checkpoints_fit_plain_transformed_and_compiled_models():
    plain = ResNet((8, 16))
    policy = Policy(schedule={"kind": "constant"})
    transformed = ssprop_fx.transform(ResNet((8, 16)), policy)
    compiled = ResNet((8, 16))
    compiled.compile(backend="ssprop", options={"policy": policy, "inner": "aot_eager"})
    wrapped = torch.compile(ResNet((8, 16)), backend="ssprop", options={"policy": policy, "inner": "aot_eager"})
    images = torch.randn(4, 1, 8, 8)
    models = [plain, transformed, compiled, wrapped._orig_mod]
    for model in (plain, transformed, compiled, wrapped):
        model(images).sum().backward()
    for source in models:
        state = source.state_dict()
        assert list(state) == list(plain.state_dict())
        for target in models:
            assert target.load_state_dict(state, strict=True).missing_keys == []
            assert same(target.state_dict(), state)
    torch._dynamo.reset()
