"""Totals of the report against ``FlopCounterMode`` on the same steps, on the development suite, eager and compiled."""

import pytest
import torch
import zoo
from flops import count_step

import ssprop_fx
from ssprop_fx import Policy

QUICK = ("resnet18", "spiking_resnet18")
suite = pytest.mark.parametrize(
    "model",
    [pytest.param(m, id=m.name, marks=() if m.name in QUICK else pytest.mark.slow) for m in zoo.DEVELOPMENT],
)


def turns():
    return Policy(drop_rate=0.8, schedule={"kind": "bar", "period": 2})


def is_grouped(model):
    return any(getattr(m, "groups", 1) > 1 for m in model.modules())


def check(report, net, policy, arguments, grouped):
    """A dense and a sparse step: what the report says of each, and what is counted."""
    conv, everything = count_step(net, arguments, grouped)
    assert policy.factor == report.at(0).factor == 0
    assert report.conv_flops["dense"] == report.at(0).conv_flops["now"] == pytest.approx(conv, rel=1e-3)
    assert report.step_flops["dense"] == report.at(0).step_flops["now"] == pytest.approx(everything, rel=1e-3)
    policy.step()
    sparse, other = report.at(1), everything - conv
    # with some channels, a 1×1 convolution may be a matrix product, which the counter keeps apart
    _, now = count_step(net, arguments, grouped)
    assert policy.factor == sparse.factor == 1
    assert sparse.step_flops["now"] == pytest.approx(now, rel=1e-3)
    assert sparse.conv_flops["now"] == pytest.approx(now - other, rel=1e-3)
    assert sparse.flops_now < 0.5 * report.flops_dense
    assert report.conv_flops["mean"] == pytest.approx((report.flops_dense + sparse.flops_now) / 2)


@suite
def test_totals_equal_the_flop_counter_in_eager_mode(model):
    pytest.importorskip(model.library)
    policy, net, arguments = turns(), model.build(), model.arguments()
    transformed = ssprop_fx.transform(net, policy)
    report = ssprop_fx.inspect(transformed, arguments)
    assert report.coverage == 1
    check(report, transformed, policy, arguments, is_grouped(net))


@suite
def test_totals_equal_the_flop_counter_in_compiled_code(model):
    pytest.importorskip(model.library)
    torch._dynamo.reset()
    policy, net, arguments = turns(), model.build(), model.arguments()
    compiled = torch.compile(ssprop_fx.transform(net, policy), backend="ssprop", options={"inner": "aot_eager"}, dynamic=False)
    for _ in range(2):
        zoo.run_step(compiled, arguments)
        policy.step()
    report = ssprop_fx.inspect(compiled, arguments)
    assert report.step == 2
    for _ in range(2):  # whatever is compiled again after the report's own steps; tracing would be counted, too
        zoo.run_step(compiled, arguments)
        policy.step()
    policy.load_state_dict({**policy.state_dict(), "steps": 0})
    check(report, compiled, policy, arguments, is_grouped(net))
