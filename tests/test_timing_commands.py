"""``ssprop-fx tune`` and ``ssprop-fx bench``."""

import json
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

from ssprop_fx import Policy, arms, cli, profit

NET = """
from torch import nn

def build():
    return nn.Sequential(nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU(), nn.Conv2d(32, 8, 1))
"""


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SSPROP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # whatever this machine has, times are of its CPU
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(NET)
    profit._loaded.cache_clear()
    torch._dynamo.reset()  # what other tests have compiled makes sizes dynamic, and errors name them otherwise

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["ssprop-fx", *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
        output = capsys.readouterr()
        code = end.value.code
        return (code, output.out, output.err) if not isinstance(code, str) else (1, output.out, output.err + code)

    yield call
    profit._loaded.cache_clear()


def test_tune_writes_a_policy_that_loads(run, tmp_path):
    code, out, _ = run("tune", "net.py:build", "-i", "2x1x12x12", "-o", "tuned.yaml")
    assert code == 0
    assert "wrote tuned.yaml" in out
    assert "32×32×3×3" in out
    policy = Policy.load(tmp_path / "tuned.yaml")
    assert policy.drop_rate == 0.8
    assert all(rule.drop_rate == 0 for rule in policy.rules)


def test_tune_prints_the_policy_alone_where_no_file_is_named(run, tmp_path):
    code, out, _ = run("tune", "net.py:build", "-i", "2x1x12x12")
    assert code == 0
    (tmp_path / "printed.yaml").write_text(out)
    Policy.load(tmp_path / "printed.yaml")


def test_tune_as_json(run):
    code, out, _ = run("tune", "net.py:build", "-i", "2x1x12x12", "--json", "--rate", "0.95")
    found = json.loads(out)
    assert code == 0
    assert [s["layers"] for s in found["shapes"]] == [["0"], ["2"], ["4"]]
    assert [r["drop_rate"] for r in found["shapes"][0]["other_rates"]] == [0.95]
    assert set(found["seconds"]) == {"dense", "policy", "tuned"}


def test_tune_replaces_a_file_only_when_told(run, tmp_path):
    (tmp_path / "mine.yaml").write_text("version: 1\n")
    code, _, err = run("tune", "net.py:build", "-i", "2x1x12x12", "-o", "mine.yaml")
    assert (code, (tmp_path / "mine.yaml").read_text()) == (1, "version: 1\n")
    assert "mine.yaml exists" in err
    assert run("tune", "net.py:build", "-i", "2x1x12x12", "-o", "mine.yaml", "--force")[0] == 0
    assert "drop_rate" in (tmp_path / "mine.yaml").read_text()


def test_bench_prints_a_row_for_each_arm(run):
    code, out, _ = run("bench", "net.py:build", "-i", "2x1x12x12", "--arm", "transform", "--rounds", "2", "--memory")
    assert code == 0
    rows = out.splitlines()
    assert rows[0].startswith("Sequential, drop rate 0.8")
    assert [row.split()[0] for row in rows[1:]] == ["arm", "eager", "transform"]


def test_bench_as_json(run):
    code, out, _ = run("bench", "net.py:build", "-i", "2x1x12x12", "--arm", "eager", "--rounds", "1", "--json")
    assert code == 0
    assert json.loads(out)["arms"]["eager"]["ratio"]["median"] == 1.0


def test_tune_under_autocast(run):
    code, out, _ = run("tune", "net.py:build", "-i", "2x1x12x12", "--amp", "bfloat16", "--json")
    assert code == 0
    assert "autocast bfloat16" in json.loads(out)["machine"]


def test_bench_says_what_is_missing_for_energy_before_it_times(run, tmp_path, monkeypatch):
    monkeypatch.setattr("ssprop_fx.energy.POWERCAP", tmp_path)
    monkeypatch.setattr("ssprop_fx.bench.Run", lambda *_: pytest.fail("a step was made"))
    code, out, err = run("bench", "net.py:build", "-i", "2x1x12x12", "--energy")
    assert (code, out) == (1, "")
    assert "energy cannot be measured here: cpu: no intel-rapl zone" in err


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["tune", "net.py:buidl", "-i", "2x1x12x12"], 2, "build"),
        (["tune", "net.py:build", "-i", "2x3x12x12"], 1, "does not run on 2x3x12x12"),
        (["tune", "net.py:build", "-i", "2x1x12x12", "--device", "nowhere"], 2, "nowhere"),
        (["tune", "net.py:build"], 2, "--input"),
        (["bench", "net.py:build", "-i", "2x3x12x12", "--arm", "dense"], 1, "expected input[2, 3, 12, 12] to have 1 channels"),
        (["bench", "net.py:build", "-i", "2x1x12x12", "--arm", "egaer"], 2, "nearest: eager"),
        (["bench", "net.py:build", "-i", "2x1x12x12", "--amp", "float8"], 2, "float8"),
        (["tune", "net.py:build", "-i", "2x1x12x12", "--amp", "float8"], 2, "float8"),
    ],
)
def test_a_wrong_argument_is_explained(run, arguments, code, said):
    found, _, err = run(*arguments)
    assert found == code
    assert said in err


