"""Warm starts: what an earlier compile left in PyTorch's caches is used again, for the same and for nothing else."""

from types import SimpleNamespace

import pytest
import torch
from test_backend import bar
from torch import nn
from torch._dynamo.utils import counters

import ssprop_fx
from ssprop_fx import logs, phases, warm
from ssprop_fx.records import records_of


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 3, groups=16))


IMAGES = torch.ones(2, 3, 12, 12).add(torch.arange(12.0))


def step(run, model, images=IMAGES, backwards=1):
    model.zero_grad()
    loss = run(images).square().mean()
    for left in reversed(range(backwards)):
        loss.backward(retain_graph=left > 0)
    return [p.grad.clone() for p in model.parameters()]


def compiled(model, policy, **options):
    torch._dynamo.reset()
    return torch.compile(model, backend="ssprop", options={"policy": policy, **options})


def record_of(model):
    return records_of(model)[-1][1]


class Counts:
    """How PyTorch's caches were used since this was made."""

    def __init__(self):
        self.before = self._now()

    @staticmethod
    def _now():
        aot, inductor = counters["aot_autograd"], counters["inductor"]
        return [aot["autograd_cache_hit"], inductor["fxgraph_cache_hit"], inductor["fxgraph_cache_miss"]]

    def __call__(self):
        return [now - before for now, before in zip(self._now(), self.before, strict=True)]


@pytest.fixture(scope="module")
def cold(tmp_path_factory):
    """A model, its policy, what a first compile of a dense and a sparse phase gave, and the caches that it left."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        model, policy = net(), bar(drop_rate=0.5, round_to=1)
        run, found = compiled(model, policy), []
        for _ in range(2):
            found.append(step(run, model))
            policy.step()
        yield model, policy, found, record_of(model)
    torch._dynamo.reset()


@pytest.fixture
def clock(cold):
    """The policy at the first step of a period, a dense one, and no test's trace in the next."""
    cold[1].load_state_dict({**cold[1].state_dict(), "steps": 0})
    return cold[1]


def test_a_warm_start_compiles_and_lowers_nothing(cold, clock, monkeypatch):
    model, policy, expected, before = cold
    monkeypatch.setattr(logs, "trace_artifact", lambda *_: None)  # pytest listens to every logger, and so asks for graphs
    unpickled, unpickle = [], warm.unpickle_graph
    monkeypatch.setattr(warm, "unpickle_graph", lambda *given: unpickled.append(1) or unpickle(*given))
    lowered, lower = [], phases.PhaseDispatcher.lower
    monkeypatch.setattr(phases.PhaseDispatcher, "lower", lambda self, counts: lowered.append(counts) or lower(self, counts))
    counts, run = Counts(), compiled(model, policy)
    for phase in range(2):
        assert all(torch.equal(a, b) for a, b in zip(step(run, model), expected[phase], strict=True))
        policy.step()
    assert counts() == [1, 3, 0]  # the whole; a forward and two backwards
    assert not lowered
    assert not unpickled  # a known phase does without the graph
    record = record_of(model)
    assert record is not before
    assert (record.forward_compiles, record.backward_compiles) == (1, 2)


def test_a_warm_start_reports_the_same(cold, clock):
    model, policy, _, before = cold
    run = compiled(model, policy)
    for _ in range(2):
        step(run, model)
        policy.step()
    record = record_of(model)
    assert list(record.stages()) == list(before.stages())
    for name, graph in record.stages().items():
        now, then = ([(n.op, n.name, str(n.target)) for n in g.graph.nodes] for g in (graph, before.stages()[name]))
        assert now == then
    report = ssprop_fx.inspect(run)
    assert report.coverage == 1
    assert [row.kept for row in report.at(1).rows] == [8, 8, 8]


def test_a_phase_that_is_new_to_a_warm_start_is_compiled(cold, clock, monkeypatch):
    model, policy, expected, _ = cold
    note = warm.StoredPhases._note
    monkeypatch.setattr(warm.StoredPhases, "_note", lambda self, key: note(self, (*key, "lost")))
    counts, run = Counts(), compiled(model, policy)
    for phase in range(2):
        assert all(torch.equal(a, b) for a, b in zip(step(run, model), expected[phase], strict=True))
        policy.step()
    assert counts() == [1, 3, 0]  # lowered again, to what Inductor's own cache knows


