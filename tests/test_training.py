"""C5 and C9: what training scripts do around a model works on the transformed model, on the compiled one, and on both at once."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ssprop_fx
from ssprop_fx import Policy
from ssprop_fx.transform import transformation_of


def policy(rate=0.5, **contents):
    return Policy(**({"drop_rate": rate, "round_to": 1, "schedule": {"kind": "constant"}} | contents))


def zero_rows(grad):
    """Output channels whose gradient is zero."""
    return int((grad.flatten(1).abs().sum(1) == 0).sum())


# --- copies ---------------------------------------------------------------------------------------------------


class Padded(nn.Conv2d):
    """A convolution module that calls the function itself."""

    def forward(self, x):
        return F.conv2d(F.pad(x, (1, 1, 1, 1)), self.weight, self.bias)


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), saved])
def test_copies_refer_to_the_tables_own_rows_and_keep_their_names(copied):
    original = nn.Sequential(nn.Conv2d(3, 8, 3), Padded(8, 8, 3), nn.ConvTranspose2d(8, 8, 3), nn.Flatten(), nn.Linear(512, 8))
    rules = [{"layers": "1", "drop_rate": 0.75}, {"layers": "4", "kind": "linear", "drop_rate": 0.25}]
    model = ssprop_fx.transform(original, policy(rules=rules))
    other = copied(model)
    other(torch.randn(2, 3, 8, 8)).square().sum().backward()
    sites, others = transformation_of(model).sites, transformation_of(other).sites
    assert list(others) == list(sites) == ["0", "1", "2", "4"]
    assert all(others[name].spec is site.spec for name, site in sites.items())
    assert [zero_rows(other[i].weight.grad) for i in (0, 1, 4)] == [4, 6, 2]