@pytest.mark.parametrize("command", ["tune", "bench"])
@pytest.mark.parametrize(
    ("there", "given", "device"), [(True, [], "cuda"), (False, [], "cpu"), (True, ["--device", "cpu"], "cpu")]
)
def test_times_are_of_the_accelerator_where_there_is_one(run, monkeypatch, command, there, given, device):
    class Refuses(nn.Module):
        def to(self, where):
            raise RuntimeError(f"the model was to be on {where}")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *_, **__: self)
    monkeypatch.setattr("ssprop_fx.timing_commands.load_model", lambda name: Refuses())
    code, _, err = run(command, "net.py:build", "-i", "2x1x12x12", *given)
    assert code == 2
    assert f"the model was to be on {device}" in " ".join(err.replace("│", " ").split())


@pytest.mark.parametrize("command", ["tune", "bench"])
def test_the_device_and_one_thread_are_named(run, command):
    more = ["--arm", "eager", "--rounds", "1"] if command == "bench" else ["-o", "tuned.yaml"]
    code, out, _ = run(command, "net.py:build", "-i", "2x1x12x12", "--device", "cpu", *more)
    assert code == 0
    assert ", cpu" in out
    assert ", 1 thread" in out
    assert "1 threads" not in out


UNMATCHED = "rules:\n- layers: '0'\n  drop_rate: 0\n- layers: '7'\n  drop_rate: 0\n"


@pytest.mark.parametrize("arm", ["transform", "ssprop"])
def test_bench_names_the_line_of_a_rule_that_matches_nothing(run, tmp_path, monkeypatch, arm):
    (tmp_path / "policy.yaml").write_text(UNMATCHED)
    monkeypatch.setitem(arms.ARMS, "dense", replace(arms.ARMS["dense"], build=lambda model, policy: model))
    monkeypatch.setitem(arms.ARMS, "ssprop", replace(arms.ARMS["ssprop"], build=_through_the_backend))
    code, out, err = run("bench", "net.py:build", "-i", "2x1x12x12", "-p", "policy.yaml", "--arm", arm, "--rounds", "1")
    assert (code, out) == (1, "")
    assert "error: policy.yaml:4: rules[1].layers: no layer of 3 is named '7'" in err
    assert "Traceback" not in err


def test_an_error_from_inside_the_compiler_is_told_as_any_other(run, tmp_path, monkeypatch):
    def train(policy, *_):
        _through_the_backend(nn.Sequential(nn.Conv2d(1, 8, 3)), policy)(torch.randn(1, 1, 6, 6))

    (tmp_path / "policy.yaml").write_text(UNMATCHED)
    monkeypatch.setattr("ssprop_fx.demo.train", train)
    code, out, err = run("demo", "--compile", "-p", "policy.yaml")
    assert (code, out) == (1, "")
    assert "error: policy.yaml:4: rules[1].layers: no layer of 1 is named '7'" in err


def _through_the_backend(model, policy):
    torch._dynamo.reset()
    return torch.compile(model, backend="ssprop", options={"policy": policy, "inner": "aot_eager"})


def test_what_could_not_be_drawn_is_told_before_the_work(run, monkeypatch):
    monkeypatch.setattr("ssprop_fx.timing_commands.load_model", lambda name: pytest.fail("the model was loaded"))
    code, out, err = run("bench", "net.py:build", "-i", "2x1x12x12", "--plot", "times.pngg")
    assert (code, out) == (1, "")
    assert "times.pngg cannot be drawn: " in err
