"""Contracts C1 to C5 and C7 on torchvision's networks, through ``transform`` and through the backend."""

import copy
from functools import cached_property

import pytest
import torch
import torchvision.models as tv
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import ssprop_fx
from ssprop_fx.coverage import measure
from ssprop_fx.records import records_of
from ssprop_fx.steps import tensors_of
from ssprop_fx.transform import transform

RATE = 0.8

MODELS = {
    "resnet18": (lambda: tv.resnet18(weights=None, num_classes=10), 33),
    "resnext50": (lambda: tv.resnext50_32x4d(weights=None, num_classes=10), 33),
    "mobilenet_v2": (lambda: tv.mobilenet_v2(weights=None, num_classes=10), 33),
    "densenet121": (lambda: tv.densenet121(weights=None, num_classes=10), 64),
    "inception_v3": (lambda: tv.inception_v3(weights=None, num_classes=10, init_weights=False), 155),
    "vgg11": (lambda: tv.vgg11(weights=None, num_classes=10, init_weights=False), 32),
}


class MaskedDense(TorchDispatchMode):
    """The oracle for a whole network: every dense convolution backward sees a gradient with the dropped channels zeroed."""

    def __init__(self, rate):
        super().__init__()
        self.rate = rate

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.convolution_backward.default:
            grad, groups = args[0], args[9]
            channels = grad.shape[1]
            choices = (1, channels) if channels == groups else (groups, channels // groups)
            keep = max(int((1 - self.rate) * choices[1] + 1e-6), 1)
            score = grad.abs().sum((0, 2, 3)).view(choices)
            mask = torch.zeros_like(score).scatter_(1, score.topk(keep, 1).indices, 1.0)
            args = (grad * mask.view(1, -1, 1, 1), *args[1:])
        return func(*args, **(kwargs or {}))


class Runs:
    """One network in float64, and the outputs and gradients of its steps, each computed once."""

    def __init__(self, name):
        self.name, (build, size) = name, MODELS[name]
        torch.manual_seed(0)
        self.model = build()
        if name == "vgg11":  # its own classifier holds a hundred million parameters and no convolution
            self.model.classifier = nn.Linear(512 * 7 * 7, 10)
        if name == "inception_v3":  # its auxiliary head convolves what 5 by 5 pixels are left of 299 without padding
            self.model.AuxLogits.conv1.conv.padding = (2, 2)
        for module in self.model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        self.model.double()
        self.x = torch.randn(2, 3, size, size, dtype=torch.float64)
        self.initial = copy.deepcopy(dict(self.model.named_buffers()))

    def policy(self, **contents):
        return ssprop_fx.Policy(**{"drop_rate": RATE, "round_to": 1, "schedule": {"kind": "bar", "period": 2}} | contents)

    def step(self, model, train=True):
        """Outputs and gradients by name."""
        with torch.no_grad():
            for name, buffer in self.model.named_buffers():
                buffer.copy_(self.initial[name])
        self.model.zero_grad()
        outputs = tensors_of(model.train(train)(self.x))
        sum(t.square().mean() for t in outputs).backward()
        grads = {n: p.grad for n, p in self.model.named_parameters() if p.grad is not None}
        self.model.zero_grad()
        return [t.detach() for t in outputs], grads

    @cached_property
    def dense(self):
        return self.step(self.model)

    @cached_property
    def oracle(self):
        with MaskedDense(RATE):
            return self.step(self.model)

    @cached_property
    def transformed(self):
        """The transformed model, and its steps in a dense and a sparse phase."""
        policy = self.policy()
        model = transform(self.model, policy)
        dense = self.step(model)
        policy.step()
        return model, dense, self.step(model)

    @cached_property
    def compiled(self):
        """The compiled model, and its steps: dense, sparse, dense, sparse."""
        torch._dynamo.reset()
        policy = self.policy()
        model = torch.compile(self.model, backend="ssprop", options={"policy": policy, "inner": "aot_eager"})
        steps = []
        for _ in range(4):
            steps.append(self.step(model))
            policy.step()
        policy.step()
        return model, steps


@pytest.fixture(scope="module", params=MODELS)
def runs(request):
    yield Runs(request.param)
    torch._dynamo.reset()


def assert_equal(got, expected):
    for a, b in zip(got[0], expected[0], strict=True):
        assert torch.equal(a, b)
    assert got[1].keys() == expected[1].keys()
    different = [n for n, g in expected[1].items() if not torch.equal(got[1][n], g)]
    assert different == []


def assert_close(got, expected):
    for a, b in zip(got[0], expected[0], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    largest = max(grad.abs().max() for grad in expected[1].values())
    for name, grad in expected[1].items():  # some are zero but for rounding: a bias before a batch norm
        error = (got[1][name] - grad).abs().max()
        assert error <= 1e-8 * grad.abs().max() + 1e-12 * largest, f"{name}: {error:.2g}"


def test_transform_is_bit_equal_in_the_dense_phase(runs):
    assert_equal(runs.transformed[1], runs.dense)


def test_transform_equals_the_oracle_in_the_sparse_phase(runs):
    _, _, sparse = runs.transformed
    assert all(torch.equal(a, b) for a, b in zip(sparse[0], runs.dense[0], strict=True))
    assert_close(sparse, runs.oracle)
    assert any(not torch.equal(sparse[1][n], g) for n, g in runs.dense[1].items())


def test_transform_covers_every_convolution(runs):
    model = runs.transformed[0]
    measured = measure(model, runs.x)
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert measured.coverage == 1.0
    assert measured.dense == measured.sparse >= len(convolutions)


def test_transform_keeps_class_keys_and_tensors(runs):
    model = runs.transformed[0]
    assert type(model) is type(runs.model)
    assert list(model.state_dict()) == list(runs.model.state_dict())
    assert [type(m) for m in model.modules()] == [type(m) for m in runs.model.modules()]
    tensors = lambda m: [*m.parameters(), *m.buffers()]  # noqa: E731
    assert all(a is b for a, b in zip(tensors(model), tensors(runs.model), strict=True))


def test_transform_is_bit_equal_in_eval_mode(runs):
    model = runs.transformed[0]
    with torch.no_grad():
        assert torch.equal(model.eval()(runs.x), runs.model.eval()(runs.x))


def test_auto_rounding_spends_what_was_asked(runs):
    model = transform(runs.model, runs.policy(round_to="auto", schedule={"kind": "constant"}))
    runs.step(model)
    report = ssprop_fx.inspect(model)
    assert all(row.kept is not None for row in report.rows)
    assert abs(report.flops_now / (report.flops_dense * (1 - RATE)) - 1) <= 0.02 + 1e-3


def test_backend_is_bit_equal_in_the_dense_phase(runs):
    _, steps = runs.compiled
    assert_equal(steps[0], runs.dense)
    assert_equal(steps[2], runs.dense)


def test_backend_equals_the_oracle_in_the_sparse_phase(runs):
    _, steps = runs.compiled
    assert all(torch.equal(a, b) for a, b in zip(steps[1][0], runs.dense[0], strict=True))
    assert_close(steps[1], runs.oracle)
    assert_equal(steps[3], steps[1])


def test_backend_compiles_one_forward_and_a_backward_for_each_phase(runs):
    runs.compiled  # noqa: B018
    records = records_of(runs.model)
    assert [(r.forward_compiles, r.backward_compiles) for _, r in records] == [(1, 2)]


def test_backend_covers_every_convolution_by_its_own_name(runs):
    model, _ = runs.compiled
    ((_, record),) = records_of(runs.model)
    convolutions = [n for n, m in runs.model.named_modules() if isinstance(m, nn.Conv2d)]
    assert sorted(record.layers()) == sorted(convolutions)
    report = ssprop_fx.inspect(model)
    assert sorted(row.layer for row in report.rows if row.rewritten) == sorted(convolutions)
    assert measure(model, runs.x).coverage == 1.0


def test_both_train_inception_in_eval_mode(runs):
    if runs.name != "inception_v3":
        pytest.skip("Inception is the one whose graph is another in eval mode")
    expected = runs.step(runs.model, train=False)
    with MaskedDense(RATE):
        oracle = runs.step(runs.model, train=False)
    assert len(expected[0]) < len(runs.dense[0])
    for model in (runs.transformed[0], runs.compiled[0]):
        got = runs.step(model, train=False)
        assert all(torch.equal(a, b) for a, b in zip(got[0], expected[0], strict=True))
        assert_close(got, oracle)
