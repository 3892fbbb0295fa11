"""``tune``: which layers it finds, what it decides, and the policy file that it writes."""

import pytest
import torch
from torch import nn

import ssprop_fx
from ssprop_fx import Policy, SSPropError, profit
from ssprop_fx.profit import Timing
from ssprop_fx.tuning import tune


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.blocks = nn.Sequential(*(nn.Conv2d(32, 32, 3, padding=1) for _ in range(2)))
        self.point = nn.Conv2d(32, 16, 1)

    def forward(self, x):
        x = self.blocks(self.stem(x))
        return self.point(x) + self.point(x.flip(0))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net(), torch.randn(2, 3, 8, 8)


@pytest.fixture
def timings(monkeypatch):
    """1×1 convolutions pay only where no more than two channels are kept, and the first gradient never."""

    def fake(call, keeps, criterion="l1", gradients="all"):
        pays = [call.weight[-1] > 1 or keep <= 2 for keep in keeps]
        return [Timing(keep, 4e-3, 1e-3 if p and call.needs[0] else 5e-3) for keep, p in zip(keeps, pays, strict=True)]

    monkeypatch.setattr(profit, "measure", fake)


def test_layers_that_do_the_same_work_are_timed_together(net, timings):
    tuned = tune(*net, Policy(drop_rate=0.8, round_to=1))
    assert [(s.layers, s.calls) for s in tuned.shapes] == [(("stem",), 1), (("blocks.0", "blocks.1"), 2), (("point",), 2)]
    assert [s.timing.keep for s in tuned.shapes] == [6, 6, 3]
    assert [[r for r, _ in s.others] for s in tuned.shapes] == [[0.5, 0.9]] * 3


def test_under_autocast_calls_are_timed_in_its_type(net, monkeypatch):
    types = []

    def fake(call, keeps, criterion="l1", gradients="all"):
        types.append(call.dtype)
        return [Timing(keep, 2.0, 1.0) for keep in keeps]

    monkeypatch.setattr(profit, "measure", fake)
    assert ", autocast bfloat16" in tune(*net, amp=torch.bfloat16).machine
    assert set(types) == {torch.bfloat16}
    types.clear()
    assert "autocast" not in tune(*net).machine
    assert set(types) == {torch.float32}


class Head(nn.Module):
    """One layer at two sizes, as a detector's head; the large one decides."""

    def __init__(self):
        super().__init__()
        self.head = nn.Conv2d(4, 16, 3, padding=1)
        self.other = nn.Conv2d(4, 16, 3, padding=1)

    def forward(self, x):
        return self.head(x[..., :4, :4]).sum() + self.head(x).sum() + self.head(x).sum() + self.other(x).sum()


def test_a_layer_at_several_sizes_is_timed_at_each(monkeypatch):
    def fake(call, keeps, criterion="l1", gradients="all"):
        return [Timing(keep, *((1.0, 1.5) if call.output[-1] == 4 else (3.0, 2.0))) for keep in keeps]

    monkeypatch.setattr(profit, "measure", fake)
    tuned = tune(Head(), torch.randn(2, 4, 8, 8), Policy(round_to=1))
    head, other = tuned.shapes
    assert (head.layers, head.calls, head.outputs) == (("head",), 3, ((2, 16, 4, 4), (2, 16, 8, 8)))
    assert (head.timing.dense, head.timing.sparse) == (1.0 + 2 * 3.0, 1.5 + 2 * 2.0)
    assert (other.calls, other.timing.dense) == (1, 3.0)
    assert tuned.seconds == (10.0, 7.5, 7.5)
    assert tuned.to_dict()["shapes"][0]["outputs"] == [[2, 16, 4, 4], [2, 16, 8, 8]]


