"""Logs: quiet by default, a line a graph at INFO, graphs with TORCH_LOGS, artifacts for tlparse."""

import json
import logging
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

import ssprop_fx
from ssprop_fx import Policy

PROGRAM = """
import torch
from torch import nn
from ssprop_fx import Policy
policy = Policy(schedule={"kind": "bar", "period": 2})
net = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3))
model = torch.compile(net, backend="ssprop", options={"policy": policy, "inner": "aot_eager"})
for _ in range(3):
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    policy.step()
"""


def run(**environment):
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("TORCH_LOGS")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=inherited | environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def train(steps=2):
    torch._dynamo.reset()
    policy = Policy(schedule={"kind": "bar", "period": 2})
    net = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3))
    model = torch.compile(net, backend="ssprop", options={"policy": policy, "inner": "aot_eager"})
    for _ in range(steps):
        model(torch.randn(2, 3, 8, 8)).sum().backward()
        policy.step()


def test_one_line_for_each_rewritten_graph(caplog):
    caplog.set_level(logging.INFO, "ssprop_fx")
    train(steps=4)
    lines = [r.message for r in caplog.records if r.name == "ssprop_fx.logs"]
    assert lines[0] == "graph 0: 2 of 2 convolutions rewritten"
    assert [line.partition(" compiled")[0] for line in lines[1:]] == [
        "graph 0: backward graph of factor 0",
        "graph 0: backward graph of factor 1",
    ]
    caplog.clear()
    ssprop_fx.transform(nn.Conv2d(3, 4, 1), Policy())
    assert [r.message for r in caplog.records] == [
        "transformed Conv2d: 1 convolution modules, 0 modules watched for functional calls"
    ]


def test_every_logger_is_a_child_of_the_package():
    train(steps=1)
    ours = [name for name, logger in logging.Logger.manager.loggerDict.items() if "ssprop" in name]
    assert ours
    assert all(name.split(".")[0] == "ssprop_fx" for name in ours)


@pytest.mark.slow
def test_quiet_by_default():
    assert "convolutions rewritten" not in run()


@pytest.mark.slow
def test_torch_logs_show_lines_and_graphs():
    lines = run(TORCH_LOGS="ssprop_fx")
    assert "graph 0: 2 of 2 convolutions rewritten" in lines
    assert "SSPROP GRAPH" not in lines
    graphs = run(TORCH_LOGS="+ssprop_fx")
    for title in ("captured", "rewritten", "backward, factor 0", "backward, factor 1"):
        assert f" ===== graph 0, {title} =====" in graphs
    assert "torch.ops.ssprop.conv.default(" in graphs
    assert "f32[32, 3, 3, 3][27, 9, 3, 1]cpu" in graphs.replace('"', "")
    assert "[0/0]" in graphs  # the compile that a line belongs to


@pytest.mark.slow
def test_the_structured_trace_has_our_graphs(tmp_path):
    run(TORCH_TRACE=str(tmp_path))
    (path,) = tmp_path.glob("*.log")
    found = {}
    for line in path.read_text().splitlines():
        _, _, rest = line.partition("] ")
        if rest.startswith("{"):
            entry = json.loads(rest)
            if entry.get("artifact", {}).get("name", "").startswith("ssprop_"):
                found[entry["artifact"]["name"]] = entry
    assert list(found) == [
        "ssprop_graph_0_captured",
        "ssprop_graph_0_rewritten",
        "ssprop_graph_0_backward_factor_0",
        "ssprop_graph_0_backward_factor_1",
    ]
    assert {(e["frame_id"], e["frame_compile_id"]) for e in found.values()} == {(0, 0)}
    assert "torch.ops.ssprop.conv_backward" not in path.read_text().split("ssprop_graph_0_backward_factor_1")[1]
