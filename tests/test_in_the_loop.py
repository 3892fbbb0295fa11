"""C9: what training loops do to a model, from switches and checkpoints to scaling and double backward."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential
from transforming import image, policy, ready, same, small, step, zero_rows

from ssprop_fx import Policy
from ssprop_fx.transform import transform, transformation_of

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.nn.utils.weight_norm.*", "ignore:.*torch.jit.*")


def test_switches_inside_stay_live():
    original = ready(small()).eval()
    model = transform(original, policy())
    with torch.no_grad():
        assert not model(image()).requires_grad
        assert torch.equal(model(image()), original(image()))
    with torch.inference_mode():
        assert model(image()).is_inference()
    model[0].weight.requires_grad_(False)
    assert original[0].weight.requires_grad is False  # shared
    _, grads = step(model)
    assert grads["0.weight"] is None
    assert grads["0.bias"].eq(0).sum() == 4
    model.requires_grad_(False)
    assert not model(image()).requires_grad
    x = image().requires_grad_()
    model(x).sum().backward()
    assert x.grad.ne(0).any()


def test_switches_in_the_models_own_forward_stay_live():
    class Switched(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3)
            self.drop = nn.Dropout(0.5)

        def forward(self, x):
            with torch.no_grad():
                frozen = self.a(x)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                y = self.b(x)
            return self.drop(y) + frozen if self.training else y

    original = Switched()
    model = transform(original, policy())
    torch.manual_seed(3)
    expected, _ = step(original)
    torch.manual_seed(3)
    output, grads = step(model)
    assert torch.equal(output, expected)
    assert grads["a.weight"] is None
    assert zero_rows(grads["b.weight"]) == 4
    assert model.eval()(image()).dtype == torch.bfloat16


def test_gradients_through_an_autograd_function_are_its_own():
    class Halved(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, w):
            ctx.save_for_backward(x, w)
            return F.conv2d(x, w)

        @staticmethod
        def backward(ctx, g):
            return None, torch.full_like(ctx.saved_tensors[1], 0.5)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 3, 3, 3))
            self.conv = nn.Conv2d(8, 8, 1)

        def forward(self, x):
            return self.conv(Halved.apply(x, self.weight) + F.conv2d(x, self.weight.detach()))

    model = transform(Model(), policy())
    _, grads = step(model)
    assert grads["weight"].eq(0.5).all()
    assert zero_rows(grads["conv.weight"]) == 4


class Checkpointed(nn.Module):
    def __init__(self, reentrant=None):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 64, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.GroupNorm(4, 64), nn.ReLU(), nn.Conv2d(64, 64, 1))
            for _ in range(3)
        )
        self.reentrant = reentrant

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        return x


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("round_to", [1, "auto"])
def test_checkpointed_gradients_equal_those_without(reentrant, round_to):
    _, expected = step(transform(Checkpointed(), policy(0.7, round_to)))
    model = transform(Checkpointed(reentrant), policy(0.7, round_to))
    for _ in range(2):
        _, got = step(model)
        assert same(got, expected)
    assert zero_rows(expected["stem.weight"]) > 0


def test_checkpoint_sequential_works_on_the_result():
    model = transform(nn.Sequential(*(nn.Conv2d(8, 8, 3, padding=1) for _ in range(4))), policy())
    x = image(channels=8).requires_grad_()
    _, expected = step(model, x)
    checkpoint_sequential(model, 2, x, use_reentrant=False).square().sum().backward()
    assert same({n: p.grad for n, p in model.named_parameters()}, expected)


def test_accumulated_gradients_are_the_sum():
    model = transform(ready(small()).eval(), policy())
    parts = [step(model, image(seed=i))[1] for i in range(3)]
    for i in range(3):
        model(image(seed=i)).square().sum().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, sum(g[name] for g in parts))


def test_several_forwards_before_their_backwards():
    model = transform(ready(small()).eval(), policy())
    parts = [step(model, image(seed=i))[1] for i in range(2)]
    outputs = [model(image(seed=i)) for i in range(2)]
    for output in reversed(outputs):
        output.square().sum().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, parts[0][name] + parts[1][name])


@pytest.mark.parametrize("criterion", ["l1", "taylor"])
def test_graph_can_be_retained(criterion):
    model = transform(ready(small()).eval(), policy(criterion=criterion))
    loss = model(image()).square().sum()
    loss.backward(retain_graph=True)
    once = {n: p.grad.clone() for n, p in model.named_parameters()}
    loss.backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, 2 * once[name], rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_changed_weight_between_forward_and_backward_is_noticed():
    model = transform(ready(small()).eval(), policy())
    loss = model(image()).sum()
    with torch.no_grad():
        model[3].weight.mul_(2)
    with pytest.raises(RuntimeError, match="inplace operation"):
        loss.backward()


@pytest.mark.parametrize("criterion", ["l1", "l2", "taylor", "random"])
def test_grad_scaler_sees_an_overflow(criterion):
    model = transform(ready(small()).eval(), policy(0.8, criterion=criterion))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    before = [p.detach().clone() for p in model.parameters()]
    output = model(image())
    poison = torch.ones_like(output)
    poison[0, 2] = float("inf")
    scaler.scale((output * poison).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 4.0
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    optimizer.zero_grad()
    scaler.scale(model(image()).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 4.0
    assert not all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))


def test_overflow_in_one_channel_of_a_hidden_layer_reaches_its_gradient():
    model = transform(ready(small()).eval(), policy(0.8))
    model[3].register_full_backward_pre_hook(lambda m, g: (g[0].index_fill(1, torch.tensor([5]), float("nan")),))
    _, grads = step(model)
    assert grads["3.weight"][5].isnan().all()
    assert grads["0.weight"].isnan().any()


def test_autocast_dense_phase_is_bit_equal_and_sparse_phase_is_sparse():
    original = ready(small()).eval()
    model = transform(original, Policy(drop_rate=0.5, round_to=1, schedule={"kind": "bar", "period": 2}))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, dense = step(original)
        output, grads = step(model)
        assert torch.equal(output, expected)
        assert same(grads, dense)
        transformation_of(model).policy.step()
        output, grads = step(model)
    assert torch.equal(output, expected)
    assert output.dtype == torch.bfloat16
    assert zero_rows(grads["0.weight"]) == 4
    assert grads["0.weight"].dtype == torch.float32


def test_double_backward_through_the_model():
    original = ready(small().double(), image(dtype=torch.float64)).eval()
    model = transform(original, policy())
    x = image(dtype=torch.float64).requires_grad_()
    (g,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    g.square().sum().backward()
    assert zero_rows(model[3].weight.grad) == 4  # of a dropped channel nothing depends on the weight
