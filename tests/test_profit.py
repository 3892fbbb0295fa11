"""``profitable: auto`` and the measurements behind it."""

import json

import pytest
import torch
from torch import nn

import ssprop_fx
from ssprop_fx import Policy, profit
from ssprop_fx.convolutions import ConvArgs
from ssprop_fx.cost import Call
from ssprop_fx.profit import Timing, measure, settle

ONE = ConvArgs((1, 1), (1, 1), (1, 1), False, (0, 0), 1)


def call(channels=16, size=8, **changes) -> Call:
    made = {
        "input": (2, 4, size, size), "weight": (channels, 4, 3, 3), "output": (2, channels, size, size), "args": ONE,
        "needs": (True, True),
    }  # fmt: skip
    return Call(**made | changes)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("SSPROP_CACHE", str(tmp_path))
    profit._loaded.cache_clear()
    yield tmp_path
    profit._loaded.cache_clear()


@pytest.fixture
def timings(monkeypatch):
    """Layers of 3×3 weights pay, of 1×1 weights do not; what was asked is recorded."""
    asked = []

    def fake(call, keeps, criterion="l1", gradients="all"):
        asked.append((call, tuple(keeps)))
        return [Timing(keep, 2.0, 3.0 if call.weight[-1] == 1 else 1.0) for keep in keeps]

    monkeypatch.setattr(profit, "measure", fake)
    return asked


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.wide = nn.Conv2d(3, 32, 3, padding=1)
        self.point = nn.Conv2d(32, 16, 1)
        self.last = nn.Conv2d(16, 8, 3)

    def forward(self, x):
        return self.last(self.point(self.wide(x)))


def sparse_gradients(model, x):
    model(x).square().sum().backward()
    return {name: (p.grad.flatten(1) != 0).any(1).sum().item() for name, p in model.named_parameters() if p.dim() > 1}


def always_sparse(**contents):
    return Policy(schedule={"kind": "constant", "end": 1.0}, **contents)


@pytest.mark.parametrize("round_to", ["auto", 1, 4])
@pytest.mark.parametrize("front_end", ["transform", "backend"])
def test_a_layer_that_does_not_pay_stays_dense(timings, front_end, round_to):
    torch.manual_seed(0)
    model, x = Net(), torch.randn(2, 3, 8, 8)
    policy = always_sparse(drop_rate=0.5, profitable="auto", round_to=round_to)
    if front_end == "transform":
        model = ssprop_fx.transform(model, policy)
    else:
        torch._dynamo.reset()
        model = torch.compile(model, backend="ssprop", options={"policy": policy, "inner": "aot_eager"})
    kept = {n.removeprefix("_orig_mod."): c for n, c in sparse_gradients(model, x).items()}
    assert kept == {"wide.weight": 16, "point.weight": 16, "last.weight": 4}
    assert {c.weight[0] for c, _ in timings} == {32, 16, 8}
    rows = {row.layer: row for row in ssprop_fx.inspect(model).rows}
    assert rows["point"].reason == "does not pay: 3e+03 ms sparse against 2e+03 ms dense"
    assert (rows["point"].kept, rows["wide"].kept, rows["wide"].reason) == (16, 16, "")
    measurement = ssprop_fx.inspect(model, x).measurement
    assert (measurement.sparse, measurement.unprofitable, measurement.coverage) == (2, 1, 1.0)
    assert "2 of 3 convolution backwards of a step are sparse, 0 dense by rule, 1 dense since" in str(measurement)


def test_by_default_nothing_is_timed(timings):
    model = ssprop_fx.transform(Net(), always_sparse(drop_rate=0.5))
    assert sparse_gradients(model, torch.randn(2, 3, 8, 8))["point.weight"] == 8
    assert not timings


def test_each_phase_is_judged_and_a_step_asks_only_once(timings):
    policy = Policy(drop_rate=0.5, profitable="auto", round_to=1, schedule={"kind": "bar", "period": 2, "clock": "manual"})
    model, x = ssprop_fx.transform(Net(), policy), torch.randn(2, 3, 8, 8)
    model(x).sum().backward()
    assert not timings  # a dense phase has nothing to judge
    policy.step()
    for _ in range(3):
        model(x).sum().backward()
    assert len(timings) == 3 + 2  # and the layers that are left once more, since leaving one out may move their counts