def test_what_does_not_pay_gets_a_rule_and_its_reason(net, timings, tmp_path):
    base = Policy(drop_rate=0.8, round_to=1, rules=[{"layers": "stem", "criterion": "l2"}])
    tuned = tune(*net, base)
    (tmp_path / "policy.yaml").write_text(tuned.to_yaml())
    policy = Policy.load(tmp_path / "policy.yaml")
    assert policy.digest == tuned.to_policy().digest
    report = ssprop_fx.inspect(ssprop_fx.transform(net[0], policy))
    rates = {row.layer: (row.drop_rate, row.criterion) for row in report.rows}
    assert rates == {"stem": (0, "l2"), "blocks.0": (0.8, "l1"), "blocks.1": (0.8, "l1"), "point": (0, "l1")}
    text = tuned.to_yaml()
    assert "# 6 of 32 channels: 5 ms sparse against 4 ms dense; pays at no rate that was tried\n" in text
    assert "# 3 of 16 channels: 10 ms sparse against 8 ms dense, 2 calls; pays at a rate of 0.9\n" in text
    assert "20.0 ms dense, 17.0 ms sparse, 14.0 ms with the last rules" in text


@pytest.mark.parametrize("form", ["file", "object"])
def test_a_rule_that_what_does_not_pay_overrides_entirely_is_left_out(net, timings, tmp_path, form):
    model, x = net
    rules = [{"layers": "stem", "drop_rate": 0.5}, {"layers": "blocks.*", "drop_rate": 0.9}]
    found = tune(model, x, Policy(round_to=1, rules=rules))
    assert not next(shape for shape in found.shapes if shape.layers == ("stem",)).timing.pays
    if form == "file":
        (tmp_path / "tuned.yaml").write_text(found.to_yaml())
        tuned = Policy.load(tmp_path / "tuned.yaml")
    else:
        tuned = found.to_policy()
    assert [rule.layers for rule in tuned.rules][0] == ("blocks.*",)
    assert tuned.explain(model)["stem"].drop_rate == 0
    assert tuned.explain(model)["blocks.0"].drop_rate == 0.9


def test_a_layer_whose_name_reads_like_a_pattern_is_named_to_the_letter(timings):
    torch.manual_seed(0)
    model = nn.Sequential(nn.ModuleDict({"b[0]": nn.Conv2d(3, 32, 3), "b0": nn.Conv2d(3, 8, 3)}))
    model.forward = lambda x: model[0]["b[0]"](x).sum() + model[0]["b0"](x).sum()
    tuned = tune(model, torch.randn(2, 3, 8, 8), Policy(round_to=1)).to_policy()
    assert ("re:0\\.b\\[0\\]",) in [rule.layers for rule in tuned.rules]
    assert tuned.explain(model)["0.b[0]"].drop_rate == 0


def test_a_model_all_of_which_pays_keeps_its_policy(net, monkeypatch, tmp_path):
    monkeypatch.setattr(profit, "measure", lambda call, keeps, *_: [Timing(k, 2.0, 1.0) for k in keeps])
    base = Policy(drop_rate=0.7)
    tuned = tune(*net, base)
    (tmp_path / "policy.yaml").write_text(tuned.to_yaml())
    assert Policy.load(tmp_path / "policy.yaml").digest == base.digest


def test_layers_that_the_policy_leaves_dense_are_not_timed(net, timings):
    tuned = tune(*net, Policy(rules=[{"layers": "blocks.*", "drop_rate": 0}]))
    assert [s.layers for s in tuned.shapes] == [("stem",), ("point",)]
    with pytest.raises(SSPropError, match="nothing to tune"):
        tune(*net, Policy(drop_rate=0))


def test_it_measures_and_leaves_the_model_alone(net, tmp_path, monkeypatch):
    monkeypatch.setenv("SSPROP_CACHE", str(tmp_path))
    profit._loaded.cache_clear()
    model, x = net
    before = {k: v.clone() for k, v in model.state_dict().items()}
    seen = []
    tuned = tune(model, x, Policy(round_to=1), progress=lambda done, total, text: seen.append((done, total)))
    assert seen == [(i, 3) for i in range(4)]
    assert all(s.timing.dense > 0 and s.timing.sparse > 0 for s in tuned.shapes)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    profit._loaded.cache_clear()