def test_new_counts_after_a_warm_start_are_right(cold, clock):
    model, policy, _, _ = cold
    run = compiled(model, policy)
    step(run, model)
    policy.step()
    record_of(model).dispatcher.by_factor[(1.0,)] = record_of(model).dispatcher._enter((0.5,))  # a quarter dropped
    got = step(run, model)
    kept = {"drop_rate": 0.25, "round_to": 1, "schedule": {"kind": "constant"}}
    expected = step(ssprop_fx.transform(model, kept), model)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("change", ["source", "policy", "settings", "user"])
def test_whatever_is_different_is_made_anew(cold, clock, change, monkeypatch):
    model, policy, _, _ = cold
    if change == "source":
        monkeypatch.setattr(phases, "_digest", lambda: "ssprop-fx of another day")
    elif change == "policy":
        policy = bar(drop_rate=0.5, round_to=1, criterion="l2")
    options = {"max_fusion_size": 17} if change == "settings" else {}
    counts, run = Counts(), compiled(model, policy, **options)
    policy.step()
    with torch._functorch.config.patch({"enable_autograd_cache": change != "user"}):  # the user has it off
        step(run, model)
    hits, *_ = counts()
    assert hits == 0
    assert record_of(model).backward_compiles == 1


def test_a_note_of_a_phase_is_one_of_inductors_settings_then():
    """A setting may change between two processes without any option of ours."""
    stored = SimpleNamespace(inductor={}, identity="0")
    names = [warm.StoredPhases._note(stored, (4, 8)), warm.StoredPhases._note(stored, (4, 16))]
    with torch._inductor.config.patch(max_fusion_size=3):
        names.append(warm.StoredPhases._note(stored, (4, 8)))
    assert len(set(names)) == 3
    assert warm.StoredPhases._note(stored, (4, 8)) == names[0]


def test_settings_of_inductor_hold_for_the_backward(monkeypatch):
    seen = []
    model, compile_inner = net(), warm.compile_fx_inner

    def watched(*args, **options):
        seen.append(torch._inductor.config.max_fusion_size)
        return compile_inner(*args, **options)

    monkeypatch.setattr(warm, "compile_fx_inner", watched)
    step(compiled(model, {"drop_rate": 0.5, "schedule": {"kind": "constant"}}, max_fusion_size=19), model)
    assert seen == [19]


def test_evaluation_is_stored_and_reported_too(cold, clock):
    model, policy, _, _ = cold
    outputs = []
    for _ in range(2):
        counts, run = Counts(), compiled(model, policy)
        with torch.no_grad():
            outputs.append(run(IMAGES))
        assert record_of(model).forward is not None
        assert record_of(model).backward is None
    assert counts() == [1, 1, 0]
    assert torch.equal(*outputs)


def test_a_graph_may_be_run_backwards_again(cold, clock):
    """Compiled or taken from a cache, first or later: saved tensors are as they were."""
    model, policy, _, _ = cold
    for _ in range(2):
        run = compiled(model, policy)
        once = step(run, model)
        for twice, grad in zip(step(run, model, backwards=2), once, strict=True):
            torch.testing.assert_close(twice, 2 * grad)


def test_a_dense_model_may_be_run_backwards_again_after_plain_inductor(cold, clock):
    """Plain Inductor's backward writes over saved tensors."""
    model, _, _, _ = cold
    torch._dynamo.reset()
    once = step(torch.compile(model), model)
    run = compiled(model, {"drop_rate": 0.0})
    for twice, grad in zip(step(run, model, backwards=2), once, strict=True):
        torch.testing.assert_close(twice, 2 * grad)


def test_a_cache_that_was_cleared_is_filled_again(cold, clock, monkeypatch):
    model, policy, expected, _ = cold
    monkeypatch.setattr(warm, "load_code", lambda *_, **__: 1 / 0)  # what was noted is no longer there
    counts, run = Counts(), compiled(model, policy)
    for phase in range(2):
        assert all(torch.equal(a, b) for a, b in zip(step(run, model), expected[phase], strict=True))
        policy.step()
    assert counts()[0] == 0


def test_symbolic_sizes_are_compiled_as_ever(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model, policy = net(), {"drop_rate": 0.5, "round_to": 1, "schedule": {"kind": "constant"}}
    torch._dynamo.reset()
    run = torch.compile(model, backend="ssprop", options={"policy": policy}, dynamic=True)
    eager = ssprop_fx.transform(model, policy)
    for n in (2, 3):
        images = IMAGES[:1].expand(n, -1, -1, -1).contiguous()
        for backwards in (1, 2):
            got, expected = (step(f, model, images, backwards) for f in (run, eager))
            for a, b in zip(got, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