def test_a_layer_found_to_stay_dense_is_called_as_in_the_original(timings):
    """In eager mode, from the step after the one that settled it for the phase."""
    policy = Policy(
        drop_rate=0.5, profitable="auto", schedule={"kind": "bar", "period": 2, "start": 0.5, "end": 1.0, "clock": "manual"}
    )
    model, x = ssprop_fx.transform(Net(), policy), torch.randn(2, 3, 8, 8)
    seen = []
    model.point.register_forward_hook(lambda module, args, output: seen.append(type(output.grad_fn).__name__))
    for _ in range(4):
        model.zero_grad()
        kept = sparse_gradients(model, x)
        assert kept["point.weight"] == 16
        assert kept["wide.weight"] < 32
        policy.step()
    assert seen == ["SparseConvolutionBackward"] * 2 + ["ConvolutionBackward0"] * 2
    assert ssprop_fx.inspect(model, x).coverage == 1.0


@pytest.mark.parametrize("rate", [0.3, 0.5, 0.7])
def test_a_layer_called_several_times_keeps_as_many_each_time_in_both_front_ends(rate):
    class Repeated(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 5, 3, padding=1), nn.Conv2d(5, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x):
            return self.c(self.c(self.c(self.b(self.a(x)))[..., :6, :6]))

    torch.manual_seed(0)
    model, x = Repeated(), torch.randn(2, 3, 8, 8)
    eager = ssprop_fx.transform(model, always_sparse(drop_rate=rate))
    torch._dynamo.reset()
    options = {"policy": always_sparse(drop_rate=rate), "inner": "aot_eager"}
    compiled = torch.compile(model, backend="ssprop", options=options)
    kept = []
    for net in (eager, compiled):
        net(x).square().sum().backward()
        kept.append({layer: list(counts) for layer, counts in ssprop_fx.inspect(net, x).kept_at(1.0).items()})
    assert kept[0] == kept[1]
    assert len(kept[0]["c"]) == 3
    assert len(set(kept[0]["c"])) == 1


class Pyramid(nn.Module):
    """A head at three sizes, the small ones first."""

    def __init__(self):
        super().__init__()
        self.head = nn.Conv2d(3, 16, 3, padding=1)

    def forward(self, x):
        return sum(self.head(part).sum() for part in (x[..., :2, :2], x[..., 2:4, 2:4], x))


@pytest.mark.parametrize(("small", "large", "kept"), [(1.4, 2.0, 8), (1.5, 2.9, 16), (2.0, 2.0, 16)])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_layer_at_several_sizes_is_judged_by_all_of_them(monkeypatch, small, large, kept, compiled):
    """Dense takes 1 at each of two small sizes and 3 at the large one, 5 in all."""

    def fake(call, keeps, criterion="l1", gradients="all"):
        return [Timing(keep, *((1.0, small) if call.output[-1] == 2 else (3.0, large))) for keep in keeps]

    monkeypatch.setattr(profit, "measure", fake)
    policy = always_sparse(drop_rate=0.5, profitable="auto", round_to=1)
    if compiled:
        torch._dynamo.reset()
        model = torch.compile(Pyramid(), backend="ssprop", options={"policy": policy, "inner": "aot_eager"})
    else:
        model = ssprop_fx.transform(Pyramid(), policy)
    for _ in range(2):
        model.zero_grad()
        assert list(sparse_gradients(model, torch.randn(2, 3, 8, 8)).values()) == [kept]
    if small == 1.5:
        total = 2 * small + large
        reason = f"does not pay: {total * 1e3:.3g} ms sparse against 5e+03 ms dense, 3 calls"
        assert ssprop_fx.inspect(model).rows[0].reason == (reason if kept == 16 else "")


def test_a_resumed_run_knows_what_does_not_pay(timings):
    """Its first inputs may have other sizes, so it has to be told: why a layer is dense, and that it is called as ever."""

    def made():
        torch.manual_seed(0)
        policy = always_sparse(drop_rate=0.5, profitable="auto")
        return ssprop_fx.transform(Net(), policy), policy

    (first, policy), (second, resumed) = made(), made()
    sparse_gradients(first, torch.randn(2, 3, 8, 8))
    state = json.loads(json.dumps(policy.state_dict()))
    resumed.load_state_dict(state)
    asked = len(timings)
    seen = []
    second.point.register_forward_hook(lambda module, args, output: seen.append(type(output.grad_fn).__name__))
    x = torch.randn(2, 3, 6, 6)
    for _ in range(2):
        second.zero_grad()
        assert sparse_gradients(second, x)["point.weight"] == 16
    assert seen == ["SparseConvolutionBackward", "ConvolutionBackward0"]
    assert len(timings) == asked
    assert [row.reason for row in ssprop_fx.inspect(second).rows] == [row.reason for row in ssprop_fx.inspect(first).rows]
    assert resumed.state_dict()["counts"] == state["counts"]
    for losses in ([[1.0, {"point": [8, "slow", 3.0, 1]}]], [[1.0, {"point": 8}]], {"point": 8}):
        with pytest.raises(ssprop_fx.PolicyError, match="counts"):
            resumed.load_state_dict(state | {"counts": state["counts"] | {"losses": losses}})
    older = {key: value for key, value in state["counts"].items() if key != "losses"}
    resumed.load_state_dict(state | {"counts": older})  # as an earlier version wrote it
    assert sparse_gradients(second, x)["point.weight"] == 16


