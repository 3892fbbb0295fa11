"""C5: copies, saved models, state, tensors that a model is given: all train as the model does."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from transforming import Plain, assert_sparse, image, policy, ready, small, step, zero_rows

import ssprop_fx
from ssprop_fx import Policy
from ssprop_fx.transform import transform, transformation_of

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.nn.utils.weight_norm.*", "ignore:.*torch.jit.*")


def manual():
    return Policy(drop_rate=0.5, round_to=1, schedule={"kind": "bar", "period": 2})


@pytest.mark.parametrize("make", [lambda: ready(small()), lambda: nn.Sequential(Plain())], ids=["module", "functional"])
def test_deepcopy_is_sparse_independent_and_on_the_same_clock(make):
    chosen = manual()
    model = transform(make(), chosen)
    copied = copy.deepcopy(model)
    weight = next(iter(dict(model.named_parameters())))
    assert zero_rows(step(copied)[1][weight]) == 0
    chosen.step()
    assert_sparse(copied, weight)
    assert not {id(p) for p in copied.parameters()} & {id(p) for p in model.parameters()}
    with torch.no_grad():
        for p in copied.parameters():
            p.zero_()
    assert not copied(image()).any()
    assert model(image()).any()


@pytest.mark.parametrize("way", ["pickle", "torch.save"])
@pytest.mark.parametrize("make", [lambda: ready(small()), lambda: nn.Sequential(Plain())], ids=["module", "functional"])
def test_saved_model_is_sparse_and_on_its_own_clock(make, way):
    chosen = manual()
    chosen.step()
    model = transform(make(), chosen)
    if way == "pickle":
        loaded = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
    weight = next(iter(dict(model.named_parameters())))
    for key, value in loaded.state_dict().items():
        assert torch.equal(value, model.state_dict()[key])
    assert_sparse(loaded, weight)
    chosen.step()
    assert_sparse(loaded, weight)  # it did not advance
    assert zero_rows(step(model)[1][weight]) == 0
    own = transformation_of(loaded).policy
    assert own.digest == chosen.digest
    own.step()
    assert zero_rows(step(loaded)[1][weight]) == 0


class System:
    """Holds a model and its policy, in either order."""

    def __init__(self, first, **parts):
        for name in sorted(parts, key=lambda name: name != first):
            setattr(self, name, parts[name])


@pytest.mark.parametrize("round_to", [1, "auto"])
@pytest.mark.parametrize("first", ["model", "policy"])
@pytest.mark.parametrize("way", [copy.deepcopy, lambda system: pickle.loads(pickle.dumps(system))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("make", [lambda: ready(small()), lambda: nn.Sequential(Plain())], ids=["module", "functional"])
def test_model_and_policy_copied_together_go_together(make, way, first, round_to):
    chosen = Policy(drop_rate=0.5, round_to=round_to, schedule={"kind": "bar", "period": 2})
    system = System(first, model=transform(make(), chosen), policy=chosen)
    weight = next(iter(dict(system.model.named_parameters())))
    step(system.model)
    copied = way(system)
    assert transformation_of(copied.model).policy is copied.policy is not chosen
    copied.policy.step()
    assert_sparse(copied.model, weight)
    assert zero_rows(step(system.model)[1][weight]) == 0
    copied.policy.step()
    chosen.step()
    assert zero_rows(step(copied.model)[1][weight]) == 0
    assert_sparse(system.model, weight)


def test_a_model_that_holds_its_policy_steps_it():
    class Stepping(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.policy = nn.Conv2d(3, 8, 3), manual()

        def forward(self, x):
            return self.conv(x)

    original = Stepping()
    model = transform(original, original.policy)
    model.policy.step()
    assert_sparse(model, "conv.weight")
    model.policy.step()
    copied = copy.deepcopy(model)
    copied.policy.step()
    assert_sparse(copied, "conv.weight")
    assert zero_rows(step(model)[1]["conv.weight"]) == 0


def test_state_dict_goes_both_ways():
    original = ready(small())
    model = transform(ready(small(seed=5)), policy())
    model.load_state_dict(original.state_dict())
    assert torch.equal(model.eval()(image()), original.eval()(image()))
    ready(small(seed=6)).load_state_dict(model.state_dict())


def test_to_changes_type_and_layout():
    model = transform(ready(small()), policy())
    model.to(torch.float64)
    assert model(image(dtype=torch.float64)).dtype == torch.float64
    assert_sparse(model, x=image(dtype=torch.float64))
    model.to(torch.bfloat16)
    assert_sparse(model, x=image(dtype=torch.bfloat16))
    model.to(torch.float32).to(memory_format=torch.channels_last)
    assert_sparse(model, x=image().to(memory_format=torch.channels_last))
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_ema_copy_averages_and_evaluates():
    chosen = policy()
    model = transform(ready(small()), chosen)
    averaged = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    before = [p.detach().clone() for p in model.parameters()]
    averaged.update_parameters(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(image()).sum().backward()
    optimizer.step()
    averaged.update_parameters(model)
    for p, old, new in zip(averaged.module.parameters(), before, model.parameters(), strict=True):
        torch.testing.assert_close(p, (old + new) / 2)
    with torch.no_grad():
        averaged.eval()(image())
    assert_sparse(averaged.module)


def test_functional_call_uses_the_tensors_that_it_is_given():
    original = ready(small()).eval()
    model = transform(original, policy())
    tensors = {k: v.detach().clone() * 0.5 for k, v in model.named_parameters()}
    leaf = tensors["0.weight"].requires_grad_()
    output = torch.func.functional_call(model, tensors, image())
    assert torch.equal(output, torch.func.functional_call(original, tensors, image()))
    output.square().sum().backward()
    assert zero_rows(leaf.grad) == 4
    assert model[0].weight.grad is None


def test_two_policies_train_one_model_apart():
    original = ready(small())
    first, second = transform(original, policy(0.5)), transform(original, policy(0.75))
    assert zero_rows(step(first)[1]["0.weight"]) == 4
    assert zero_rows(step(second)[1]["0.weight"]) == 6


def test_what_a_module_keeps_in_slots_is_there_in_the_copy():
    class Slotted(nn.Module):
        __slots__ = ("__hidden", "scale")

        def __init__(self):
            super().__init__()
            self.conv, self.scale, self.__hidden = nn.Conv2d(3, 8, 3), 3, [2]

        def forward(self, x):
            return self.conv(x) * self.scale * self.__hidden[0]

    original, x = Slotted(), torch.randn(1, 3, 8, 8)
    assert torch.equal(ssprop_fx.transform(original, Policy(drop_rate=0.5))(x), original(x))
