"""``ssprop-fx tune`` and ``ssprop-fx bench``."""

import json
import sys

import pytest

from ssprop_fx import Policy, cli, profit

NET = """
from torch import nn

def build():
    return nn.Sequential(nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU(), nn.Conv2d(32, 8, 1))
"""


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SSPROP_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(NET)
    profit._loaded.cache_clear()

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


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["tune", "net.py:buidl", "-i", "2x1x12x12"], 2, "build"),
        (["tune", "net.py:build", "-i", "2x3x12x12"], 1, "does not run on 2x3x12x12"),
        (["tune", "net.py:build", "-i", "2x1x12x12", "--device", "nowhere"], 2, "nowhere"),
        (["tune", "net.py:build"], 2, "--input"),
        (["bench", "net.py:build", "-i", "2x1x12x12", "--arm", "egaer"], 1, "nearest: eager"),
        (["bench", "net.py:build", "-i", "2x1x12x12", "--amp", "float8"], 2, "float8"),
    ],
)
def test_a_wrong_argument_is_explained(run, arguments, code, said):
    found, _, err = run(*arguments)
    assert found == code
    assert said in err