def test_what_does_not_pay_has_no_part_in_the_rounding_budget(timings):
    demands = [call(256).demand("a", 0.8), call(256, weight=(256, 4, 1, 1)).demand("b", 0.8)]
    counts, losses = settle(demands, measured=True)
    assert counts["b"] == 256
    assert list(losses) == ["b"]
    assert abs(counts["a"] / 256 - 0.2) < 0.02 * 0.2 + 1 / 256


def test_a_ranking_that_saves_nothing_is_not_judged(timings):
    demand = call(weight=(16, 4, 1, 1)).demand("a", 0.5, 1, "l1 over space")
    assert settle([demand], measured=True) == ({"a": 8}, {})


def test_a_time_on_other_threads_is_another_one(monkeypatch):
    names = set()
    for threads in (1, 2):
        monkeypatch.setattr(torch, "get_num_threads", lambda n=threads: n)
        names.add(profit._name(call(), 4, "l1", "all"))
    assert len(names) == 2


def test_what_another_process_measured_is_kept(folder):
    profit._write({"mine": [1.0, 2.0]})
    path = profit._path()
    stored = json.loads(path.read_text())
    stored["seconds"]["theirs"] = [3.0, 4.0]
    path.write_text(json.dumps(stored))
    profit._write({"mine": [1.0, 2.0], "next": [5.0, 6.0]})
    assert json.loads(path.read_text())["seconds"].keys() == {"mine", "theirs", "next"}


def test_a_layer_that_cannot_be_timed_follows_the_policy(monkeypatch, caplog):
    def fail(*_):
        raise torch.cuda.OutOfMemoryError("no memory")

    monkeypatch.setattr(profit, "measure", fail)
    assert settle([call().demand("a", 0.5, 1)], measured=True) == ({"a": 8}, {})
    assert "a could not be timed: no memory" in caplog.text


def test_measurements_are_made_once_and_kept_in_a_file(folder, monkeypatch):
    state = torch.get_rng_state()
    first = measure(call(), [4, 8])
    assert torch.equal(torch.get_rng_state(), state)
    assert [t.keep for t in first] == [4, 8]
    assert all(t.dense > 0 and t.sparse > 0 for t in first)
    (file,) = folder.iterdir()
    assert len(json.loads(file.read_text())["seconds"]) == 2

    profit._loaded.cache_clear()  # another process
    monkeypatch.setattr(profit, "take_turns", None)
    assert measure(call(), [8, 4]) == first[::-1]


@pytest.mark.parametrize(("device", "queued"), [("cpu", 1), ("meta", 10)])
def test_an_accelerator_gets_several_calls_at_once(monkeypatch, device, queued):
    """The wait for each would weigh most in the sparse pass of a small layer, and training never waits."""
    asked = []

    def figure(call, repeats):
        asked.append(repeats)
        return 1.0

    monkeypatch.setattr(profit, "timed", figure)
    assert measure(call(device=device), [4]) == [Timing(4, 1.0, 1.0)]
    assert set(asked) == {queued}


@pytest.mark.parametrize(
    "changes",
    [
        {"size": 9}, {"channels": 32}, {"needs": (False, True)}, {"channels_last": True}, {"dtype": torch.float64},
        {"args": ONE._replace(dilation=(2, 2), padding=(2, 2))},
    ],
)  # fmt: skip
def test_another_layer_is_another_measurement(changes):
    assert profit._name(call(), 4, "l1", "all") != profit._name(call(**changes), 4, "l1", "all")


@pytest.mark.parametrize("text", ["", "[]", "{", '{"seconds": 3}'])
def test_a_damaged_file_is_measured_anew(folder, text):
    measure(call(), [4])
    (file,) = folder.iterdir()
    file.write_text(text)
    profit._loaded.cache_clear()
    assert measure(call(), [4])[0].dense > 0
    assert json.loads(file.read_text())["seconds"]


def test_a_folder_that_cannot_be_written_loses_only_the_memory(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("SSPROP_CACHE", str(tmp_path / "file" / "folder"))
    assert measure(call(), [4])[0].sparse > 0


def test_tensors_have_the_layout_and_type_of_the_call():
    made = profit.random_tensor(call(dtype=torch.bfloat16, channels_last=True), (2, 4, 8, 8))
    assert made.dtype == torch.bfloat16
    assert made.is_contiguous(memory_format=torch.channels_last)
