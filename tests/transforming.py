"""A small model, a policy and a step, for the tests of what ``transform`` makes."""

import torch
import torch.nn.functional as F
from torch import nn

from ssprop_fx import Policy
from ssprop_fx.transform import transformation_of


def policy(rate=0.5, round_to=1, **contents):
    contents = {"schedule": {"kind": "constant"}} | contents
    return Policy(drop_rate=rate, round_to=round_to, **contents)


def small(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.LazyLinear(4)
    )


def image(seed=1, batch=2, size=6, dtype=torch.float32, channels=3):
    torch.manual_seed(seed)
    return torch.randn(batch, channels, size, size, dtype=dtype)


def ready(model, x=None):
    """The model with its lazy modules materialised."""
    with torch.no_grad():
        model.eval()(image() if x is None else x)
    return model.train()


def step(model, x=None, **arguments):
    """Output and gradients by name of one step; gradients are reset."""
    model.zero_grad()
    output = model(image() if x is None else x, **arguments)
    output.float().square().sum().backward()
    grads = {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    return output.detach(), grads


def same(a, b):
    assert a.keys() == b.keys()
    return all(torch.equal(a[k], b[k]) if a[k] is not None else b[k] is None for k in a)


def zero_rows(grad):
    return int((grad.flatten(1).abs().sum(1) == 0).sum())


def assert_sparse(model, weight="0.weight", x=None, rows=4):
    _, grads = step(model, x)
    assert zero_rows(grads[weight]) == rows


def layers(model, x=None):
    """Layer names after a step."""
    step(model, x)
    return list(transformation_of(model).sites)


class Functional(nn.Module):
    def __init__(self, function=None):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 3, 3, 3))
        self.function = function

    def call(self, x):
        return self.function(x, self.weight)

    def forward(self, x):
        return self.call(x)


class Plain(Functional):
    def call(self, x):
        return F.conv2d(x, self.weight)
