"""On a CUDA device: what the other tests hold up on the CPU, and what only a device can show."""

import copy
import statistics

import oracle
import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from ssprop_fx import Policy, bench, transform
from ssprop_fx.bench_run import Run
from ssprop_fx.ceiling import Ceiling
from ssprop_fx.convolutions import CONVOLUTIONS
from ssprop_fx.records import records_of
from ssprop_fx.steps import scalar_loss
from ssprop_fx.timing import timed

DEVICE = "cuda"
pytestmark = [
    pytest.mark.accelerator,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

# function, input channels, output channels, groups, kernel, stride, padding
FORMS = {
    "1x1": ("conv2d", 32, 64, 1, 1, 1, 0),
    "strided 1x1": ("conv2d", 32, 64, 1, 1, 2, 0),
    "3x3": ("conv2d", 32, 64, 1, 3, 1, 1),
    "grouped": ("conv2d", 32, 64, 4, 3, 1, 1),
    "depthwise": ("conv2d", 64, 64, 64, 3, 1, 1),
    "transposed": ("conv_transpose2d", 32, 64, 1, 3, 2, 1),
}
# componentwise errors in units of eps · Σ|terms|: cuDNN's transforms of 3×3 float32 convolutions round more than sums do
ROUNDINGS = {torch.float32: 64.0, torch.bfloat16: 4.0}


@pytest.fixture(autouse=True)
def exact():
    """Deterministic algorithms, and float32 that is not rounded to TF32."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32
    cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32 = True, False, False, False
    torch._dynamo.reset()
    yield
    cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32 = before


def case_of(form, dtype):
    name, ins, outs, groups, kernel, stride, padding = FORMS[form]
    twice = [(value, value) for value in (kernel, stride, padding)]
    return oracle.Case(
        CONVOLUTIONS[name], 4, ins, outs, groups, (16, 16), *twice, dilation=(1, 1), output_padding=(0, 0), bias=True,
        padding_mode="zeros", dtype=dtype, channels_last=dtype == torch.bfloat16, grad_layout="plain", frozen="nothing",
        drop_rate=0.75, criterion="l1", round_to=1, gradients="all", seed=0,
    )  # fmt: skip


def policy(**changes):
    return Policy(**{"drop_rate": 0.75, "round_to": 1, "schedule": {"kind": "constant"}} | changes)


def by(front_end, model, chosen):
    if front_end == "transform":
        return transform(model, chosen)
    return torch.compile(model, backend="ssprop", options={"policy": chosen})


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1, groups=32), nn.Conv2d(32, 64, 1), nn.ReLU(),
        nn.Conv2d(64, 64, 3, groups=4), nn.ConvTranspose2d(64, 16, 3, stride=2),
    ).to(DEVICE)  # fmt: skip


def gradients(model, x):
    model.zero_grad(set_to_none=True)
    model(x).square().mean().backward()
    return [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("front_end", ["transform", "backend"])
@pytest.mark.parametrize("dtype", ROUNDINGS, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_gradients_equal_the_oracles(form, dtype, front_end, monkeypatch):
    monkeypatch.setitem(oracle._ROUNDINGS, dtype, ROUNDINGS[dtype])
    case = case_of(form, dtype)
    original, input = case.module(), case.input()
    layer, x = copy.deepcopy(original).to(DEVICE), input.detach().to(DEVICE).requires_grad_()
    output = by(front_end, nn.Sequential(layer), policy())(x)
    grad = case.output_grad(output)
    got = torch.autograd.grad(output, [x, layer.weight, layer.bias], grad.to(DEVICE))
    tensors = (input, original.weight, original.bias)
    oracle.check_gradients(case, case.call, tensors, output.detach().cpu(), grad, [g.cpu() for g in got], case.keep())


@pytest.mark.parametrize("front_end", ["transform", "backend"])
def test_a_dense_phase_is_bit_equal_to_dense_training(front_end):
    model, x = net(), torch.randn(4, 3, 16, 16, device=DEVICE)
    dense = model if front_end == "transform" else torch.compile(model)
    expected = gradients(dense, x)
    assert all(map(torch.equal, gradients(dense, x), expected)), "dense training is not deterministic here"
    ours = gradients(by(front_end, model, policy(schedule={"kind": "bar", "period": 2})), x)
    assert all(map(torch.equal, ours, expected))


def test_an_inf_in_a_gradient_reaches_the_grad_scaler():
    torch.manual_seed(0)
    model = transform(nn.Sequential(nn.Conv2d(3, 16, 3)).to(DEVICE), policy())
    x, weight = torch.randn(2, 3, 8, 8, device=DEVICE), torch.ones(16, 1, 1, device=DEVICE)
    weight[5] = 1e-3  # dropped, but for the inf
    optimizer, scaler = torch.optim.SGD(model.parameters(), 0.1), torch.amp.GradScaler(DEVICE, init_scale=8.0)

    def poisoned(grad):
        grad = grad.clone()
        grad[0, 5, 0, 0] = torch.inf
        return grad

    for hook, scale in ((poisoned, 4.0), (None, 4.0)):
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.zero_grad()
        with torch.autocast(DEVICE, torch.float16):
            output = model(x)
        assert output.dtype == torch.float16
        if hook:
            output.register_hook(hook)
        scaler.scale((output.float() * weight).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == scale
        assert all(torch.equal(p, old) == bool(hook) for p, old in zip(model.parameters(), before, strict=True))


def test_returning_to_a_phase_compiles_nothing():
    model, x, chosen = net(), torch.randn(4, 3, 16, 16, device=DEVICE), policy(schedule={"kind": "bar", "period": 2})
    run = by("backend", model, chosen)
    counters.clear()
    for expected in (1, 2, 2, 2):  # dense, sparse, dense, sparse
        gradients(run, x)
        ((_, record),) = records_of(model)
        assert (record.forward_compiles, record.backward_compiles) == (1, expected)
        chosen.step()
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("form", FORMS)
def test_a_layer_launches_few_kernels(form):
    case = case_of(form, torch.bfloat16)
    layer, x = case.module().to(DEVICE), case.input().detach().to(DEVICE).requires_grad_()
    model = transform(nn.Sequential(layer), policy())
    output, wanted = model(x), [x, *layer.parameters()]
    grad = case.output_grad(output).to(DEVICE)
    torch.autograd.grad(output, wanted, grad, retain_graph=True)  # libraries load what they need
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        torch.autograd.grad(output, wanted, grad)
        torch.cuda.synchronize()
    kernels = [event.name for event in profile.events() if str(event.device_type).endswith("CUDA")]
    assert 0 < len(kernels) < 30, kernels


def test_a_sparse_step_needs_no_more_memory_than_a_dense_one_and_its_ceiling_is_known():
    models = pytest.importorskip("torchvision").models
    torch.manual_seed(0)
    model = models.resnet18(weights=None).to(DEVICE, memory_format=torch.channels_last)
    x = torch.randn(32, 3, 128, 128, device=DEVICE).contiguous(memory_format=torch.channels_last)
    result = bench.bench(model, x, Policy(), ["transform", "ssprop"], rounds=3, memory=True)
    assert result.unknown == []
    assert result.setting["tf32"] == {"cudnn": False, "matmul": False}
    for name in ("transform", "ssprop"):
        arm = result.arms[name]
        assert 0 < arm.peak_bytes <= result.arms[arm.base].peak_bytes, name
        assert 0 < arm.ceiling < 1, name


def busy_run():
    """A step of few launches and much work."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(64, 256, 3, padding=1), nn.ReLU(), nn.Conv2d(256, 256, 3, padding=1)).to(DEVICE)
    run = Run("eager", model, torch.randn(32, 64, 64, 64, device=DEVICE), Policy(), scalar_loss, None)
    for _ in range(bench.WARMUP["cuda"]):
        run.seconds()
    return run


def test_events_and_the_hosts_clock_agree_where_the_device_is_busy():
    run = busy_run()
    host, device = (statistics.median(each() for _ in range(11)) for each in (lambda: timed(run), run.seconds))
    assert device == pytest.approx(host, rel=0.2)
    assert all(part > 0 for part in run.splits[-1])


def test_shares_of_the_ceiling_are_of_the_devices_time():
    run = busy_run()
    step = statistics.median(run.seconds() for _ in range(11))
    found, half = (sum(Ceiling.of(run, seconds).shares.values()) for seconds in (step, 2 * step))
    assert 0.3 < found < 1
    assert half == pytest.approx(found / 2, rel=0.1)


def test_joules_a_step_are_those_of_a_gpu(monkeypatch):
    pytest.importorskip("pynvml", reason="needs pip install nvidia-ml-py")
    monkeypatch.setattr(bench, "SECONDS", {"cuda": 0.5})
    model, x = nn.Conv2d(64, 256, 3).to(DEVICE), torch.randn(32, 64, 64, 64, device=DEVICE)
    result = bench.bench(model, x, policy(), ["transform"], rounds=3, energy=True)
    assert result.unknown == []
    for arm in result.arms.values():
        assert 10 < arm.joules.median / arm.step < 2000, "watts"
